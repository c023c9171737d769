// The one microkernel (`multiply`), its two kinds of tiles, and the packing of what it multiplies. Compiled once per ISA, in
// that ISA's namespace.
//
// A tile is C[r][n] = Cin[r][n] + sum over k, in ascending order, of A[r][k] B[k][n]: MR rows of A against a few vectors
// of B, all of C in registers. Each element is one chain of fma, so its bits do not depend on how a product is cut into
// tiles: every choice of rows, of vectors and of threads gives the same result.
//
// B is a panel: blocks of vectors (for a forward product the gates of one vector of hidden units), each block
// [parts][K][NG * lanes], the parts at even distances; a tile takes a part of NB neighbouring blocks.
//
// Parts: a block too wide for the registers is done in two halves. An LSTM's has 4 vectors. 12 accumulators (AVX2) hold
// 3 rows of it, or better 6 rows of 2 vectors, twice: 2 parts of 2. 24 (AVX-512) hold 6 rows of 4: 1 part of 4.
#pragma once

#include <utility>

#include "args.h"
#include "cpu/simd.h"

namespace fusedrnn::FUSEDRNN_TARGET {

// How the rows of A lie in memory:
//
//   rows      each contiguous
//   segments  each in pieces of k elements, a_segment apart: the slots' gradients in backward, one piece per block of H
//   columns   they are neighbouring columns of another matrix, whose rows are a_stride apart. One pointer stands for all:
//             eight would leave too few registers to the inner loop
enum class Layout { rows, segments, columns };

template <class T>
struct Tile {
  const T* a[8];                   // MR rows: element k of segment s at a[r][s * a_segment + k]; of columns at
                                   // a[0][r + k * a_stride]
  const T* cin[8];                 // MR rows of NB blocks
  T* cout[8];                      // may be the rows of cin
  int64_t k, segments;             // K = k * segments; segments is 1 in the other layouts
  ptrdiff_t a_stride = 0, a_segment = 0;
  const T* b;                      // [NB blocks][parts][K][NG * lanes]
  ptrdiff_t b_block;               // from block to block
  ptrdiff_t cin_block, cout_block;
  const T* prefetch_from;          // one vector per k is prefetched from here on: see next_panel_share; null for none
  ptrdiff_t prefetch_segment = 0;  // from one segment's to the next one's
  int part;                        // of the blocks: the one to do
};

#if FUSEDRNN_ISA_ID == FUSEDRNN_ISA_avx512 || FUSEDRNN_ISA_ID == FUSEDRNN_ISA_neon
constexpr int tile_accumulators = 24;  // of 32 registers
#else
constexpr int tile_accumulators = 12;  // of 16 registers
#endif
constexpr int tile_rows = 6, tile_vectors = tile_accumulators / tile_rows;  // of the tile of most products
constexpr int tile_max_vectors = 8;

// How many of a block's vectors a tile takes: all, or half where that gives it tile_rows rows.
constexpr int tile_part(int vectors) { return vectors == 2 * tile_vectors ? tile_vectors : vectors; }
constexpr int tile_parts(int vectors) { return vectors / tile_part(vectors); }

constexpr int tile_max_rows(int vectors) { return tile_accumulators / vectors < 8 ? tile_accumulators / vectors : 8; }

// acc += A B for one k: element `offset` of each row.
template <class T, int MR, int NG, int NB, int width, int first, Layout layout>
FUSEDRNN_INLINE void multiply_depth(Vec<T> (&acc)[MR][NB * width], const T* const (&a)[MR], ptrdiff_t offset, const T* b,
                                    ptrdiff_t b_block) {
  using V = Vec<T>;
  constexpr int NV = NG * NB;
  const auto element = [&](int r) { return V::broadcast((layout == Layout::columns ? a[0] + r : a[r]) + offset); };
  const auto sum = [&](int r, int v) -> V& { return acc[r][v / NG * width + first + v % NG]; };
  // Whichever of the two is fewer stays in registers; the other is read where it is used.
  if constexpr (MR < NV) {
    V x[MR];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) x[r] = element(r);
#pragma GCC unroll 12
    for (int v = 0; v < NV; ++v) {
      V w = V::load(b + v / NG * b_block + v % NG * V::lanes);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) sum(r, v) = fma(x[r], w, sum(r, v));
    }
  } else {
    V w[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) w[v] = V::load(b + v / NG * b_block + v % NG * V::lanes);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      V x = element(r);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum(r, v) = fma(x, w[v], sum(r, v));
    }
  }
}

