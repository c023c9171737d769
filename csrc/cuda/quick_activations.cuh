// Sigmoid and tanh for arrays of 16 bits, by the GPU's approximate exponential: half the instructions of cells/activations.h,
// in a chain that every time step waits for. Within 2^-17 of their value wherever that is normal, where float16 keeps 11
// bits and bfloat16 8.
#pragma once

#include "cells/activations.h"
#include "cuda/device.cuh"

namespace fusedrnn {

using QuickScalar = Scalar<float, true>;

FUSEDRNN_HD_INLINE float quick_power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return ::exp2f(x);
#endif
}
FUSEDRNN_HD_INLINE float quick_inverse(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

FUSEDRNN_HD_INLINE QuickScalar sigmoid(QuickScalar x) {
  return QuickScalar(quick_inverse(1.0f + quick_power_of_two(-0x1.715476p+0f * x.r)));
}
FUSEDRNN_HD_INLINE QuickScalar tanh(QuickScalar x) {
  const float a = scalar::abs(x.r), e = quick_power_of_two(-0x1.715476p+1f * a), u = a * a;
  const float large = (1.0f - e) * quick_inverse(1.0f + e);
  const float small = scalar::fma(scalar::fma(0x1.111112p-3f, u, -0x1.555556p-2f) * u, a, a);  // where 1 - e would cancel
  return QuickScalar(scalar::copysign(a < 0x1p-4f ? small : large, x.r));
}

namespace cuda {

template <class T>
using CellValue = Scalar<Accumulate<T>, sizeof(T) == 2>;  // what a cell computes with, where its arrays are of T

}  // namespace cuda
}  // namespace fusedrnn
