// The products of the step kernels: a block computes 8 columns (hidden units) of `count` gates for some rows
// (sequences). Its warps share the reduction, so that nothing but registers lies between a weight and its use; their
// sums are then added in warp order. Which warp takes which terms follows from K alone, so neither the batch nor the
// launch changes a bit.
#pragma once

#include "cuda/device_sm90.cuh"

namespace fusedrnn::cuda {

constexpr int product_units = 8, product_warps = 8, product_threads = 32 * product_warps;
constexpr int product_chunk = 32;  // terms that a warp takes at a time, without tensor cores

// Number is T, or Tf32 for a T of float32. Tensor cores multiply what is not float32 or float64 itself.
template <class Number>
constexpr bool on_tensor_cores = !std::is_same_v<Number, float> && !std::is_same_v<Number, double>;

// A row tile is 16 rows; a block has `tiles` of them, as many as its registers hold well.
template <class Number>
constexpr int product_tiles = on_tensor_cores<Number> ? 4 : 2;

// n values from p on of which `left` exist, as one load of 16 bytes where that is allowed. A null p has none.
template <class T, int n>
__device__ __forceinline__ void load_row(T (&to)[n], const T* p, int left) {
  static_assert(n * sizeof(T) == 16, "one load");
  if (p && left >= n && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
    load_16_bytes(to, p);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = p && i < left ? p[i] : narrow<T>(0);
  }
}

template <class Number, class T, int n>
__device__ __forceinline__ Words words(const T (&from)[n]) {
  Words to;
  memcpy(&to, from, sizeof to);
  if constexpr (std::is_same_v<Number, Tf32>)
#pragma unroll
    for (int i = 0; i < 4; ++i) to.w[i] = round_to_tf32(to.w[i]);
  return to;
}

// sum[m][i] += the 16 x 8 products, of factors rounded to Number, of rows 16 m + (0..15) with units 0..7 of gate i,
// over this warp's terms k < K. A thread holds rows g and g + 8 and units 2 t and 2 t + 1 of each, where lane = 4 g +
// t: the layout of mma.m16n8. a(row) and b(gate, unit) point to K values side by side, or are null for zeros; tiles
// from `used` on are left out.
template <class T, class Number, int count, int tiles, class A, class B>
__device__ __forceinline__ void multiply(Accumulate<T> (&sum)[tiles][count][4], A a, B b, int K, int used) {
  const int lane = lane_of_thread(), g = lane / 4, t = lane % 4;
  constexpr int n = 16 / int(sizeof(T));
  const T* rows[tiles][2];
#pragma unroll
  for (int m = 0; m < tiles; ++m) rows[m][0] = a(16 * m + g), rows[m][1] = a(16 * m + g + 8);
  if constexpr (on_tensor_cores<Number>) {
    // The order of the terms within a chunk is ours to choose: thread t takes n t .. n t + n - 1 of 4 n, for two mma.
    const T* units[count];
#pragma unroll
    for (int i = 0; i < count; ++i) units[i] = b(i, g);
    for (int k = (warp_of_thread() * 4 + t) * n; k - n * t < K; k += product_warps * 4 * n) {
      alignas(16) T bv[count][n];
#pragma unroll
      for (int i = 0; i < count; ++i) load_row(bv[i], units[i] ? units[i] + k : nullptr, K - k);
#pragma unroll
      for (int m = 0; m < tiles; ++m) {
        if (m >= used) break;
        alignas(16) T av[2][n];
#pragma unroll
        for (int r = 0; r < 2; ++r) load_row(av[r], rows[m][r] ? rows[m][r] + k : nullptr, K - k);
        const Words low = words<Number>(av[0]), high = words<Number>(av[1]);
#pragma unroll
        for (int i = 0; i < count; ++i) {
          const Words w = words<Number>(bv[i]);
          mma(Number{}, sum[m][i], low.w[0], high.w[0], low.w[1], high.w[1], w.w[0], w.w[1]);
          mma(Number{}, sum[m][i], low.w[2], high.w[2], low.w[3], high.w[3], w.w[2], w.w[3]);
        }
      }
    }
  } else {
    const T* units[count][2];
#pragma unroll
    for (int i = 0; i < count; ++i) units[i][0] = b(i, 2 * t), units[i][1] = b(i, 2 * t + 1);
    for (int chunk = warp_of_thread() * product_chunk; chunk < K; chunk += product_warps * product_chunk)
#pragma unroll 1
      for (int k = chunk; k < chunk + product_chunk && k < K; k += n) {
        alignas(16) T bv[count][2][n];
#pragma unroll
        for (int i = 0; i < count; ++i)
#pragma unroll
          for (int e = 0; e < 2; ++e) load_row(bv[i][e], units[i][e] ? units[i][e] + k : nullptr, K - k);
#pragma unroll
        for (int m = 0; m < tiles; ++m) {
          if (m >= used) break;
          alignas(16) T av[2][n];
#pragma unroll
          for (int r = 0; r < 2; ++r) load_row(av[r], rows[m][r] ? rows[m][r] + k : nullptr, K - k);
#pragma unroll
          for (int l = 0; l < n; ++l)
#pragma unroll
            for (int i = 0; i < count; ++i)
#pragma unroll
              for (int e = 0; e < 4; ++e) sum[m][i][e] = scalar::fma(av[e / 2][l], bv[i][e % 2][l], sum[m][i][e]);
        }
      }
  }
}

// Bytes of shared memory that product() wants.
template <class T, int count>
constexpr size_t product_shared = size_t(product_warps) * count * product_threads * sizeof(Accumulate<T>);

// Calls then(row, unit, sums of the gates) for each of `rows` rows and each of the block's units; for all of the
// block's threads to call. Rows whose a(row) is null get zeros.
template <class T, class Number, int count, class A, class B, class Then>
__device__ __forceinline__ void product(A a, B b, int K, int rows, Then then) {
  constexpr int tiles = product_tiles<Number>,
                pair = 2 * 16 * product_units;  // two tiles have an element for each thread
  static_assert(tiles % 2 == 0 && pair == product_threads, "one element a thread");
  using S = Accumulate<T>;
  S sum[tiles][count][4] = {};
  multiply<T, Number>(sum, a, b, K, (rows + 15) / 16);
  S* shared = shared_memory<S>();  // [warps][count][pair]
  const int lane = lane_of_thread(), warp = warp_of_thread(), thread = int(threadIdx.x);
#pragma unroll
  for (int m = 0; m < tiles; m += 2) {
    if (16 * m >= rows) break;
    if (m > 0) sync_block();
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < count; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = 16 * half + lane / 4 + 8 * (e / 2), unit = 2 * (lane % 4) + e % 2;
          shared[(warp * count + i) * pair + row * product_units + unit] = sum[m + half][i][e];
        }
    sync_block();
    S total[count] = {};
#pragma unroll
    for (int w = 0; w < product_warps; ++w)
#pragma unroll
      for (int i = 0; i < count; ++i) total[i] += shared[(w * count + i) * pair + thread];
    const int row = 16 * m + thread / product_units;
    if (row < rows) then(row, thread % product_units, total);
  }
}

}  // namespace fusedrnn::cuda