// acc += A B over k elements of each row from `offset` on (of columns `stride` apart): MR rows by NB blocks of NG vectors. A
// block has `width` vectors in acc, of which those of the product are number `first` and the next. If it `prefetches`, then
// k vectors from `prefetch_from` on.
template <class T, int MR, int NG, int NB, bool prefetches, int width = NG, int first = 0, Layout layout = Layout::rows>
FUSEDRNN_INLINE void multiply(Vec<T> (&acc)[MR][NB * width], const T* const (&a)[MR], ptrdiff_t offset, ptrdiff_t stride,
                              int64_t k, const T* b, ptrdiff_t b_block, const T* prefetch_from) {
  // Segments are short: with half the iterations the branch predictor gets the loop's exit right.
  constexpr int unrolled = layout == Layout::segments ? 2 : 1;
  static_assert(Vec<T>::lanes % unrolled == 0);
  for (; k > 0; k -= unrolled)
#pragma GCC unroll 2
    for (int i = 0; i < unrolled; ++i) {
      if constexpr (prefetches) __builtin_prefetch(prefetch_from, 0, 2), prefetch_from += Vec<T>::lanes;
      multiply_depth<T, MR, NG, NB, width, first, layout>(acc, a, offset, b, b_block);
      b += NG * Vec<T>::lanes;
      offset += layout == Layout::columns ? stride : 1;
    }
}

template <class T, int MR, int NG, int NB, int parts, bool prefetches, Layout layout>
void tile_kernel(const Tile<T>& t) {
  using V = Vec<T>;
  constexpr int NV = NG * NB;
  const T* const b = t.b + t.part * (t.b_block / parts);
  const T* const prefetch_from = prefetches ? t.prefetch_from + t.part * t.segments * t.k * V::lanes : nullptr;
  const ptrdiff_t first = t.part * NG * V::lanes;
  V acc[MR][NV];
  const T* a[MR];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    a[r] = t.a[layout == Layout::columns ? 0 : r];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[r][v] = V::load(t.cin[r] + first + v / NG * t.cin_block + v % NG * V::lanes);
  }
  const int64_t segments = layout == Layout::segments ? t.segments : 1;
  for (int64_t s = 0; s < segments; ++s)
    multiply<T, MR, NG, NB, prefetches, NG, 0, layout>(acc, a, s * t.a_segment, t.a_stride, t.k, b + s * t.k * NG * V::lanes,
                                                       t.b_block,
                                                       prefetches ? prefetch_from + s * t.prefetch_segment : nullptr);
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[r][v].store(t.cout[r] + first + v / NG * t.cout_block + v % NG * V::lanes);
}

// A step's two products in one tile, in registers from the bias to the second: C[r][block] = bias + x W_ih + h W_hh. A
// block has all of the cell's slots in C, of which a product feeds some.
template <class T>
struct StepTile {
  const Place<T>* row;          // MR rows, whose x and h it reads
  T* out;                       // MR rows of NB blocks, neighbours
  ptrdiff_t out_row;            // from row to row
  const T *bias, *w_ih, *w_hh;  // of the first block
  int64_t I, H;
  ptrdiff_t ih_block, hh_block;
  const T *ih_prefetch_from, *hh_prefetch_from;  // as Tile's; if the second is null, neither counts
  int part;                     // of the blocks: the one to do
};

// The slots of a cell as a step's products feed them: cells that agree in these share kernels.
template <int all, int input_first, int input_count, int recurrent_first, int recurrent_count>
struct FedSlots {
  static constexpr int slots = all;
  static constexpr Span input = {input_first, input_count}, recurrent = {recurrent_first, recurrent_count};
};
template <class Cell>
using FedSlotsOf =
    FedSlots<Cell::slots, Cell::input.first, Cell::input.count, Cell::recurrent[0].first, Cell::recurrent[0].count>;

template <class T, class Fed, int MR, int NB, bool prefetches>
void step_kernel(const StepTile<T>& t) {
  static_assert(Fed::input.count >= Fed::recurrent.count);  // so that where the second product prefetches, the first does
  using V = Vec<T>;
  constexpr Span input = Fed::input, span = Fed::recurrent;
  constexpr int part = tile_part(Fed::slots), parts = tile_parts(Fed::slots), NV = part * NB;
  static_assert(parts == 1 || (input.count == Fed::slots && span.count == Fed::slots));
  const ptrdiff_t first = t.part * part * V::lanes;
  V acc[MR][NV];
  const T *x[MR], *h[MR];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    x[r] = t.row[r].x, h[r] = t.row[r].h;
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[r][v] = V::load(t.bias + first + (v / part * Fed::slots + v % part) * V::lanes);
  }
  multiply<T, MR, input.count / parts, NB, prefetches, part, input.first>(
      acc, x, 0, 0, t.I, t.w_ih + t.part * (t.ih_block / parts), t.ih_block,
      prefetches ? t.ih_prefetch_from + t.part * t.I * V::lanes : nullptr);
  multiply<T, MR, span.count / parts, NB, prefetches, part, span.first>(
      acc, h, 0, 0, t.H, t.w_hh + t.part * (t.hh_block / parts), t.hh_block,
      prefetches ? t.hh_prefetch_from + t.part * t.H * V::lanes : nullptr);
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[r][v].store(t.out + r * t.out_row + first + (v / part * Fed::slots + v % part) * V::lanes);
}

