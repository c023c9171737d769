// How steps are launched: T kernels of a few microseconds each would leave the GPU waiting for the host, so that runs
// of them are captured as graphs once and replayed.
#include "cuda/step.h"

#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "cuda/check.h"
#include "cuda/memory.h"

namespace fusedrnn::cuda {
namespace {

template <class Args>
__global__ void set_call(Call<Args>* call, Args args, int step) {
  if (threadIdx.x == 0) call->args = args, call->step = step;
}

// Steps of a graph, longest first. What is left is launched kernel by kernel.
constexpr int graph_steps[] = {128, 16};
constexpr int graph_sizes = sizeof(graph_steps) / sizeof(graph_steps[0]);

// The kernels of one cell and type for layers of one width and batch, and the graphs made of them. One call at a time.
template <class Args>
struct Player {
  using Kernel = void (*)(const Call<Args>*, int);
  Kernel kernel[max_phases];
  size_t shared[max_phases];
  int phases;
  dim3 grid;
  int threads;
  int sign;  // -1: steps go down
  Call<Args>* call = nullptr;
  cudaGraphExec_t graph[graph_sizes] = {};
  cudaEvent_t done = nullptr;
  cudaStream_t stream = nullptr;  // where it was used last
  bool busy = false;

  ~Player() {  // only of one that failed before it was used
    for (cudaGraphExec_t g : graph)
      if (g) cudaGraphExecDestroy(g);
    if (done) cudaEventDestroy(done);
    if (call) cudaFree(call);
  }
  void prepare() {
    FUSEDRNN_CUDA(cudaEventCreateWithFlags(&done, cudaEventDisableTiming));
    FUSEDRNN_CUDA(cudaMalloc(&call, sizeof *call));
    cudaFuncAttributes loaded;  // kernels are loaded when first asked for, which no capture allows
    for (int p = 0; p < phases; ++p) FUSEDRNN_CUDA(cudaFuncGetAttributes(&loaded, kernel[p]));
  }
  void launch_step(int k, cudaStream_t on) const {
    for (int p = 0; p < phases; ++p)
      launch(sign > 0 ? "forward_step" : "backward_step", {grid, unsigned(threads), shared[p], on}, kernel[p], call, k);
  }
  cudaGraphExec_t capture(int steps) const {
    cudaStream_t own;  // the caller's may be the legacy stream, which cannot be captured
    cudaGraph_t captured = nullptr;
    cudaGraphExec_t made = nullptr;
    FUSEDRNN_CUDA(cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking));
    cudaError_t code = cudaStreamBeginCapture(own, cudaStreamCaptureModeThreadLocal);
    if (code == cudaSuccess) {
      try {
        for (int k = 0; k < steps; ++k) launch_step(k, own);
      } catch (...) {
        cudaStreamEndCapture(own, &captured);
        if (captured) cudaGraphDestroy(captured);
        cudaStreamDestroy(own);
        throw;
      }
      code = cudaStreamEndCapture(own, &captured);
    }
    if (code == cudaSuccess) code = cudaGraphInstantiate(&made, captured, 0);
    if (captured) cudaGraphDestroy(captured);
    cudaStreamDestroy(own);
    check(code, "capture of a graph of steps");
    return made;
  }
  // `count` steps from `step` on.
  void play(const Args& args, int step, int count, cudaStream_t on) {
    for (int i = 0; i < graph_sizes; ++i)
      for (; count >= graph_steps[i]; count -= graph_steps[i], step += sign * graph_steps[i]) {
        if (!graph[i]) graph[i] = capture(graph_steps[i]);
        set(args, step, on);
        note_launch(sign > 0 ? "forward_step" : "backward_step");
        FUSEDRNN_CUDA(cudaGraphLaunch(graph[i], on));
      }
    if (count > 0) set(args, step, on);
    for (int k = 0; k < count; ++k) launch_step(k, on);
  }
  void set(const Args& args, int step, cudaStream_t on) const {
    launch("set_call", {1, 32, 0, on}, set_call<Args>, call, args, step);
  }
};

// Players are kept for ever: they are few, and small. At most `most` of a kind; a further call in another stream waits
// for one of them.
template <class Args>
class Players {
 public:
  using Key = std::tuple<int, const void*, unsigned, unsigned>;  // device, StepKernels, grid
  template <class Make>
  void play(const Key& key, cudaStream_t stream, Make make, const Args& args, int step, int count) {
    Player<Args>* player = take(key, stream, make);
    try {
      // Also where it was used there last: a stream that is gone may have had the same handle.
      FUSEDRNN_CUDA(cudaStreamWaitEvent(stream, player->done, 0));
      player->play(args, step, count, stream);
      FUSEDRNN_CUDA(cudaEventRecord(player->done, stream));
    } catch (...) {
      cudaEventRecord(player->done, stream);  // some of its steps may be on their way
      give_back(player, stream);
      throw;
    }
    give_back(player, stream);
  }

