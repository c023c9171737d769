// The per-step path as the host sees it: its kernels, and how a sequence of them is launched.
#pragma once

#include <cuda_runtime.h>

#include "cells/all.h"
#include "cuda/args.h"

namespace fusedrnn::cuda {

// What a step's kernel reads from the device's memory, so that a captured graph depends on no pointer and no length:
// the kernel with number k runs step `step` + k, or - k in backward.
template <class Args>
struct Call {
  Args args;
  int step;
};

template <class T>
struct StepKernels {
  using Forward = void (*)(const Call<ForwardArgs<T>>*, int k);
  using Backward = void (*)(const Call<BackwardArgs<T>>*, int k);
  Forward forward[max_phases];
  Backward backward[max_phases];
  size_t forward_shared[max_phases], backward_shared;
  int tile_rows, units, threads;  // of a block
};

// Whose products are of factors of type Number: T, or Tf32 for float32.
template <class T, class Number>
const StepKernels<T>& steps_of(int cell);

// One layer in one direction. Returns when all is in the stream. tf32: float32 factors may be rounded to TF32.
template <class T>
void run_steps(int cell, const ForwardArgs<T>& args, bool tf32, int device, cudaStream_t stream);
template <class T>
void run_steps(int cell, const BackwardArgs<T>& args, bool tf32, int device, cudaStream_t stream);

}  // namespace fusedrnn::cuda