// Whether a tile is no wider than most are: wide ones are for few rows only.
constexpr bool is_regular_tile(int vectors, int blocks) { return blocks == 1 || vectors * blocks <= tile_vectors; }
constexpr int outer_tile_vectors = 3;  // then the rows of a tile of columns divide the lanes of a vector

// The two families of kernels: what they are given, how many vectors a tile takes of a block and in how many parts, and the
// one for MR rows, NB blocks. Those that prefetch, which take 1 to 2 % longer where all is near, are made for the tiles of
// many rows only.
template <class T, int NG, bool prefetches, Layout layout = Layout::rows>
struct Products {
  using Args = Tile<T>;
  static constexpr int vectors = tile_part(NG), parts = tile_parts(NG);
  static constexpr int max_blocks = layout == Layout::columns ? outer_tile_vectors : tile_max_vectors / vectors;
  template <int MR, int NB>
  static constexpr auto kernel() {
    constexpr bool prefetching = prefetches && (layout == Layout::columns || is_regular_tile(vectors, NB)) && MR > 1;
    return tile_kernel<T, MR, vectors, NB, parts, prefetching, layout>;
  }
};
template <class T, class Fed, bool prefetches>
struct Steps {
  using Args = StepTile<T>;
  static constexpr int vectors = tile_part(Fed::slots), parts = tile_parts(Fed::slots), max_blocks = tile_max_vectors / vectors;
  template <int MR, int NB>
  static constexpr auto kernel() {
    constexpr bool prefetching = prefetches && is_regular_tile(vectors, NB) && MR > 1;
    return step_kernel<T, Fed, MR, NB, prefetching>;
  }
};

template <class Family>
struct TileTable {
  using Kernel = void (*)(const typename Family::Args&);
  Kernel kernel[Family::max_blocks + 1][9];
  constexpr TileTable() : kernel{} { fill<1>(); }

 private:
  template <int NB>
  constexpr void fill() {
    fill_rows<NB, 1>();
    if constexpr (NB < Family::max_blocks) fill<NB + 1>();
  }
  template <int NB, int MR>
  constexpr void fill_rows() {
    kernel[NB][MR] = Family::template kernel<MR, NB>();
    if constexpr (MR < tile_max_rows(Family::vectors * NB)) fill_rows<NB, MR + 1>();
  }
};

template <class Family>
FUSEDRNN_INLINE void run_tile(int rows, int blocks, typename Family::Args& t) {
  static constexpr TileTable<Family> table;
  for (t.part = 0; t.part < Family::parts; ++t.part) table.kernel[blocks][rows](t);
}

// By a kernel that prefetches, where there is something to prefetch.
template <int NG, Layout layout = Layout::rows, class T>
FUSEDRNN_INLINE void run_products(int n, int blocks, Tile<T>& t) {
  t.prefetch_from ? run_tile<Products<T, NG, true, layout>>(n, blocks, t)
                  : run_tile<Products<T, NG, false, layout>>(n, blocks, t);
}
template <class Cell, class T>
FUSEDRNN_INLINE void run_steps(int n, int blocks, StepTile<T>& t) {
  using Fed = FedSlotsOf<Cell>;
  t.hh_prefetch_from ? run_tile<Steps<T, Fed, true>>(n, blocks, t) : run_tile<Steps<T, Fed, false>>(n, blocks, t);
}

// Software prefetch of the next panel, for panels that come from beyond the second cache level: while the row tiles pass
// over panel g, tile i prefetches the i-th share of panel g + 1, one vector per k (and part). Where that share begins, when
// the next panel is `blocks` blocks of K times NG vectors from `next` on; null when the tiles before have covered it.
template <class T, int NG>
FUSEDRNN_INLINE const T* next_panel_share(const T* next, ptrdiff_t b_block, int64_t K, int64_t blocks, int64_t i) {
  const int64_t share = i * tile_parts(NG);
  return share < blocks * NG ? next + share / NG * b_block + share % NG * K * Vec<T>::lanes : nullptr;
}

struct Range {
  int64_t begin, end;
  FUSEDRNN_INLINE int64_t size() const { return end - begin; }
};