 private:
  static constexpr size_t most = 8;
  template <class Make>
  Player<Args>* take(const Key& key, cudaStream_t stream, Make make) {
    std::unique_lock<std::mutex> lock(mutex_);
    auto& all = players_[key];
    Player<Args>* idle = nullptr;
    for (auto& p : all) {
      if (p->busy) continue;
      if (p->stream == stream || cudaEventQuery(p->done) == cudaSuccess) return p->busy = true, p.get();
      idle = p.get();
    }
    cudaGetLastError();  // "not ready" is no error
    if (idle && all.size() >= most) return idle->busy = true, idle;
    auto made = std::make_unique<Player<Args>>(make());
    made->prepare();
    FUSEDRNN_CUDA(cudaEventRecord(made->done, stream));
    made->stream = stream;
    made->busy = true;
    all.push_back(std::move(made));
    return all.back().get();
  }
  void give_back(Player<Args>* player, cudaStream_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    player->stream = stream;
    player->busy = false;
  }
  std::mutex mutex_;
  std::map<Key, std::vector<std::unique_ptr<Player<Args>>>> players_;
};

template <class Args>
Players<Args>& players() {
  static Players<Args>* all = new Players<Args>;  // never destroyed: CUDA may be gone by then
  return *all;
}

template <class T>
const StepKernels<T>& kernels_of(int cell, bool tf32) {
  if constexpr (std::is_same_v<T, float>)
    if (tf32) return steps_of<T, Tf32>(cell);
  return steps_of<T, T>(cell);
}

// Sequences along x: of their tiles there may be more than the 65535 blocks that y takes.
template <class T>
dim3 grid_of(const StepKernels<T>& k, const ForwardArgs<T>& a) {
  return dim3(unsigned(ceil_div(a.schedule.batch, k.tile_rows)), unsigned(ceil_div(a.H, k.units)));
}

}  // namespace

template <class T>
void run_steps(int cell, const ForwardArgs<T>& args, bool tf32, int device, cudaStream_t stream) {
  const StepKernels<T>& k = kernels_of<T>(cell, tf32);
  const dim3 grid = grid_of(k, args);
  const auto make = [&] {
    Player<ForwardArgs<T>> p;
    p.phases = cells[cell].phases, p.grid = grid, p.threads = k.threads, p.sign = 1;
    for (int i = 0; i < p.phases; ++i) p.kernel[i] = k.forward[i], p.shared[i] = k.forward_shared[i];
    return p;
  };
  players<ForwardArgs<T>>().play({device, &k, grid.x, grid.y}, stream, make, args, args.begin, args.end - args.begin);
}

template <class T>
void run_steps(int cell, const BackwardArgs<T>& args, bool tf32, int device, cudaStream_t stream) {
  const StepKernels<T>& k = kernels_of<T>(cell, tf32);
  const dim3 grid = grid_of(k, args.forward);
  const auto make = [&] {
    Player<BackwardArgs<T>> p;
    p.phases = cells[cell].phases, p.grid = grid, p.threads = k.threads, p.sign = -1;
    for (int i = 0; i < p.phases; ++i) p.kernel[i] = k.backward[i], p.shared[i] = k.backward_shared;
    return p;
  };
  const int steps = args.forward.schedule.steps;
  const int before = args.dstate[0] || args.dstate[1];  // step -1 gives the initial state's gradients
  players<BackwardArgs<T>>().play({device, &k, grid.x, grid.y}, stream, make, args, steps - 1, steps + before);
}

#define FUSEDRNN_INSTANTIATE(T)                                                 \
  template void run_steps(int, const ForwardArgs<T>&, bool, int, cudaStream_t); \
  template void run_steps(int, const BackwardArgs<T>&, bool, int, cudaStream_t);
FUSEDRNN_INSTANTIATE(float)
FUSEDRNN_INSTANTIATE(double)
FUSEDRNN_INSTANTIATE(__half)
FUSEDRNN_INSTANTIATE(__nv_bfloat16)
#undef FUSEDRNN_INSTANTIATE

}  // namespace fusedrnn::cuda
