// The emulator that test_cuda trusts: threads meet, exchange and see each other's memory as CUDA's do. With ThreadSanitizer,
// what they do in no order is found.
#include <math.h>
#include <sys/wait.h>
#include <unistd.h>

#include <vector>

#include "check.h"
#include "cuda/check.h"
#include "cuda/device_sm90.cuh"
#include "cuda/quick_activations.cuh"

namespace fusedrnn::tests {
namespace {

// Every thread of every block writes its number, its neighbour's through shared memory, and its warp's sum.
__global__ void kernel(int* out, int n) {
  int* shared = cuda::shared_memory<int>();
  const int t = int(threadIdx.x), threads = int(blockDim.x), all = int(blockIdx.x) * threads + t;
  shared[t] = all;
  cuda::sync_block();
  int sum = t;
  for (int mask = 16; mask > 0; mask /= 2) sum += cuda::shuffle_xor(sum, mask);
  if (all < n) out[all] = shared[(t + 1) % threads] * 1000000 + sum;
}

__global__ void count(unsigned long long* sum) { cuda::atomic_add(sum, threadIdx.x); }

void check_threads(uint64_t seed) {
  emulated::set_seed(seed);
  constexpr int threads = 96, blocks = 3, n = threads * blocks - 5;
  std::vector<int> out(threads * blocks, -1);
  cuda::launch("kernel", {blocks, threads, threads * sizeof(int)}, kernel, out.data(), n);
  bool ok = true;
  for (int i = 0; i < threads * blocks; ++i) {
    const int t = i % threads, next = i - t + (t + 1) % threads, first = t / 32 * 32;
    ok = ok && out[i] == (i < n ? next * 1000000 + 32 * first + 31 * 16 : -1);
  }
  check(ok, "blocks, barriers and shuffles, seed " + std::to_string(seed));
  unsigned long long sum = 0;
  cuda::launch("count", {5, 64}, count, &sum);
  check(sum == 5 * 63 * 32, "atomic sums");
}

__global__ void half_meets() {
  if (threadIdx.x < 32) cuda::sync_block();
}
__global__ void poll_together(const unsigned* count) {
  while (cuda::leading_lanes(cuda::load_count(count) > 0) < 32) cuda::poll_pause();
}
__global__ void load_askew() {
  const cuda::Words words = cuda::load_shared<cuda::Words>(cuda::shared_address(cuda::shared_memory<unsigned char>()) + 4);
  cuda::store_shared(cuda::shared_address(cuda::shared_memory<unsigned char>()), words);
}

// How a launch goes in a process of its own, and what that says.
struct End {
  std::string text;
  bool aborted;
  bool says(const char* word) const { return aborted && text.find(word) != text.npos; }
};
template <class Launch>
End run_apart(Launch launch) {
  int out[2], status = 0;
  End end{};
  check(pipe(out) == 0, "a pipe");
  const pid_t child = fork();
  if (child == 0) {
    dup2(out[1], STDERR_FILENO);
    launch();
    _exit(0);
  }
  close(out[1]);
  char some[256];
  for (ssize_t length; (length = read(out[0], some, sizeof some)) > 0;) end.text.append(some, size_t(length));
  close(out[0]);
  waitpid(child, &status, 0);
  end.aborted = WIFSIGNALED(status);
  return end;
}
// What a GPU would not survive ends the program, with a word.
template <class Launch>
void check_end(const std::string& what, const char* word, Launch launch) {
  const End end = run_apart(launch);
  check(end.says(word), what + ": ends with a word: " + end.text);
}
void check_ends(uint64_t seed) {
  emulated::set_seed(seed);
  static const unsigned never = 0;
  check_end("half_meets", "emulator: deadlock", [] { cuda::launch("half_meets", {2, 64}, half_meets); });
  check_end("poll_together", "emulator: deadlock", [] { cuda::launch("poll_together", {1, 64}, poll_together, &never); });
  check_end("load_askew", "not aligned", [] { cuda::launch("load_askew", {1, 32, 64}, load_askew); });
}

#if defined(EMULATED_RACES)
__global__ void neighbours(int* out, bool meet) {
  int* shared = cuda::shared_memory<int>();
  const int t = int(threadIdx.x), threads = int(blockDim.x);
  shared[t] = t;
  if (meet) cuda::sync_block();
  out[t] = shared[(t + 1) % threads];
}
__global__ void blocks_of_a_grid(int* out, bool apart) { out[apart ? int(blockIdx.x) : 0] = int(blockIdx.x); }
__global__ void hand_over(int* value, unsigned* count, int* out, bool counted) {
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) *value = 1;
    cuda::sync_block();
    if (threadIdx.x == 0) cuda::raise_count(count);
  } else if (threadIdx.x == 0) {
    while (counted && cuda::load_count(count) == 0) cuda::poll_pause();
    *out = *value;
  }
}

