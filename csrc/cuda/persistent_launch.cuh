// Launches of the persistent kernels: which form of which kernel, and how. A file of a few lines instantiates these for one T.
#pragma once

#include <algorithm>

#include "cuda/check.h"
#include "cuda/persistent.cuh"

namespace fusedrnn::cuda {

template <class T, class Cell, bool backward, class Args>
bool launch_persistent(const PersistentPlan& plan, const Args& args, void* workspace, cudaStream_t stream) {
  const bool grid = plan.exchange == Exchange::grid;
  const char* const name = backward ? "persistent backward" : "persistent forward";
  Launch how;
  int blocks = plan.blocks * plan.slices, shared = plan.shared_bytes;
  how.cooperative = grid;
  if constexpr (!backward)
    if (args.projection.blocks > 0) {
      blocks += args.projection.blocks, shared = std::max(shared, projection_shared_bytes(Cell::input.count));
      how.cooperative = true;  // clusters wait for blocks that are in none of theirs
    }
  how.grid = dim3(unsigned(blocks)), how.block = dim3(persistent_threads);
  how.shared = size_t(shared), how.stream = stream;
  how.cluster = grid ? 0 : plan.blocks;
  const Schedule* schedule;
  if constexpr (backward)
    schedule = &args.forward.schedule;
  else
    schedule = &args.schedule;
  const bool simple = schedule->uniform && plan.cells <= persistent_warps;
  const auto kernel = grid     ? simple ? persistent_kernel<T, Cell, backward, GridExchange, true>
                                        : persistent_kernel<T, Cell, backward, GridExchange, false>
                      : simple ? persistent_kernel<T, Cell, backward, ClusterExchange, true>
                               : persistent_kernel<T, Cell, backward, ClusterExchange, false>;
  const cudaError_t code = try_launch(name, how, kernel, plan, args, static_cast<unsigned char*>(workspace));
  if (is_refusal(code)) return cudaGetLastError(), false;
  check(code, name);
  return true;
}

template <class T, bool backward, class Args>
bool launch_cell(int cell, const PersistentPlan& plan, const Args& args, void* workspace, cudaStream_t stream) {
  int number = 0;
#define FUSEDRNN_LAUNCH(Cell) \
  if (cell == number++) return launch_persistent<T, Cell, backward>(plan, args, workspace, stream);
  FUSEDRNN_FOR_EACH_CELL(FUSEDRNN_LAUNCH)
#undef FUSEDRNN_LAUNCH
  return false;
}

template <class T>
bool persistent_forward(int cell, const PersistentPlan& plan, const ForwardArgs<T>& args, void* workspace,
                        cudaStream_t stream) {
  return launch_cell<T, false>(cell, plan, args, workspace, stream);
}

template <class T>
bool persistent_backward(int cell, const PersistentPlan& plan, const BackwardArgs<T>& args, void* workspace,
                         cudaStream_t stream) {
  return launch_cell<T, true>(cell, plan, args, workspace, stream);
}

#define FUSEDRNN_PERSISTENT(T)                                                                                 \
  template bool persistent_forward<T>(int, const PersistentPlan&, const ForwardArgs<T>&, void*, cudaStream_t); \
  template bool persistent_backward<T>(int, const PersistentPlan&, const BackwardArgs<T>&, void*, cudaStream_t);

}  // namespace fusedrnn::cuda
