#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds, checks and times. Prints what the tests say, the nanoseconds of cuda_latency, the
# microseconds of cuda_steps, and a row of bench/gpu.py for each layer: what the tables of docs/cuda.md are made from.
#   bench/gpu.sh [build] [check] [sanitize] [latency] [steps] [compare [options of bench/gpu.py]]     (default: all, in this order)
# Downloads nothing: says first what is missing. Goes on after what fails or takes too long (PATIENCE=2 doubles all limits), and
# names it again at the end. What is built is kept in build/gpu, so that the parts may be run one by one.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$PWD/build/gpu
mkdir -p "$work"
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"  # beside what the Python at hand has, its PyTorch above all

missing=() failed=()
step() { printf '\n=== %s (%d s)\n' "$1" "$SECONDS"; }
fail() {
  failed+=("$1")
  echo "FAILED: $1"
}

limited() {  # MINUTES COMMAND...: its children end with it; the shell hears Ctrl-C while it waits
  timeout --kill-after=10 "$(($1 * PATIENCE))m" "${@:2}" &
  wait $!
}
trap 'kill "${!-}" 2>/dev/null || true; exit 130' INT TERM
case ${PATIENCE:=1} in *[!0-9]* | 0) echo "gpu.sh: PATIENCE must be a whole number, got $PATIENCE" >&2; exit 2 ;; esac
try() {  # NAME MINUTES COMMAND...
  local status=0
  step "$1"
  limited "${@:2}" || status=$?
  case $status in
    0) ;;
    77) fail "$1: skipped" ;;
    124 | 137) fail "$1: ended, since it took too long or there was no memory left" ;;
    *) fail "$1: status $status" ;;
  esac
}

needs() {  # PART: adds to `missing` what it cannot do without; a test would skip, and the build end, for want of it
  local tools="" modules="numpy" name
  case $1 in
    build) tools="nvcc cmake ninja" modules+=" pip scikit_build_core pybind11" ;;
    check | sanitize) modules+=" pytest hypothesis ml_dtypes" ;;
  esac
  case $1 in
    check | compare) python3 -c 'import torch; torch.cuda.init()' 2>/dev/null || missing+=("a torch that can use the GPU") ;;
  esac
  for name in $tools; do command -v "$name" >/dev/null || missing+=("$name"); done
  for name in $modules; do python3 -c "import $name" 2>/dev/null || missing+=("Python's $name"); done
}

built() {  # says why not, where what `build` left cannot use a GPU
  python3 - "$work/site/" 2>&1 <<'END'
import sys
try:
    from fusedrnn import _cuda_module
    _cuda_module.parsed("gpu.sh", "cuda")
    cuda = _cuda_module.module()
    assert cuda.__file__.startswith(sys.argv[1]), f"{cuda.__file__} comes first"
    assert not cuda.EMULATED, "its GPU is emulated"
except Exception as error:
    sys.exit(str(error))
END
}

build() {
  nvcc --version | tail -n 2
  rm -rf "$work/site"  # else what an earlier build left would be tested
  try "Build" 30 python3 -m pip install --quiet --no-build-isolation --no-deps --target "$work/site" -C build-dir="$work/build" \
    -C cmake.define.FUSEDRNN_CUDA=ON -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native \
    -C cmake.define.FUSEDRNN_TESTS=ON -C cmake.define.FUSEDRNN_BENCH=ON .
  [ ! -d "$work/site" ] || try "What was built" 1 python3 -m fusedrnn info
}

check() {
  try "Tests of the core on the card" 15 "$work/build/test_cuda"
  try "Tests of the module on the card" 15 python3 -m pytest tests/test_device*.py
  try "Tests of the layers on the card" 30 \
    python3 -m pytest tests/test_{api,bits,dropout,errors,examples,kernels,lengths_api,pickle,tape}.py -k "cuda or many_blocks"
}

sanitize() {
  local log=$work/sanitizer.log tool
  step "compute-sanitizer, whether it works here"  # on some virtual machines it does not, and may end well all the same
  limited 5 compute-sanitizer "$work/build/test_cuda" once >"$log" 2>&1 || true
  tail -n 3 "$log"
  if grep -q "Device not supported" "$log" || ! grep -q " passed, " "$log"; then
    fail "sanitize: not possible here, see $log"
    return
  fi
  try "compute-sanitizer memcheck, the tests of the core" 30 \
    compute-sanitizer --tool memcheck --error-exitcode 9 "$work/build/test_cuda"
  for tool in memcheck racecheck; do
    try "compute-sanitizer $tool, small cases" 20 \
      compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      python3 -m pytest -x tests/test_device_arrays.py tests/test_device.py \
      -k "(numpy_in and (float32 or bfloat16)) or tf32_rounds"  # the second also step by step
  done
}

latency() { try "Latencies that decide the design" 5 "$work/build/cuda_latency"; }
steps() { try "A step by every plan" 15 "$work/build/cuda_steps"; }
compare() { try "Against cuDNN" 60 python3 -m fusedrnn.bench.gpu "${options[@]}"; }

[ $# -gt 0 ] || set -- build check sanitize latency steps compare
parts=() options=()
while [ $# -gt 0 ]; do
  parts+=("$1")
  case $1 in
    build | check | sanitize | latency | steps) shift ;;
    compare) options=("${@:2}"); break ;;
    *) echo "gpu.sh: part must be build, check, sanitize, latency, steps or compare, got $1" >&2; exit 2 ;;
  esac
done

nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm,power.limit --format=csv ||
  missing+=("a GPU that nvidia-smi can see")
date --utc
for part in "${parts[@]}"; do needs "$part"; done
if [ ${#missing[@]} -gt 0 ]; then
  echo "gpu.sh: missing: $(printf '%s\n' "${missing[@]}" | sort -u | paste -sd ,)" >&2
  exit 2
fi

for part in "${parts[@]}"; do
  if [ "$part" = build ] || why=$(built); then "$part"; else fail "$part: no build that can use a GPU: $why"; fi
done
step "Done"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
