#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds, checks, times, and prints the tables of docs/cuda.md.
# Needs nvcc, a C++ compiler and a Python that has numpy, pytest, hypothesis and what builds the package, since nothing is
# downloaded; a PyTorch with CUDA for the comparison, compute-sanitizer where it is found.
#   bench/gpu.sh [build] [check] [sanitize] [latency] [steps] [compare [options of bench/gpu.py]]     (default: all, in this order)
# What is built is kept in build/gpu, so that the parts may be run one by one.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$PWD/build/gpu
mkdir -p "$work"
export PYTHONPATH="$work/site"  # beside what the Python at hand has, its PyTorch above all

step() { printf '\n=== %s (%d s)\n' "$1" "$SECONDS"; }

build() {
  step "The machine"
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm,power.limit --format=csv
  nvcc --version | tail -n 2
  date --utc
  step "Build"
  python3 -c 'import scikit_build_core, pybind11, numpy, pytest, hypothesis' ||
    { echo "missing: pip install scikit-build-core pybind11 cmake ninja numpy pytest hypothesis"; exit 1; }
  rm -rf "$work/site"
  python3 -m pip install --quiet --no-build-isolation --no-deps --target "$work/site" \
    -C cmake.define.FUSEDRNN_CUDA=ON -C build-dir="$work/python" .
  (cd "$work" && python3 -m fusedrnn info)
  cmake -G Ninja -S . -B "$work/native" -DFUSEDRNN_CUDA=ON -DFUSEDRNN_PYTHON=OFF -DFUSEDRNN_TESTS=ON -DFUSEDRNN_BENCH=ON >"$work/cmake.log"
  cmake --build "$work/native" >"$work/build.log" 2>&1 || { tail -n 50 "$work/build.log"; exit 1; }
}

check() {
  step "Tests of the core on the card"
  ctest --test-dir "$work/native" --output-on-failure -R cuda
  step "Tests of the module on the card"
  python3 -m pytest tests/test_device*.py
  python3 -m pytest tests/test_{api,bits,dropout,errors,kernels,lengths_api,pickle,tape}.py -k "cuda or many_blocks"
}

sanitize() {
  command -v compute-sanitizer >/dev/null || { step "No compute-sanitizer: memory and races are not checked"; return; }
  step "compute-sanitizer memcheck, the tests of the core"
  compute-sanitizer --tool memcheck --error-exitcode 9 "$work/native/test_cuda"
  for tool in memcheck racecheck; do
    step "compute-sanitizer $tool, small cases"
    compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      python3 -m pytest -x tests/test_device_arrays.py tests/test_device.py \
      -k "(numpy_in and (float32 or bfloat16)) or tf32_rounds"  # the second also step by step
  done
}

latency() {
  step "Latencies that decide the design"
  "$work/native/cuda_latency"
}

steps() {
  step "A step by every plan"
  "$work/native/cuda_steps"
}

compare() {
  step "Against cuDNN"
  python3 -m fusedrnn.bench.gpu "$@"
}

[ $# -gt 0 ] || set -- build check sanitize latency steps compare
while [ $# -gt 0 ]; do
  part=$1
  shift
  case $part in
    build | check | sanitize | latency | steps) "$part" ;;
    compare) compare "$@"; break ;;
    *) echo "gpu.sh: part must be build, check, sanitize, latency, steps or compare, got $part" >&2; exit 2 ;;
  esac
done
step "Done"
