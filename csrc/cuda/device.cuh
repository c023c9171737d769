// What kernels ask of the GPU. Every intrinsic and every line of PTX is in this file, or in device_sm90.cuh,
// quick_activations.cuh and (a quotient) cells/value.h, each in a small function that has a twin on the CPU, most of them
// in tests/native/cuda_emulation/; kernels call nothing else of CUDA but threadIdx and its like.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/args.h"

namespace fusedrnn::cuda {

// Every sum is of the accumulating type; arrays are read and written through these, by tests on the host too.
__host__ __device__ __forceinline__ float widen(float x) { return x; }
__host__ __device__ __forceinline__ double widen(double x) { return x; }
__host__ __device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__host__ __device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__host__ __device__ __forceinline__ T narrow(Accumulate<T> x) {
  if constexpr (sizeof(T) == sizeof(Accumulate<T>))
    return x;
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else
    return __float2bfloat16_rn(x);
}

// 16 bytes at once, from a p that they are aligned at.
__device__ __forceinline__ void load_16_bytes(void* to, const void* p) {
#if defined(FUSEDRNN_EMULATED)
  emulated::require_aligned(uintptr_t(p), 16);
  __builtin_memcpy(to, p, 16);
#else
  *static_cast<uint4*>(to) = *static_cast<const uint4*>(p);
#endif
}

// The block's dynamic shared memory, the only shared memory there is.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#if defined(FUSEDRNN_EMULATED)
  return reinterpret_cast<T*>(emulated::current->block->shared);
#else
  extern __shared__ __align__(128) unsigned char fusedrnn_shared[];
  return reinterpret_cast<T*>(fusedrnn_shared);
#endif
}

// Of a cell's slot, since device code cannot index Cell::slot_gate.
template <class Cell>
__device__ __forceinline__ int gate_of_slot(int slot) {
  constexpr int gates = [] {
    int all = 0;  // four bits each
    for (int s = 0; s < Cell::slots; ++s) all |= Cell::slot_gate[s] << 4 * s;
    return all;
  }();
  return gates >> 4 * slot & 15;
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ int lane_of_thread() { return int(threadIdx.x % 32); }
__device__ __forceinline__ int warp_of_thread() { return int(threadIdx.x / 32); }

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Integers only: their sum does not depend on the order.
__device__ __forceinline__ void atomic_add(unsigned long long* p, unsigned long long v) { atomicAdd(p, v); }

}  // namespace fusedrnn::cuda
