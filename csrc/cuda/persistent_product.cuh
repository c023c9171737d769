// What a warp of the persistent kernel multiplies: on tensor cores, or on float units.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/persistent.h"

namespace fusedrnn::cuda {

// The products of row_tile rows and `columns` sequences that one warp sums, of factors of type Number. In a chunk of k,
// lane (g, q) = (lane / 4, lane % 4) has the q-th 16 bytes of rows g, g+8, g+16, g+24 of the weights and, on tensor
// cores, of sequence g of the operand. The unit wants other places of k in a lane, but the order of a sum's terms is
// ours. Folded, rows g+16 and g+24 are rows g and g+8 of the next chunk, and meet an operand of their own.
template <class Number>
struct Product {
  using Operand = Words;
  static constexpr int columns = 8, group = 4;  // group: chunks whose operand is loaded at once
  float d[2][2][4] = {};                        // two chains of sums for each 16 rows: one alone would wait for itself

  // at(n) are the lane's bytes of sequence n.
  template <class At>
  static __device__ __forceinline__ Operand load(At at, int g) {
    Operand b = at(g);
    if constexpr (std::is_same_v<Number, Tf32>)
      for (int i = 0; i < 4; ++i) b.w[i] = round_to_tf32(b.w[i]);
    return b;
  }
  static __device__ __forceinline__ Operand none() { return no_words(); }
  __device__ __forceinline__ void add(const Words (&a)[4], const Operand& low, const Operand& high) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const Operand& b = m == 0 ? low : high;
        mma(Number(), d[m][half], a[2 * m].w[2 * half], a[2 * m + 1].w[2 * half], a[2 * m].w[2 * half + 1],
            a[2 * m + 1].w[2 * half + 1], b.w[2 * half], b.w[2 * half + 1]);
      }
  }
  // Sequence n's result of row r goes to to[n * stride + r].
  template <int fold>
  __device__ __forceinline__ void store(float* to, int stride, int g, int q) const {
#pragma unroll
    for (int m = 0; m < 2 / fold; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float sum = d[m][0][i] + d[m][1][i];
        if (fold == 2) sum += d[1][0][i] + d[1][1][i];
        to[(2 * q + i % 2) * stride + 16 * m + i / 2 * 8 + g] = sum;
      }
  }
};

// float32 without TF32: the lanes have the same weights, but each meets all sequences, and four lanes add what they
// found.
template <int n>
struct FloatProduct {
  struct Operand {
    Words of[n];
  };
  static constexpr int columns = n, group = 1;
  float d[4][n] = {};

  template <class At>
  static __device__ __forceinline__ Operand load(At at, int) {
    Operand b;
#pragma unroll
    for (int j = 0; j < n; ++j) b.of[j] = at(j);
    return b;
  }
  static __device__ __forceinline__ Operand none() { return {}; }
  __device__ __forceinline__ void add(const Words (&a)[4], const Operand& low, const Operand& high) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < n; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) d[r][j] = fmaf(as_float(a[r].w[i]), as_float((r < 2 ? low : high).of[j].w[i]), d[r][j]);
  }
  // Each time two lanes halve what they hold: one keeps the lower sequences, one the upper. Of one sequence, both keep
  // it. Either way a sum is (q0 + q2) + (q1 + q3).
  template <int fold>
  __device__ __forceinline__ void store(float* to, int stride, int g, int q) {
#pragma unroll
    for (int r = 0; r < 4 / fold; ++r) {
#pragma unroll
      for (int j = 0; j < n && fold == 2; ++j) d[r][j] += d[r + 2][j];
      const int first = halve<n>(d[r], q < 2, 2) ? n / 2 : 0, second = halve<n / 2>(d[r], q % 2 == 0, 1) ? n / 4 : 0;
#pragma unroll
      for (int j = 0; j < (n < 4 ? 1 : n / 4); ++j) to[(first + second + j) * stride + 8 * r + g] = d[r][j];
    }
  }
  template <int m>
  static __device__ __forceinline__ bool halve(float (&v)[n], bool lower, int mask) {
    if constexpr (m < 2) {
      v[0] += shuffle_xor(v[0], mask);
      return false;
    } else {
#pragma unroll
      for (int j = 0; j < m / 2; ++j) {
        const float give = lower ? v[j + m / 2] : v[j], keep = lower ? v[j] : v[j + m / 2];
        v[j] = keep + shuffle_xor(give, mask);
      }
      return !lower;
    }
  }
};
template <>
struct Product<float> : FloatProduct<8> {};
struct OneSequence {};  // float32 without TF32, too, where there are few sequences
template <>
struct Product<OneSequence> : FloatProduct<1> {};

}  // namespace fusedrnn::cuda
