// What a warp of the persistent kernel multiplies: on tensor cores, or on float units.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/persistent.h"

namespace fusedrnn::cuda {

// An operand is [v: 16 bytes of k][column][16 bytes]: the column in which sequence n has its v-th 16 bytes. Swizzled, so that
// eight lanes that load from four neighbours in k and from two sequences meet in no bank.
FUSEDRNN_HD_INLINE int swizzled(int sequence, int v, int places) {
  return places >= 8 ? (sequence + 2 * v) & 7 : places == 4 ? (sequence + v) & 3 : 0;
}

// The words of a tile's two halves as tensor cores take them: what one product takes, a pair of k of each, is side by side.
__device__ __forceinline__ void pair_halves(Words& low, Words& high) {
  const Words l = low, h = high;
  low = {{l.w[0], h.w[0], l.w[1], h.w[1]}}, high = {{l.w[2], h.w[2], l.w[3], h.w[3]}};
}

// The products of `tiles` times 16 rows and 8 sequences that one warp sums, of factors of type Number. In a chunk of k,
// lane (g, q) = (lane / 4, lane % 4) has the q-th 16 bytes of each half tile's row g of the weights and, on tensor cores,
// of sequence g of the operand. The unit wants other places of k in a lane, but the order of a sum's terms is ours.
template <class Number, int tiles>
struct Product {
  static constexpr int buffers = 3;  // chunks whose operand is in registers or on its way there
  using Operand = Words;
  float d[tiles][2][4] = {};  // two chains of sums for each tile: one alone would wait for itself

  // at: the q-th 16 bytes of the first sequence; swizzle: from there to sequence g, below 0 where there is none.
  static __device__ __forceinline__ void load(Operand& b, SharedAddress at, int swizzle, int) {
    load_shared_if(swizzle >= 0, at + unsigned(swizzle), b);
  }
  // weights(x): of half tile x, or of the x % 2-th pair of k of both halves
  template <class Weights>
  __device__ __forceinline__ void add(Weights weights, const Operand& b) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair)
#pragma unroll
      for (int m = 0; m < tiles; ++m) {
        const Words& a = weights(2 * m + pair);
        mma(Number(), d[m][pair], a.w[0], a.w[1], a.w[2], a.w[3], b.w[2 * pair], b.w[2 * pair + 1]);
      }
  }
  __device__ __forceinline__ void finish(int) {}
  // The sum of half tile x's row g and sequence 2 q + e.
  __device__ __forceinline__ float at(int x, int e) const { return d[x / 2][0][x % 2 * 2 + e] + d[x / 2][1][x % 2 * 2 + e]; }
};

// float32 without TF32: lanes have the weights of the tensor cores' way, but each meets all sequences, and four lanes add
// what they found.
template <int tiles>
struct Product<float, tiles> {
  static constexpr int buffers = 1;
  struct Operand {
    Words of[8];
  };
  float d[2 * tiles][8] = {};

  static __device__ __forceinline__ void load(Operand& b, SharedAddress at, int, int q) {
#pragma unroll
    for (int n = 0; n < 8; ++n) b.of[n] = load_shared<Words>(at + unsigned(swizzled(n, q, 8) * 16));
  }
  template <class Weights>
  __device__ __forceinline__ void add(Weights weights, const Operand& b) {
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int x = 0; x < 2 * tiles; ++x) d[x][n] = fmaf(as_float(weights(x).w[i]), as_float(b.of[n].w[i]), d[x][n]);
  }
  // Twice, two lanes halve what they hold: one keeps the lower sequences, one the upper. A sum is (q0 + q2) + (q1 + q3).
  __device__ __forceinline__ void finish(int q) {
#pragma unroll
    for (int x = 0; x < 2 * tiles; ++x) {
      halve<4>(d[x], q < 2, 2);
      halve<2>(d[x], q % 2 == 0, 1);
    }
  }
  template <int half>
  static __device__ __forceinline__ void halve(float (&v)[8], bool lower, int mask) {
#pragma unroll
    for (int n = 0; n < half; ++n) {
      const float give = pick(lower, v[n + half], v[n]), keep = pick(lower, v[n], v[n + half]);
      v[n] = keep + shuffle_xor(give, mask);
    }
  }
  __device__ __forceinline__ float at(int x, int e) const { return d[x][e]; }
};

// Likewise, of a single sequence.
struct OneSequence {};
template <int tiles>
struct Product<OneSequence, tiles> {
  static constexpr int buffers = 4;
  using Operand = Words;
  float d[2 * tiles] = {};

  static __device__ __forceinline__ void load(Operand& b, SharedAddress at, int, int) { b = load_shared<Words>(at); }
  template <class Weights>
  __device__ __forceinline__ void add(Weights weights, const Operand& b) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int x = 0; x < 2 * tiles; ++x) d[x] = fmaf(as_float(weights(x).w[i]), as_float(b.w[i]), d[x]);
  }
  __device__ __forceinline__ void finish(int) {
#pragma unroll
    for (int x = 0; x < 2 * tiles; ++x) {
      d[x] += shuffle_xor(d[x], 2);
      d[x] += shuffle_xor(d[x], 1);
    }
  }
  __device__ __forceinline__ float at(int x, int) const { return d[x]; }
};

}  // namespace fusedrnn::cuda
