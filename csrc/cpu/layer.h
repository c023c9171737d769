// What forward.h and backward.h share: one layer in one direction over a sequence, the loops around the microkernel, for any
// cell. Every thread of a team calls them with its rank. Nothing there allocates, and no sum depends on the plan.
#pragma once

#include "args.h"
#include "cpu/gemm.h"

namespace fusedrnn::FUSEDRNN_TARGET {

// A vector of hidden units in memory: `width` lanes, all of them when `full`.
template <class T, bool full>
struct Lanes {
  using V = Vec<T>;
  int width;
  FUSEDRNN_INLINE V load(const T* p) const { return full ? V::load(p) : V::load(p, width); }
  FUSEDRNN_INLINE void store(T* p, V v) const { full ? v.store(p) : v.store(p, width); }
  FUSEDRNN_INLINE V clear_rest(V v) const { return full ? v : first(v, width); }
  FUSEDRNN_INLINE int stride() const { return full ? V::lanes : width; }
};

template <class T>
FUSEDRNN_INLINE int block_width(int64_t n, int64_t b) {
  constexpr int L = Vec<T>::lanes;
  return int(n - b * L < L ? n - b * L : L);
}

// Prefetches n elements from p on into the second cache level. A tile's product takes longer than memory does, so what its
// epilogue will touch is there when it is needed.
template <bool writes, class T>
FUSEDRNN_INLINE void prefetch(const T* p, int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += line) __builtin_prefetch(p + i, writes, 2);
}

FUSEDRNN_INLINE int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }
FUSEDRNN_INLINE int64_t smallest(int64_t a, int64_t b) { return a < b ? a : b; }

// The i-th piece of the panels at step s, or the last: every other step goes through them backwards, and finds in its cache
// what the step before used last. In one direction, panels that exceed the cache by a little would miss it altogether.
FUSEDRNN_INLINE Range there_and_back(const Cut& cut, int64_t i, int64_t s) {
  return cut.piece(s % 2 == 0 ? i : largest(cut.pieces - 1 - i, 0));
}

// The share of a rank: `rows` rows of the batch, `first` and every `stride`-th after it, and blocks [b0, b1) of the hidden
// units. Neighbouring rows, unless sequences differ in length: rows are sorted by it, and so are dealt out in turn.
struct Share {
  int64_t first, stride, rows, b0, b1;
  int unit;          // the number of this part of the units
  Barrier* barrier;  // of all parts; null if it is the only one
  FUSEDRNN_INLINE void wait() const { fusedrnn::wait(barrier, unit); }
  FUSEDRNN_INLINE int64_t row(int64_t i) const { return first + i * stride; }
  // How many of them, from the first on, are among the first `active` of the batch.
  FUSEDRNN_INLINE int64_t among(int64_t active) const {
    return smallest(rows, active <= first ? 0 : stride == 1 ? active - first : ceil_div(active - first, stride));
  }
};

template <class T>
FUSEDRNN_INLINE Share share_of(const Team& team, const Schedule& schedule, int64_t H) {
  const int64_t blocks = ceil_div(H, Vec<T>::lanes);
  if (team.plan.threads() == 1) return {0, 1, schedule.batch, 0, blocks, 0, nullptr};
  const int parts = team.plan.row_threads, part = team.rank / team.plan.unit_threads;
  const int unit = team.rank % team.plan.unit_threads;
  const Cut row{schedule.batch, parts}, block{blocks, team.plan.unit_threads};
  Barrier* const barrier = team.plan.unit_threads > 1 ? barrier_at(team.rows, part) : nullptr;
  const int64_t first = row.begin(part), b0 = block.begin(unit), b1 = block.begin(unit + 1);
  Share share{first, 1, row.begin(part + 1) - first, b0, b1, unit, barrier};
  if (schedule.steps > 0 && schedule.active[schedule.steps - 1] < schedule.batch)
    share.first = part, share.stride = parts, share.rows = ceil_div(schedule.batch - part, parts);
  return share;
}

// Where the data of step s, row j of the batch (in sorted order) lies. Both passes use it; it computes nothing.
template <class T, class Cell>
struct LayerRows {
  const ForwardArgs<T>& a;
  const int64_t begin;  // the first step to run, whose h_{t-1} is not in y
  const Share share;

  LayerRows(const ForwardArgs<T>& args, const Team& team, int64_t begin)
      : a(args), begin(begin), share(share_of<T>(team, args.schedule, args.H)) {}

  // Rows of the share that run at step s: share.row(0) and the next.
  FUSEDRNN_INLINE int64_t running(int64_t s) const { return share.among(a.schedule.active[s]); }
  FUSEDRNN_INLINE const T* h_prev(int64_t s, int64_t j) const {
    if (s > begin) return a.y.at(s - 1, j);
    if (s > 0) return a.range_h + a.state_row[j];
    return a.state[0] ? a.state[0] + a.state_row[j] : a.zeros;
  }
  FUSEDRNN_INLINE T* operand(int64_t s, int64_t j) const { return a.operand + (a.saved ? a.schedule.offset[s] + j : j) * a.H; }
  FUSEDRNN_INLINE T* saved(int64_t s, int64_t j, int64_t b) const {
    return a.saved + ((a.schedule.offset[s] + j) * a.H + b * Vec<T>::lanes) * Cell::saved;
  }
};

}  // namespace fusedrnn::FUSEDRNN_TARGET
