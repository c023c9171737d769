// What the blocks do that project a layer's input: see projection.h.
#pragma once

#include "cuda/product.cuh"
#include "cuda/projection.h"

namespace fusedrnn::cuda {

// The packed row that is the n-th in the order of steps, or another one of the same step.
template <class T>
__device__ __forceinline__ int64_t projected_row(const ForwardArgs<T>& f, int n) {
  return f.schedule.backward_in_time ? f.schedule.steps * f.schedule.batch - 1 - n : n;
}

// Warps (w % 2, w / 2) have 32 rows by 8 units of all slots each. Rows of x and of W_ih come to shared memory 64 bytes at a
// time, which lane (g, q) takes 16 of: the order of a sum's terms is ours. So is that of the units: line c of 8 is unit
// c / 2 + c % 2 * 4, and four lanes store to neighbours.
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

  const T* from[copies];
  int end[copies];  // of k; 0 where there is no such row
  const auto fetch = [&](int turn) {
    const int k = turn * 4 * F::n + piece * F::n;
    const SharedAddress to = stage(turn) + unsigned(line * chunk_bytes + piece * 16);
#pragma unroll
    for (int c = 0; c < copies; ++c)
      if ((lines % lines_at_once == 0 || c * lines_at_once + line < lines) && turn < turns)
        copy_async_or_zeros(to + unsigned(c * lines_at_once * chunk_bytes), from[c] + k, k < end[c]);
    copy_async_commit();
  };
  const auto begin = [&](int i) {  // tile i / parts, part i % parts
    const int row = i / parts * projected_rows + line, first_unit = i % parts * projected_units;
    from[0] = p.x + projected_row(f, row < rows ? row : 0) * p.I, end[0] = row < rows ? p.I : 0;
#pragma unroll
    for (int c = 1; c < copies; ++c) {
      const int n = (c - 1) * lines_at_once + line, slot = n / projected_units;
      const int unit = first_unit + n % projected_units / 8 * 8 + n % 8 / 2 + n % 2 * 4;
      const bool there = slot < count && unit < f.H;
      const int64_t w_row = there ? int64_t(gate_of_slot<Cell>(Cell::input.first + slot)) * f.H + unit : 0;
      from[c] = p.w_ih + w_row * p.I, end[c] = there ? p.I : 0;
    }
#pragma unroll
    for (int turn = 0; turn < projection_stages - 1; ++turn) fetch(turn);
  };

  int i = int(blockIdx.x);
  if (i < total) begin(i);
#pragma unroll 1
  while (i < total) {
    float sum[tiles][count][4] = {};
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
    const int tile = i / parts, first_unit = i % parts * projected_units + warp / 2 * 8 + q;
#pragma unroll
    for (int m = 0; m < tiles; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = tile * projected_rows + warp % 2 * 32 + 16 * m + e / 2 * 8 + g, unit = first_unit + e % 2 * 4;
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
    sync_block();  // all have stored, and nobody reads the factors any more
    i += p.blocks;
    if (i < total) begin(i);  // before the count is raised, whose fence takes long
    if (threadIdx.x == 0) raise_count(p.done + tile);
  }
}

// Of how many steps the input is there, as far as a block sees that has used up those before step s: at least of `wanted`, for
// which it waits. Each lane reads one tile's count.
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