// How a range is cut into `pieces` parts that differ by at most one.
struct Cut {
  int64_t n, pieces;
  FUSEDRNN_INLINE int64_t begin(int64_t i) const { return i * n / pieces; }
  // Past the end: the last one.
  FUSEDRNN_INLINE Range piece(int64_t i) const {
    i = i < pieces ? i : pieces - 1;
    return {begin(i), begin(i + 1)};
  }
};

// The tiles of a product of `rows` rows and `blocks` blocks of `width` vectors: even pieces, none smaller than need be.
struct Tiling {
  Cut row, block;
  FUSEDRNN_INLINE Tiling(int64_t rows, int64_t blocks, int width) {
    // tile_vectors a tile, or eight when the rows are too few to hide the latency of fma with those.
    const int NG = tile_part(width), base = NG < tile_vectors ? tile_vectors / NG : 1, wide = tile_max_vectors / NG;
    int64_t nb = rows <= tile_max_rows(NG * wide) ? wide : base;
    row = {rows, ceil_div(rows, tile_max_rows(NG * int(nb)))};
    block = {blocks, ceil_div(blocks, nb)};
  }
};

// Transposes the L x L matrix whose rows are v: each stage swaps the off-diagonal blocks of a size.
template <class T, int size, int... j>
FUSEDRNN_INLINE void swap_blocks(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, j...>) {
  constexpr int L = Vec<T>::lanes;
  const auto low = a.r, high = b.r;
  a.r = __builtin_shufflevector(low, high, (j / size % 2 == 0 ? j : L + j - size)...);
  b.r = __builtin_shufflevector(low, high, (j / size % 2 == 0 ? j + size : L + j)...);
}

template <class T, int size = Vec<T>::lanes / 2>
FUSEDRNN_INLINE void transpose(Vec<T>* v) {
  constexpr int L = Vec<T>::lanes;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    if (i / size % 2 == 0) swap_blocks<T, size>(v[i], v[i + size], std::make_integer_sequence<int, L>{});
  if constexpr (size > 1) transpose<T, size / 2>(v);
}

// Packs a forward panel. w is (gates*H, K) row-major; out is [blocks of H][parts][K][count / parts * lanes], blocks `stride`
// apart: lane l of slot s of block b at depth k is w[gate(s) * H + b * lanes + l][k], or 0 past H.
template <class T>
void pack_gates(const T* w, int64_t H, int64_t K, const int* gate, int count, int64_t b0, int64_t b1, T* out, int64_t stride) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  const int part = tile_part(count), parts = tile_parts(count);
  for (int64_t b = b0; b < b1; ++b) {
    const int rows = int(H - b * L < L ? H - b * L : L);
    for (int64_t k = 0; k < K; k += L) {
      const int depth = int(K - k < L ? K - k : L);
      for (int s = 0; s < count; ++s) {
        const T* src = w + (gate[s] * H + b * L) * K + k;
        T* dst = out + b * stride + s / part * (stride / parts) + (k * part + s % part) * L;
        V v[L];
        if (rows == L && depth == L) {
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) v[l] = V::load(src + l * K);
          transpose<T>(v);
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) v[l].store(dst + l * part * L);
        } else {
          for (int l = 0; l < L; ++l) v[l] = l < rows ? V::load(src + l * K, depth) : V(T(0));
          transpose<T>(v);
          for (int l = 0; l < depth; ++l) v[l].store(dst + l * part * L);
        }
      }
    }
  }
}

// Packs a transposed panel, for products with the gates' gradients. w is (gates*H, N) row-major; out is [blocks of N]
// [K][lanes] with K = (blocks of H, slots, lanes), the order in which the gradients lie; rows past H and columns past N are
// 0. This is block b of H in blocks [n0, n1) of N.
template <class T>
void pack_transposed(const T* w, int64_t H, int64_t N, const int* gate, int count, int64_t b, int64_t n0, int64_t n1, T* out,
                     int64_t stride) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  const int rows = int(H - b * L < L ? H - b * L : L);
  for (int64_t n = n0; n < n1; ++n) {
    const int width = int(N - n * L < L ? N - n * L : L);
    for (int s = 0; s < count; ++s) {
      const T* from = w + (gate[s] * H + b * L) * N + n * L;
      T* to = out + n * stride + (b * count + s) * L * L;
      for (int u = 0; u < L; ++u) {
        V v = u >= rows ? V(T(0)) : width == L ? V::load(from + u * N) : V::load(from + u * N, width);
        v.store(to + u * L);
      }
    }
  }
}

}  // namespace fusedrnn::FUSEDRNN_TARGET
