// The products of the step kernels: a block computes 8 columns (hidden units) of `count` gates for some rows
// (sequences). Its warps share the reduction; their sums are then added in warp order. Which warp takes which terms, and in
// which order, follows from K alone, so neither the batch nor the launch nor where an array lies changes a bit.
#pragma once

#include "cuda/device_sm90.cuh"

namespace fusedrnn::cuda {

constexpr int product_units = 8, product_warps = 8, product_threads = 32 * product_warps;
constexpr int product_chunk = 16;  // terms that a warp takes at a time, without tensor cores

// Number is T, or Tf32 for a T of float32. Tensor cores multiply what is not float32 or float64 itself.
template <class Number>
constexpr bool on_tensor_cores = !std::is_same_v<Number, float> && !std::is_same_v<Number, double>;

// A row tile is 16 rows; a block has `tiles` of them, as many as its registers hold well.
template <class Number>
constexpr int product_tiles = on_tensor_cores<Number> ? 4 : 2;

// n values from p on of which `left` exist. A null p has none. `direct`: p is aligned, and n divides what is left.
template <bool direct, class T, int n>
__device__ __forceinline__ void load_row(T (&to)[n], const T* p, int left) {
  static_assert(n * sizeof(T) == 16, "one load");
  if (direct && p && left > 0) {
    load_16_bytes(to, p);
  } else if (direct) {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = narrow<T>(0);
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

// What a thread multiplies at a time: n values of k of each of its rows, a, and of each of its units of every gate, b.
template <class Number, class T, int count, int tiles>
struct Factors {
  static constexpr int n = 16 / int(sizeof(T)), units = on_tensor_cores<Number> ? 1 : 2;
  alignas(16) T a[tiles][2][n], b[count][units][n];
};

// sum += a b. Without tensor cores thread t has units 2 t and 2 t + 1; these want unit g from lane 4 g + t, and the order of
// the terms within their chunk is ours to choose: two mma take n from each of four neighbours.
template <class Number, class T, int count, int tiles>
__device__ __forceinline__ void add_product(Accumulate<T> (&sum)[tiles][count][4], const Factors<Number, T, count, tiles>& f,
                                            int used) {
#pragma unroll
  for (int m = 0; m < tiles; ++m) {
    if (m >= used) break;
    if constexpr (on_tensor_cores<Number>) {
      const Words low = words<Number>(f.a[m][0]), high = words<Number>(f.a[m][1]);
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const Words w = words<Number>(f.b[i][0]);
        mma(Number{}, sum[m][i], low.w[0], high.w[0], low.w[1], high.w[1], w.w[0], w.w[1]);
        mma(Number{}, sum[m][i], low.w[2], high.w[2], low.w[3], high.w[3], w.w[2], w.w[3]);
      }
    } else {
#pragma unroll
      for (int l = 0; l < f.n; ++l)
#pragma unroll
        for (int i = 0; i < count; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[m][i][e] = scalar::fma(f.a[m][e / 2][l], f.b[i][e % 2][l], sum[m][i][e]);
    }
  }
}

// Factors come from global memory: the next ones are on their way while a thread multiplies the last, as many as registers hold.
template <bool direct, class Number, class T, int count, int tiles, int units_of_gate>
__device__ __forceinline__ void multiply_from_global(Accumulate<T> (&sum)[tiles][count][4], const T* const (&rows)[tiles][2],
                                                     const T* const (&units)[count][units_of_gate], int K, int used) {
  using F = Factors<Number, T, count, tiles>;
  constexpr bool tensor = on_tensor_cores<Number>;
  constexpr int n = F::n, chunk = tensor ? 4 * n : product_chunk, turns_of_chunk = tensor ? 1 : product_chunk / n;
  const auto load = [&](F& f, int turn) {
    const int part = tensor ? lane_of_thread() % 4 : turn % turns_of_chunk;
    const int k = (turn / turns_of_chunk * product_warps + warp_of_thread()) * chunk + part * n;
#pragma unroll
    for (int i = 0; i < count; ++i)
#pragma unroll
      for (int e = 0; e < units_of_gate; ++e) load_row<direct>(f.b[i][e], units[i][e] ? units[i][e] + k : nullptr, K - k);
#pragma unroll
    for (int m = 0; m < tiles; ++m) {
      if (m >= used) break;
#pragma unroll
      for (int r = 0; r < 2; ++r) load_row<direct>(f.a[m][r], rows[m][r] ? rows[m][r] + k : nullptr, K - k);
    }
  };
  const int turns = (K + product_warps * chunk - 1) / (product_warps * chunk) * turns_of_chunk;
  // Of 255 registers, 200 for sums and factors leave nothing to spill.
  constexpr int fit = (200 - int(sizeof(sum)) / 4) / int(sizeof(F) / 4), most = tensor ? 4 : 2;
  constexpr int buffers = fit < 2 ? 2 : fit < most ? fit : most, ahead = buffers - 1;
  F f[buffers] = {};
#pragma unroll
  for (int b = 0; b < ahead; ++b)
    if (b < turns) load(f[b], b);
#pragma unroll 1
  for (int turn = 0; turn < turns; turn += buffers)
#pragma unroll
    for (int b = 0; b < buffers; ++b) {
      if (turn + b >= turns) break;
      if (turn + b + ahead < turns) load(f[(b + ahead) % buffers], turn + b + ahead);
      add_product(sum, f[b], used);
    }
}

// float32 without tensor cores, from aligned rows: the factors of a warp's next chunk of k are on their way to shared memory
// while it multiplies the last. From global memory itself, a load of 16 bytes from 8 rows takes the cache 8 cycles.
template <class T, class Number>
constexpr bool staged = std::is_same_v<T, float> && !on_tensor_cores<Number>;
constexpr int staged_bytes = product_chunk * 4;  // of a row
template <int count, int tiles>
constexpr int staged_rows = 16 * tiles + product_units * count;  // of a, then of b

// Where 16 bytes lie: swizzled, so that 8 rows meet in no bank.
FUSEDRNN_HD_INLINE int staged_at(int row, int part) { return row * staged_bytes + (part ^ (row / 2 & 3)) * 16; }

// Row g + 8 r of tile m, and unit g of gate i, as in multiply().
template <int count, int tiles>
__device__ __forceinline__ void multiply_staged(float (&sum)[tiles][count][4], const float* const (&rows)[tiles][2],
                                                const float* const (&units)[count][1], int K, int used) {
  using F = Factors<float, float, count, tiles>;
  constexpr int chunk = staged_bytes / 4, stage = staged_rows<count, tiles> * staged_bytes;
  const int lane = lane_of_thread(), g = lane / 4, t = lane % 4;
  const SharedAddress own = shared_address(shared_memory<unsigned char>()) + unsigned(warp_of_thread() * 2 * stage);
  const auto fetch = [&](int turn) {
    const int k = (turn * product_warps + warp_of_thread()) * chunk + t * F::n;
    const SharedAddress to = own + unsigned(turn % 2 * stage);
    const auto row = [&](int line, const float* p) {
      const SharedAddress at = to + unsigned(staged_at(line, t));
      if (p && k < K)
        copy_async<16>(at, p + k);
      else
        store_shared(at, no_words());
    };
#pragma unroll
    for (int m = 0; m < tiles; ++m)
      if (m < used)
#pragma unroll
        for (int r = 0; r < 2; ++r) row(16 * m + 8 * r + g, rows[m][r]);
#pragma unroll
    for (int i = 0; i < count; ++i) row(16 * tiles + product_units * i + g, units[i][0]);
  };
  const int turns = (K + product_warps * chunk - 1) / (product_warps * chunk);
  fetch(0);
  copy_async_commit();
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    if (turn + 1 < turns) fetch(turn + 1);
    copy_async_commit();
    copy_async_wait<1>();
    sync_warp();
    const SharedAddress from = own + unsigned(turn % 2 * stage);
#pragma unroll
    for (int part = 0; part < staged_bytes / 16; ++part) {
      F f;
      const auto load = [&](float (&to)[F::n], int line) {
        const Words w = load_shared<Words>(from + unsigned(staged_at(line, part)));
        memcpy(to, &w, sizeof to);
      };
#pragma unroll
      for (int i = 0; i < count; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) load(f.b[i][e], 16 * tiles + product_units * i + 2 * t + e);
#pragma unroll
      for (int m = 0; m < tiles; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) load(f.a[m][r], 16 * m + 8 * r + g);
      add_product(sum, f, used);
    }
    sync_warp();
  }
}

// sum[m][i] += the 16 x 8 products, of factors rounded to Number, of rows 16 m + (0..15) with units 0..7 of gate i,
// over this warp's terms k < K. A thread holds rows g and g + 8 and units 2 t and 2 t + 1 of each, where lane = 4 g +
// t: the layout of mma.m16n8. a(row) and b(gate, unit) point to K values side by side, or are null for zeros; tiles
// from `used` on are left out.
template <class T, class Number, int count, int tiles, class A, class B>
__device__ __forceinline__ void multiply(Accumulate<T> (&sum)[tiles][count][4], A a, B b, int K, int used) {
  using F = Factors<Number, T, count, tiles>;
  const int lane = lane_of_thread(), g = lane / 4, t = lane % 4;
  const T *rows[tiles][2], *units[count][1];
#pragma unroll
  for (int m = 0; m < tiles; ++m) rows[m][0] = a(16 * m + g), rows[m][1] = a(16 * m + g + 8);
#pragma unroll
  for (int i = 0; i < count; ++i) units[i][0] = b(i, g);
  // For the whole warp, since its lanes multiply together.
  unsigned misaligned = unsigned(K % F::n);
#pragma unroll
  for (int m = 0; m < tiles; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) misaligned |= unsigned(reinterpret_cast<uintptr_t>(rows[m][r]) % 16);
#pragma unroll
  for (int i = 0; i < count; ++i) misaligned |= unsigned(reinterpret_cast<uintptr_t>(units[i][0]) % 16);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) misaligned |= shuffle_xor(misaligned, mask);
  if constexpr (on_tensor_cores<Number>) {
    if (misaligned == 0)
      multiply_from_global<true, Number>(sum, rows, units, K, used);
    else
      multiply_from_global<false, Number>(sum, rows, units, K, used);
  } else {
    if constexpr (staged<T, Number>)
      if (misaligned == 0) return multiply_staged(sum, rows, units, K, used);
    const T* pairs[count][2];
#pragma unroll
    for (int i = 0; i < count; ++i) pairs[i][0] = b(i, 2 * t), pairs[i][1] = b(i, 2 * t + 1);
    multiply_from_global<false, Number>(sum, rows, pairs, K, used);
  }
}

// Bytes of shared memory that product() wants.
template <class T, class Number, int count>
constexpr size_t product_shared = [] {
  const size_t sums = size_t(product_warps) * count * product_threads * sizeof(Accumulate<T>);
  const size_t factors =
      staged<T, Number> ? size_t(product_warps) * 2 * staged_rows<count, product_tiles<Number>> * staged_bytes : 0;
  return sums > factors ? sums : factors;
}();

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
  if (staged<T, Number>) sync_block();  // the sums come where the factors were
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
