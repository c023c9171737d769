// What the blocks do that project a layer's input: see projection.h.
#pragma once

#include "cuda/product.cuh"
#include "cuda/projection.h"

namespace fusedrnn::cuda {

// Row n of the input, in the order of steps.
template <class T>
__device__ __forceinline__ int64_t projected_row(const ForwardArgs<T>& f, int n) {
  return f.schedule.row(n / f.schedule.batch, n % f.schedule.batch);
}

// Warps (w % 2, w / 2) have 32 rows by 8 units of all slots each. Rows of x and of W_ih come to shared memory 64 bytes at a
// time, which lane (g, q) takes 16 of: the order of a sum's terms is ours.
template <class T, class Cell>
__device__ __forceinline__ void project_input(const ForwardArgs<T>& f) {
  constexpr int count = Cell::input.count, tiles = 2, lines = projection_lines(count);
  constexpr int lines_at_once = persistent_threads / 4, copies = (lines + lines_at_once - 1) / lines_at_once;
  static_assert(lines_at_once == projected_rows, "a thread's first copy is of x, the others are of W_ih");
  using F = Factors<T, T, count, tiles>;
  const Projection<T>& p = f.projection;
  const int rows = f.schedule.steps * f.schedule.batch, parts = int(projection_parts(f.H));
  const int total = int(projection_tiles(rows)) * parts, turns = (p.I + 4 * F::n - 1) / (4 * F::n);
  const int lane = lane_of_thread(), warp = warp_of_thread(), g = lane / 4, q = lane % 4;
  const int line = int(threadIdx.x) / 4, piece = int(threadIdx.x) % 4;  // that it copies
  const SharedAddress shared = shared_address(shared_memory<unsigned char>());
  const auto stage = [&](int turn) { return shared + unsigned(turn % projection_stages * lines * chunk_bytes); };
#pragma unroll 1
  for (int i = int(blockIdx.x); i < total; i += p.blocks) {
    const int first_row = i / parts * projected_rows, first_unit = i % parts * projected_units;
    const T* from[copies];
    from[0] = first_row + line < rows ? p.x + projected_row(f, first_row + line) * p.I : nullptr;
#pragma unroll
    for (int c = 1; c < copies; ++c) {
      const int n = (c - 1) * lines_at_once + line, slot = n / projected_units, unit = first_unit + n % projected_units;
      from[c] = slot < count && unit < f.H ? p.w_ih + (int64_t(gate_of_slot<Cell>(Cell::input.first + slot)) * f.H + unit) * p.I
                                           : nullptr;
    }
    const auto fetch = [&](int turn) {
      const int k = turn * 4 * F::n + piece * F::n;
#pragma unroll
      for (int c = 0; c < copies; ++c) {
        if (c * lines_at_once + line >= lines || turn >= turns) continue;
        const SharedAddress to = stage(turn) + unsigned((c * lines_at_once + line) * chunk_bytes + piece * 16);
        if (from[c] && k < p.I)
          copy_async<16>(to, from[c] + k);
        else
          store_shared(to, no_words());
      }
      copy_async_commit();
    };
    float sum[tiles][count][4] = {};
#pragma unroll
    for (int turn = 0; turn < projection_stages - 1; ++turn) fetch(turn);
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
      copy_async_wait<projection_stages - 2>();
      sync_block();  // this turn's is there, and nobody reads the last one's any more
      fetch(turn + projection_stages - 1);
      const SharedAddress at = stage(turn) + unsigned(q * 16);
      F factors;
      const auto load = [&](T(&to)[F::n], int n) {
        const Words w = load_shared<Words>(at + unsigned(n * chunk_bytes));
        memcpy(to, &w, sizeof to);
      };
#pragma unroll
      for (int m = 0; m < tiles; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) load(factors.a[m][r], warp % 2 * 32 + 16 * m + 8 * r + g);
#pragma unroll
      for (int s = 0; s < count; ++s) load(factors.b[s][0], projected_rows + s * projected_units + warp / 2 * 8 + g);
      add_product(sum, factors, tiles);
    }
#pragma unroll
    for (int m = 0; m < tiles; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = first_row + warp % 2 * 32 + 16 * m + e / 2 * 8 + g, unit = first_unit + warp / 2 * 8 + 2 * q + e % 2;
        if (row >= rows || unit >= f.H) continue;
        float* to = f.input + (projected_row(f, row) * f.H + unit) * count;
        float out[count];
#pragma unroll
        for (int s = 0; s < count; ++s) out[s] = sum[m][s][e];
        if constexpr (count == 4) {
          Words at_once;
          memcpy(&at_once, out, sizeof at_once);
          *reinterpret_cast<Words*>(to) = at_once;
        } else {
#pragma unroll
          for (int s = 0; s < count; ++s) to[s] = out[s];
        }
      }
    sync_block();
    if (threadIdx.x == 0) raise_count(p.done + i / parts);
  }
}

// How many steps' input is there, of those that a block sees from step s on, whose own input it has used up: at least `wanted`
// steps in all, for which it waits.
template <class T>
__device__ __forceinline__ int projected_steps(const ForwardArgs<T>& f, int s, int wanted) {
  const int batch = f.schedule.batch, tiles = int(projection_tiles(f.schedule.steps * batch));
  const int first = s * batch / projected_rows;
  for (;;) {
    const int tile = first + lane_of_thread();
    const bool there = tile < tiles && load_count(f.projection.done + tile) == unsigned(projection_parts(f.H));
    const int ready = first + leading_lanes(there), steps = ready == tiles ? f.schedule.steps : ready * projected_rows / batch;
    if (steps >= wanted) return steps;
    poll_pause();
  }
}

}  // namespace fusedrnn::cuda