// Before any other launch: of a process that had some, ThreadSanitizer does not see what is in order in its children.
void check_races() {
  int out[64], value = 0;
  unsigned count = 0;
  const auto check_race = [](const std::string& what, auto launch) {
    const End ordered = run_apart([&] { launch(true); }), racing = run_apart([&] { launch(false); });
    check(ordered.text.empty() && !ordered.aborted, what + ": no race is found where there is none: " + ordered.text);
    check(racing.says("data race"), what + ": a race is found: " + racing.text);
  };
  check_race("neighbours", [&](bool meet) { cuda::launch("neighbours", {1, 64, 256}, neighbours, out, meet); });
  check_race("blocks of a grid", [&](bool apart) { cuda::launch("blocks_of_a_grid", {2, 1}, blocks_of_a_grid, out, apart); });
  check_race("hand over", [&](bool counted) {
    cuda::Launch how{2, 32};
    how.cooperative = true;
    cuda::check(cuda::try_launch("hand_over", how, hand_over, &value, &count, out, counted), "hand_over");
  });
}
#endif

void check_graphs() {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  FUSEDRNN_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  unsigned long long sum = 0;
  FUSEDRNN_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  cuda::launch("count", {1, 32, 0, stream}, count, &sum);
  FUSEDRNN_CUDA(cudaStreamEndCapture(stream, &graph));
  FUSEDRNN_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  check(sum == 0, "capture runs nothing");
  FUSEDRNN_CUDA(cudaGraphLaunch(exec, nullptr));
  FUSEDRNN_CUDA(cudaGraphLaunch(exec, nullptr));
  check(sum == 2 * 31 * 16, "a graph runs as often as launched");
  FUSEDRNN_CUDA(cudaGraphExecDestroy(exec));
  FUSEDRNN_CUDA(cudaGraphDestroy(graph));
  FUSEDRNN_CUDA(cudaStreamDestroy(stream));
}

void check_errors() {
  std::string text;
  try {
    cuda::launch("too_large", {1, 2000}, count, static_cast<unsigned long long*>(nullptr));
  } catch (const cuda::Error& error) {
    text = error.what();
  }
  check(text.find("cudaErrorInvalidValue") != text.npos && text.find("too_large") != text.npos,
        "errors name the kernel: " + text);
  check(cudaGetLastError() == cudaSuccess, "a reported error is not reported again");
}

void check_types() {
  bool ok = true;
  for (float x : {0.0f, 1.0f, -2.5f, 65504.0f, 6e-8f, 3.14159f}) {
    ok = ok && fabsf(cuda::widen(cuda::narrow<__half>(x)) - x) <= fabsf(x) * 0x1p-11f + 3e-8f;
    ok = ok && fabsf(cuda::widen(cuda::narrow<__nv_bfloat16>(x)) - x) <= fabsf(x) * 0x1p-8f;
  }
  ok = ok && cuda::widen(cuda::narrow<__nv_bfloat16>(1.00390625f)) == 1.0f;  // a tie, to even
  check(ok && isnan(cuda::widen(cuda::narrow<__nv_bfloat16>(NAN))), "float16 and bfloat16");
}

// Sigmoid and tanh of 16-bit arrays, by the host's exponential in place of the GPU's: where they cancel, and at the ends.
void check_quick_activations() {
  double worst = 0;
  for (double x = -87; x < 87; x += 1.0 / 1024) {
    const double v = double(float(x)), s = 1 / (1 + exp(-v)), t = ::tanh(v);
    worst = fmax(worst, fabs(sigmoid(QuickScalar(float(x))).r - s) / s);
    if (v != 0) worst = fmax(worst, fabs(tanh(QuickScalar(float(x))).r - t) / fabs(t));
  }
  for (float x = 1e-37f; x < 1; x *= 1.01f) worst = fmax(worst, fabs(tanh(QuickScalar(-x)).r / ::tanh(-double(x)) - 1));
  check(worst < 0x1p-17, "quick sigmoid and tanh, relative error " + std::to_string(worst));
  const auto is = [](QuickScalar got, float want) { return got.r == want && signbit(got.r) == signbit(want); };
  check(is(sigmoid(QuickScalar(-INFINITY)), 0) && is(sigmoid(QuickScalar(INFINITY)), 1) &&
            is(tanh(QuickScalar(-INFINITY)), -1) && is(tanh(QuickScalar(-0.0f)), -0.0f),
        "quick sigmoid and tanh of zeros and infinities");
  check(isnan(sigmoid(QuickScalar(NAN)).r) && isnan(tanh(QuickScalar(NAN)).r), "quick sigmoid and tanh of NaN");
}

}  // namespace
}  // namespace fusedrnn::tests

int main() {
  using namespace fusedrnn::tests;
#if defined(EMULATED_RACES)
  check_races();
#endif
  for (uint64_t seed : {0, 1, 2, 3}) check_threads(seed), check_ends(seed);
  check_graphs();
  check_errors();
  check_types();
  check_quick_activations();
  printf("%d passed, %d failed\n", int(passed), int(failed));
  return failed != 0;
}
