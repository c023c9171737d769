// The weights of one product of the persistent kernel: which of them a lane has, and how they come into registers and shared
// memory, once for a launch.
#pragma once

#include "cuda/persistent_product.cuh"
#include "cuda/product.cuh"

namespace fusedrnn::cuda {

// Those of stage q. Word x of each chunk of k is 16 bytes of a row, which is a slot of a unit.
template <class T, class Cell, bool backward, int q, bool wide>
struct StageWeights {
  static constexpr int results = backward ? 1 : Cell::recurrent[q].count, slots = backward ? Cell::recurrent[q].count : 1;
  static constexpr int groups = groups_of(results, wide), words = 2 * tiles_of(results, wide);  // words: of a chunk
  static constexpr int vector = 16 / int(sizeof(T));

  const PersistentPlan& plan;
  const SharedAddress shared;
  const int H, first_unit;             // first_unit: of the block
  const int lane, warp, g, quarter;    // lane = 4 g + quarter
  const int groups_there, chunks_there;  // of the warp: see Persistent::Part

  // Those that registers have no room for lie by chunk, warp, word and lane: bytes to the next word, and to the next chunk.
  static constexpr int spilled_word = 32 * 16;
  __device__ __forceinline__ int spilled_chunk() const {
    return plan.stage[q].row_warps * plan.stage[q].depth_warps * words * spilled_word;
  }
  __device__ __forceinline__ SharedAddress first_spilled() const {
    return shared + unsigned(plan.stage[q].weights + warp * words * spilled_word + lane * 16);
  }

  // w: W_hh, of backward transposed, stage by stage. held: of the first chunks; the others' are spilled.
  template <int all>
  __device__ __forceinline__ void load(const T* w, Words (&held)[all]) const {
    if (H % vector == 0 && uint64_t(w) % 16 == 0) {
      spill_aligned<all / words>(w);
      hold_aligned(w, held);
      copy_async_wait<0>();
      arrange_spilled<all / words>();
    } else {
      load_unaligned(w, held);
    }
  }

 private:
  // Where the row lies; below 0 where this block has no such unit.
  __device__ __forceinline__ int row(int x) const {
    const int unit = (warp % plan.stage[q].row_warps * groups + x % groups) * lane_units + g, u = first_unit + unit;
    if (groups_there == 0 || unit >= plan.units || u >= H) return -1;
    if (backward) return u * slots * H;
    return (gate_of_slot<Cell>(Cell::recurrent[q].first + x / groups) * H + u) * H;
  }
  // And in a row chunk i: slot * H + unit, since an operand has 16 bytes of units of each slot in turns. Below 0: there is none.
  __device__ __forceinline__ int place(int i) const {
    const Stage& s = plan.stage[q];
    const int v = (warp / s.row_warps * s.warp_chunks + i) * 4 + quarter, unit = v / slots * vector;
    return i < chunks_there && unit < H ? v % slots * H + unit : -1;
  }
  // Words 2 m and 2 m + 1 of a chunk, as the product takes them.
  __device__ __forceinline__ void arrange(Words& low, Words& high) const {
    if (sizeof(T) == 4 && !plan.tf32) return;
    if (sizeof(T) == 4)
#pragma unroll
      for (int i = 0; i < 4; ++i) low.w[i] = round_to_tf32(low.w[i]), high.w[i] = round_to_tf32(high.w[i]);
    pair_halves(low, high);
  }

  // Calls each(where, chunk, word) of the first word of each two that are spilled: of chunk `held` and those behind it.
  template <int held, class Each>
  __device__ __forceinline__ void for_spilled(Each each) const {
    SharedAddress at = first_spilled();
#pragma unroll 1
    for (int i = held; i < chunks_there && groups_there > 0; ++i, at += unsigned(spilled_chunk()))
#pragma unroll
      for (int x = 0; x < words; x += 2) each(at + unsigned(x * spilled_word), i, x);
  }
  template <int held>
  __device__ __forceinline__ void spill_aligned(const T* w) const {
    for_spilled<held>([&](SharedAddress at, int i, int x) {
      const int place = this->place(i);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int row = this->row(x + n);
        const bool there = row >= 0 && place >= 0;
        copy_async_or_zeros(at + unsigned(n * spilled_word), w + (there ? row + place : 0), there);
      }
    });
    copy_async_commit();
  }
  template <int held>
  __device__ __forceinline__ void arrange_spilled() const {
    if (sizeof(T) == 4 && !plan.tf32) return;
    for_spilled<held>([&](SharedAddress at, int, int) {
      Words low = load_shared<Words>(at), high = load_shared<Words>(at + spilled_word);
      arrange(low, high);
      store_shared(at, low), store_shared(at + spilled_word, high);
    });
  }

  // All are on their way at once: a branch for each would wait for each, and there are seven predicates. What is not there is
  // read where the last of the row is, or at w, and masked. Every turns-th chunk is of the same slot, `step` elements on.
  template <int all>
  __device__ __forceinline__ void hold_aligned(const T* w, Words (&held)[all]) const {
    constexpr int turns = 4 % slots == 0 ? 1 : slots, step = 4 * turns / slots * vector;
    static_assert(4 * turns % slots == 0, "whole units");
#pragma unroll
    for (int x = 0; x < words; ++x)
#pragma unroll
      for (int r = 0; r < turns; ++r) {
        const int row = this->row(x), place = this->place(r);
        const bool any = row >= 0 && place >= 0;
        const int of_warp = (chunks_there - r + turns - 1) / turns, of_row = (H - place % H + step - 1) / step;
        const int there = kept(!any ? 0 : of_warp < of_row ? of_warp : of_row), last = there > 0 ? there - 1 : 0;
        const T* const from = w + (any ? row + place : 0);
#pragma unroll
        for (int i = r; i < all / words; i += turns) {
          Words& to = held[i * words + x];
          load_16_bytes(&to, from + (i / turns < last ? i / turns : last) * step);
          const uint32_t mask = uint32_t((i / turns - there) >> 31);
#pragma unroll
          for (int n = 0; n < 4; ++n) to.w[n] &= mask;
        }
      }
#pragma unroll
    for (int n = 0; n < all / words * words; n += 2) arrange(held[n], held[n + 1]);
  }

  // Element by element. Words come in at the upper end, two by two, and push one another down: less to compile than a place
  // for each.
  template <int all>
  __device__ __forceinline__ void load_unaligned(const T* w, Words (&held)[all]) const {
    constexpr int used = all / words * words;
    const auto load = [&](int i, int x, Words& low, Words& high) {
      const int place = this->place(i);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int row = this->row(x + n);
        T of[vector];
        load_row<false>(of, row < 0 || place < 0 ? nullptr : w + (row + place), H - place % H);
        memcpy(n == 0 ? &low : &high, of, sizeof low);
      }
      arrange(low, high);
    };
    for_spilled<all / words>([&](SharedAddress at, int i, int x) {
      Words low, high;
      load(i, x, low, high);
      store_shared(at, low), store_shared(at + spilled_word, high);
    });
#pragma unroll
    for (int n = 0; n < used; ++n) held[n] = no_words();
#pragma unroll 1
    for (int n = 0; n < used; n += 2) {
#pragma unroll
      for (int m = 0; m + 2 < used; ++m) held[m] = held[m + 2];
      load(n / words, n % words, held[used - 2], held[used - 1]);
    }
  }
};

}  // namespace fusedrnn::cuda
