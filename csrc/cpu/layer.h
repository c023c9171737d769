// One layer in one direction over a sequence, forward and backward: the loops around the microkernel, for any cell.
// Every thread of a team calls them with its rank. Nothing here allocates, and no sum depends on the plan.
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

// Asks for n elements from p on in the second cache level. A tile's product takes longer than memory does, so what its
// epilogue will touch is there when it is needed.
template <bool writes, class T>
FUSEDRNN_INLINE void prefetch(const T* p, int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += line) __builtin_prefetch(p + i, writes, 2);
}

FUSEDRNN_INLINE int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }
FUSEDRNN_INLINE int64_t smallest(int64_t a, int64_t b) { return a < b ? a : b; }

// The i-th of n panels at step s: every other step goes through them backwards, and finds in its cache what the step
// before used last. In one direction, panels that exceed the cache by a little would miss it altogether.
FUSEDRNN_INLINE int64_t there_and_back(int64_t i, int64_t n, int64_t s) { return s % 2 == 0 ? i : n - 1 - i; }

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

template <class T, class Cell>
struct Forward {
  using V = Vec<T>;
  static constexpr int L = V::lanes;
  static constexpr int slots = Cell::slots * L;
  // Where registers are few, a tile of both products must have no accumulators that one of them leaves idle.
  static constexpr bool fuses = tile_accumulators >= 24 || Cell::slots == Cell::input.count;
  const ForwardArgs<T>& a;
  const int64_t begin, end;  // the steps to run
  const Share share;
  const int64_t blocks = share.b1 - share.b0;
  T* const pre;
  Place<T>* const place;  // of the share's rows, at the step that runs

  Forward(const ForwardArgs<T>& args, const Team& team, int64_t begin, int64_t end)
      : a(args), begin(begin), end(end), share(share_of<T>(team, args.schedule, args.H)),
        pre(args.pre + team.rank * args.pre_thread), place(args.place + team.rank * args.place_thread) {}

  // Rows of the share that run at step s: share.row(0) and the next.
  FUSEDRNN_INLINE int64_t running(int64_t s) const { return share.among(a.schedule.active[s]); }
  FUSEDRNN_INLINE const T* h_prev(int64_t s, int64_t j) const {
    if (s > begin) return a.y.at(s - 1, j);
    if (s > 0) return a.carry + a.state_row[j];
    return a.state[0] ? a.state[0] + a.state_row[j] : a.zeros;
  }
  FUSEDRNN_INLINE T* operand(int64_t s, int64_t j) const {
    return a.operand + (a.training ? a.schedule.offset[s] + j : j) * a.H;
  }
  FUSEDRNN_INLINE T* saved(int64_t s, int64_t j, int64_t b) const {
    return a.saved + ((a.schedule.offset[s] + j) * a.H + b * L) * Cell::saved;
  }
  FUSEDRNN_INLINE Place<T> place_of(int64_t s, int64_t j) const {
    const ptrdiff_t row = a.state_row[j];
    const bool ends = j >= a.schedule.active[s + 1];
    T* const last = ends || (s + 1 == end && a.carry) ? (ends ? a.final_state[0] : a.carry) + row : nullptr;
    return {a.x.at(s, j),
            h_prev(s, j),
            Cell::phases > 1 ? operand(s, j) : nullptr,
            a.y.at(s, j),
            a.copy.base ? a.copy.at(s, j) : nullptr,
            last,
            Cell::states > 1 ? a.final_state[Cell::states - 1] + row : nullptr,
            a.training ? saved(s, j, 0) : nullptr};
  }
  // The pre-activations of the share's row i at step s of the chunk that starts at step c, from block share.b0 on.
  FUSEDRNN_INLINE T* slots_at(int64_t s, int64_t c, int64_t i) const {
    return pre + ((s - c) * share.rows + i) * blocks * slots;
  }

  void run(const Team& team) const {
    if (begin == 0) start_states();
    for (int64_t c = begin; c < end; c += team.plan.chunk_steps) {
      const int64_t next = smallest(c + team.plan.chunk_steps, end);
      if (next - c > 1) input_product(c, next, share.b0, share.b1);
      for (int64_t s = c; s < next; ++s) phases<0>(s, c, next - c == 1, team.plan.fused);
    }
  }

  // The states that are updated in place, and those of sequences of length 0.
  void start_states() const {
    int64_t u0 = share.b0 * L, u1 = smallest(share.b1 * L, a.H);
    for (int i = 0; i < Cell::states; ++i)
      for (int64_t r = i == 0 ? running(0) : 0; r < share.rows; ++r) {
        const ptrdiff_t row = a.state_row[share.row(r)];
        const T* from = a.state[i] ? a.state[i] + row : a.zeros;
        T* to = a.final_state[i] + row;
        if (to != from)
          for (int64_t u = u0; u < u1; ++u) to[u] = from[u];
      }
  }

  // slots = bias + W_ih x, for blocks [b0, b1) of all rows of steps [c, end).
  void input_product(int64_t c, int64_t end, int64_t first, int64_t last) const {
    int64_t rows = 0;
    for (int64_t s = c; s < end; ++s) rows += running(s);
    const Tiling tiling(rows, last - first, Cell::input.count);
    Tile<T> t;
    t.k = a.I, t.segments = 1, t.a_stride = 1, t.a_segment = 0;
    t.b_block = a.ih_block, t.cin_block = t.cout_block = slots;
    for (int64_t g = 0; g < tiling.block.pieces; ++g) {
      const int64_t b0 = first + tiling.block.begin(g), b1 = first + tiling.block.begin(g + 1);
      t.b = a.w_ih + b0 * a.ih_block;
      int64_t s = c, i = 0, here = running(c);  // the share's row i of `here` at step s
      for (int64_t p = 0; p < tiling.row.pieces; ++p) {
        const int n = int(tiling.row.begin(p + 1) - tiling.row.begin(p));
        for (int r = 0; r < n; ++r, ++i) {
          while (i >= here) ++s, i = 0, here = running(s);
          t.a[r] = a.x.at(s, share.row(i));
          T* row = slots_at(s, c, i) + (b0 - share.b0) * slots;
          t.cin[r] = a.bias + b0 * slots + Cell::input.first * L;
          t.cout[r] = row + Cell::input.first * L;
          for (int64_t b = b0; b < b1; ++b)  // slots that x does not feed start from their bias
            for (int v = 0; v < Cell::slots; ++v)
              if (v < Cell::input.first || v >= Cell::input.first + Cell::input.count)
                V::load(a.bias + b * slots + v * L).store(row + (b - b0) * slots + v * L);
        }
        run_tile<Products<T, Cell::input.count>>(n, int(b1 - b0), t);
      }
    }
  }

  template <int p>
  FUSEDRNN_INLINE void phases(int64_t s, int64_t c, bool with_input, bool fused) const {
    const int64_t rows = running(s);
    if (rows == 1) {
      one_row<p>(place_of(s, share.row(0)), s, c, p == 0 && with_input);
    } else if (rows > 0) {
      if (p == 0)
        for (int64_t i = 0; i < rows; ++i) place[i] = place_of(s, share.row(i));
      phase<p>(s, c, p == 0 && with_input, p == 0 && with_input && fused);
    }
    if (p + 1 < Cell::phases || s + 1 < a.schedule.steps) share.wait();  // whoever called waits for the last
    if constexpr (p + 1 < Cell::phases) phases<p + 1>(s, c, with_input, fused);
  }

  template <int p>
  static FUSEDRNN_INLINE const T* multiplied(const Place<T>& at) {
    return p == 0 ? at.h : at.operand;
  }

  // slots += W_hh operand, then the cell, tile by tile while the slots are in the first cache level. In a chunk of one
  // step the input product comes just before: in the same tile, or before the tiles of a block, which reads one panel after
  // the other. A fused tile's slots are needed nowhere else, if the cell has one phase.
  template <int p>
  void phase(int64_t s, int64_t c, bool with_input, bool fused) const {
    constexpr Span span = Cell::recurrent[p];
    constexpr bool keeps_slots = Cell::phases > 1;
    const Tiling tiling(running(s), blocks, fused ? Cell::slots : span.count);
    // The next step's x, which comes from far, is asked for along the way: a part of each row with each piece of the blocks.
    const int64_t next_rows = with_input && s + 1 < end ? running(s + 1) : 0;
    const Cut next_x{a.I, tiling.block.pieces};
    alignas(64) T scratch[tile_accumulators * tile_parts(Cell::slots) * L];
    Tile<T> t;
    t.k = a.H, t.segments = 1, t.a_stride = 1, t.a_segment = 0;
    t.b_block = a.hh_block[p], t.cin_block = t.cout_block = slots;
    StepTile<T> both;
    both.I = a.I, both.H = a.H, both.ih_block = a.ih_block, both.hh_block = a.hh_block[p];
    for (int64_t n = 0; n < tiling.block.pieces; ++n) {
      const int64_t g = there_and_back(n, tiling.block.pieces, s + a.turn);
      const int64_t b0 = share.b0 + tiling.block.begin(g), b1 = share.b0 + tiling.block.begin(g + 1);
      if (with_input && !fused) input_product(s, s + 1, b0, b1);
      t.b = both.w_hh = a.w_hh[p] + b0 * a.hh_block[p];
      both.w_ih = a.w_ih + b0 * a.ih_block, both.bias = a.bias + b0 * slots;
      const bool in_scratch = fused && !keeps_slots;
      const int64_t out_row = (in_scratch ? b1 - b0 : blocks) * slots;
      for (int64_t i = 0; i < tiling.row.pieces; ++i) {
        const int64_t i0 = tiling.row.begin(i), i1 = tiling.row.begin(i + 1);
        const int rows = int(i1 - i0);
        const Place<T>* const at = place + i0;
        T* const out = in_scratch ? scratch : slots_at(s, c, i0) + (b0 - share.b0) * slots;
        if (n == 0 && share.barrier && i + 1 < tiling.row.pieces)  // the next rows, half of them from another core
          for (int64_t r = i1; r < tiling.row.begin(i + 2); ++r) prefetch<false>(multiplied<p>(place[r]), a.H);
        for (int64_t r = i0; r < smallest(i1, next_rows); ++r)
          prefetch<false>(place[r].x + a.x.step + next_x.begin(n), next_x.begin(n + 1) - next_x.begin(n));
        if (p + 1 == Cell::phases) prefetch_results(at, rows, b0, b1);
        if (!fused) {
          for (int r = 0; r < rows; ++r) {
            t.a[r] = multiplied<p>(at[r]);
            t.cin[r] = t.cout[r] = out + r * out_row + span.first * L;
          }
          run_tile<Products<T, span.count>>(rows, int(b1 - b0), t);
        } else if constexpr (p == 0 && fuses) {
          both.row = at, both.out = out, both.out_row = out_row;
          run_tile<Steps<T, Cell>>(rows, int(b1 - b0), both);
        }
        cells<p>(at, rows, b0, b1, out, out_row);
      }
    }
  }

  static FUSEDRNN_INLINE void prefetch_results(const Place<T>* at, int rows, int64_t b0, int64_t b1) {
    const int64_t u = b0 * L, n = (b1 - b0) * L;
    for (int r = 0; r < rows; ++r) {
      prefetch<true>(at[r].y + u, n);
      if (at[r].copy) prefetch<true>(at[r].copy + u, n);
      if (at[r].saved) prefetch<true>(at[r].saved + u * Cell::saved, n * Cell::saved);
    }
  }

  // The cells of a tile, whose slots lie at `out`.
  template <int p>
  FUSEDRNN_INLINE void cells(const Place<T>* at, int rows, int64_t b0, int64_t b1, T* out, int64_t out_row) const {
    for (int r = 0; r < rows; ++r) {
      T* row = out + r * out_row;
      for (int64_t b = b0; b < b1; ++b, row += slots) {
        const int width = block_width<T>(a.H, b);
        V slot[Cell::slots];
#pragma GCC unroll 8
        for (int v = 0; v < Cell::slots; ++v) slot[v] = V::load(row + v * L);
        if (width == L)
          cell<p, true>(slot, row, at[r], b * L, width);
        else
          cell<p, false>(slot, row, at[r], b * L, width);
      }
    }
  }

  // The same for a single row, whose work is too little to pay for a way through memory: the slots of a few blocks stay in
  // registers from their bias to their cell.
  template <int p>
  void one_row(const Place<T>& at, int64_t s, int64_t c, bool with_input) const {
    constexpr Span span = Cell::recurrent[p];
    constexpr int widest = tile_max_vectors / span.count;
    const bool up = (s + a.turn) % 2 == 0;  // as there_and_back
    for (int64_t b0 = share.b0, b1 = share.b1; b0 < b1;) {
      const int64_t whole = smallest(b1, a.H / L) - b0;  // blocks with all their lanes
      int64_t n = 1;
      if (up ? whole == 0 : b1 * L > a.H)
        row_tile<p, 1, false>(at, s, c, up ? b0 : b1 - 1, with_input);
      else
        n = row_tiles<p, widest>(at, s, c, up, b0, b1, smallest(whole, most_row_blocks<p>()), with_input);
      (up ? b0 : b1) += up ? n : -n;
    }
  }

  // The widest tile of at most `most` blocks at the lower or the upper end of [b0, b1); returns how many it took.
  template <int p, int NB>
  FUSEDRNN_INLINE int64_t row_tiles(const Place<T>& at, int64_t s, int64_t c, bool up, int64_t b0, int64_t b1, int64_t most,
                                    bool with_input) const {
    if constexpr (NB > 1)
      if (most < NB) return row_tiles<p, NB / 2>(at, s, c, up, b0, b1, most, with_input);
    row_tile<p, NB, true>(at, s, c, up ? b0 : b1 - NB, with_input);
    return NB;
  }

  // Blocks that one row takes at a time. A panel beyond the first cache level is read fastest as one stream, if a block
  // alone has enough vectors to hide the latency of fma.
  template <int p>
  FUSEDRNN_INLINE int64_t most_row_blocks() const {
    constexpr int vectors = Cell::recurrent[p].count;
    return vectors * sizeof(V) >= 256 && blocks * a.hh_block[p] * int64_t(sizeof(T)) > (128 << 10) ? 1 : tile_max_vectors;
  }

  // The slots of NB blocks += the product of x and a panel that feeds `count` of them, the parts of a block side by side.
  template <int NB, int count, int first>
  static FUSEDRNN_INLINE void row_product(V (&slot)[1][NB * Cell::slots], const T* x, int64_t k, const T* b, int64_t b_block) {
    constexpr int parts = tile_parts(count);
    static_assert(parts == 1 || count == Cell::slots);
    multiply<T, 1, count / parts, NB * parts, Cell::slots / parts, first>(slot, {x}, 0, 1, k, b, b_block / parts);
  }

  template <int p, int NB, bool full>
  void row_tile(const Place<T>& at, int64_t s, int64_t c, int64_t b0, bool with_input) const {
    constexpr Span span = Cell::recurrent[p];
    T* row = slots_at(s, c, 0) + (b0 - share.b0) * slots;
    const T* from = with_input ? a.bias + b0 * slots : row;
    V slot[1][NB * Cell::slots];
#pragma GCC unroll 32
    for (int i = 0; i < NB * Cell::slots; ++i) slot[0][i] = V::load(from + i * L);
    if (with_input)
      row_product<NB, Cell::input.count, Cell::input.first>(slot, at.x, a.I, a.w_ih + b0 * a.ih_block, a.ih_block);
    row_product<NB, span.count, span.first>(slot, multiplied<p>(at), a.H, a.w_hh[p] + b0 * a.hh_block[p], a.hh_block[p]);
#pragma GCC unroll 8
    for (int n = 0; n < NB; ++n)
      cell<p, full>(slot[0] + n * Cell::slots, row + n * slots, at, (b0 + n) * L, full ? L : int(a.H - b0 * L));
  }

  // The cell's phase p for the vector of hidden units from u on of one row, whose slots a later phase finds in `row`.
  template <int p, bool full>
  FUSEDRNN_INLINE void cell(V* slot, T* row, const Place<T>& at, int64_t u, int width) const {
    const Lanes<T, full> lanes{width};
    V state[Cell::states], save[Cell::saved + 1], op;
    state[0] = lanes.load(at.h + u);
#pragma GCC unroll 8
    for (int i = 1; i < Cell::states; ++i) state[i] = lanes.load(at.state + u);
    Cell::template forward<p>(slot, state, save, &op);
    if constexpr (p + 1 < Cell::phases) {
#pragma GCC unroll 8
      for (int i = 0; i < Cell::slots; ++i) slot[i].store(row + i * L);
      lanes.store(at.operand + u, op);
    } else {
      lanes.store(at.y + u, state[0]);
      if (at.copy) lanes.store(at.copy + u, state[0]);
      if (at.last) lanes.store(at.last + u, state[0]);
#pragma GCC unroll 8
      for (int i = 1; i < Cell::states; ++i) lanes.store(at.state + u, state[i]);
      if (at.saved) {
#pragma GCC unroll 8
        for (int i = 0; i < Cell::saved; ++i) lanes.store(at.saved + u * Cell::saved + i * lanes.stride(), save[i]);
      }
    }
  }
};

template <class T, class Cell>
struct Backward {
  using V = Vec<T>;
  static constexpr int L = V::lanes;
  static constexpr int slots = Cell::slots * L;
  const BackwardArgs<T>& a;
  const ForwardArgs<T>& f = a.forward;
  const Forward<T, Cell> forward;
  const Team& team;
  const Share share = forward.share;
  const int64_t H = f.H, blocks = ceil_div(H, L), padded = blocks * L;
  const int64_t batch = f.schedule.batch;
  const int64_t panel_stride = operand_panel_stride(team.plan.chunk_rows, L);

  Backward(const BackwardArgs<T>& args, const Team& team)
      : a(args), forward(args.forward, team, 0, args.forward.schedule.steps), team(team) {}

  // Row i of the chunk's gradients of block b; rows [0, batch) are those of the step before the chunk.
  FUSEDRNN_INLINE T* gates(int64_t b, int64_t i) const { return a.gates + b * a.gates_block + i * slots; }

  // Steps end - 1 down to begin, which the last call left off at.
  void run(int64_t begin, int64_t end) const {
    const int64_t* active = f.schedule.active;
    int64_t done = f.schedule.offset[f.schedule.steps] - f.schedule.offset[end];  // rows reduced so far
    int64_t last = 0;  // where the gradients of step s + 1 start
    if (end == f.schedule.steps) start_carry();
    for (int64_t s = end - 1; s >= begin;) {
      const int64_t hi = s;
      int64_t rows = 0;
      for (; s >= begin && (rows == 0 || rows + active[s] <= team.plan.chunk_rows); --s) {
        step<0>(s, last, batch + rows);
        last = batch + rows;
        rows += active[s];
      }
      chunk_gradients(s + 1, hi, rows, done);
      done += rows;
      if (s >= 0) {
        for (int64_t b = share.b0; b < share.b1; ++b)
          for (int64_t r = 0; r < forward.running(s + 1); ++r) {
            const int64_t j = share.row(r);
            for (int i = 0; i < Cell::slots; ++i) V::load(gates(b, last + j) + i * L).store(gates(b, j) + i * L);
          }
        last = 0;
        wait(team.all, team.rank);
      }
    }
    if (begin > 0) return;
    product<0>(-1, last, [&](int64_t j, int64_t b, const T* grad) { V::load(grad).store(a.carry[0] + j * padded + b * L); });
    finish_carry();
  }

  void start_carry() const {
    for (int i = 0; i < Cell::states; ++i)
      for (int64_t r = 0; r < share.rows; ++r)
        for (int64_t b = share.b0; b < share.b1; ++b) {
          const int64_t j = share.row(r);
          const T* from = a.dfinal_state[i] ? a.dfinal_state[i] + f.state_row[j] + b * L : f.zeros;
          V::load(from, block_width<T>(H, b)).store(a.carry[i] + j * padded + b * L);
        }
  }

  void finish_carry() const {
    for (int i = 0; i < Cell::states; ++i)
      if (a.dstate[i])
        for (int64_t r = 0; r < share.rows; ++r)
          for (int64_t b = share.b0; b < share.b1; ++b) {
            const int64_t j = share.row(r);
            int width = block_width<T>(H, b);
            T* to = a.dstate[i] + f.state_row[j] + b * L;
            V v = V::load(a.carry[i] + j * padded + b * L);
            (a.adds ? V::load(to, width) + v : v).store(to, width);
          }
  }

  // Phase 0: dL/dh_t = dy + carry + what step s + 1 sends back, then the cell. Later phases: an operand's gradient.
  template <int q>
  FUSEDRNN_INLINE void step(int64_t s, int64_t next, int64_t now) const {
    product<q>(s, q == 0 ? next : now, [&](int64_t j, int64_t b, const T* grad) {
      int width = block_width<T>(H, b);
      if (width == L)
        cell<q, true>(s, now, j, b, width, grad);
      else
        cell<q, false>(s, now, j, b, width, grad);
    });
    share.wait();
    if constexpr (q + 1 < Cell::phases) step<q + 1>(s, next, now);
  }

  // Rows of a product with a transposed panel, whose results lie in `scratch` until they are used.
  struct Batch {
    static constexpr int most_rows = 48;
    const T *a[most_rows], *cin[most_rows];
    alignas(64) T scratch[most_rows * 4 * L];
    int vectors;
    FUSEDRNN_INLINE T* result(int row) { return scratch + row * vectors * L; }
  };

  // A long product is cut so that a piece of the panel, which all rows of a batch read, stays in the second cache level.
  static constexpr int64_t panel_piece = (256 << 10) / sizeof(V);  // in vectors
  struct Pieces {
    int64_t segments, rows;  // of a piece; of a batch
    Pieces(int64_t k, int64_t all, int64_t rows, int64_t vectors)
        : segments(largest(all, 1)), rows(tile_max_rows(int(vectors))) {
      if (rows <= this->rows || all * k * vectors <= panel_piece) return;
      segments = largest(1, panel_piece / (k * vectors));
      this->rows = Batch::most_rows;
    }
  };

  // result(r) = cin[r] + a[r] times the panel at b, for n rows; b_block, a_segment, k and cin_block are t's.
  static void run_batch(Batch& batch, int n, Tile<T>& t, const T* b, int64_t segments, int64_t piece) {
    const Cut tiles{n, ceil_div(n, tile_max_rows(batch.vectors))};
    const ptrdiff_t cin_block = t.cin_block;
    t.cout_block = L;
    for (int64_t first = 0; first == 0 || first < segments; first += piece) {
      t.segments = smallest(piece, segments - first);
      t.b = b + first * t.k * L;
      t.cin_block = first == 0 ? cin_block : L;
      for (int64_t i = 0; i < tiles.pieces; ++i) {
        const int r0 = int(tiles.begin(i)), rows = int(tiles.begin(i + 1)) - r0;
        for (int r = 0; r < rows; ++r) {
          t.a[r] = batch.a[r0 + r] + first * t.a_segment;
          t.cout[r] = batch.result(r0 + r);
          t.cin[r] = first == 0 ? batch.cin[r0 + r] : t.cout[r];
        }
        run_tile<Products<T, 1>>(rows, batch.vectors, t);
      }
    }
    t.cin_block = cin_block;
  }

  // Calls then(j, b, grad) for every running row and block of the share, where grad holds the gradient of the operand
  // of the matching forward phase: W_hh^T times the slots' gradients at rows `from`, on top of the carry when q = 0.
  template <int q, class Then>
  FUSEDRNN_INLINE void product(int64_t s, int64_t from, Then then) const {
    constexpr int p = q == 0 ? 0 : Cell::phases - q;
    constexpr Span span = Cell::recurrent[p];
    const int64_t steps = f.schedule.steps;
    // Rows that ended at step s got nothing from a later step: for them the product is empty.
    int64_t fed = q > 0 ? forward.running(s) : s + 1 < steps ? forward.running(s + 1) : 0;
    int64_t ends = s >= 0 ? forward.running(s) : fed;
    Batch batch;
    Tile<T> t;
    t.k = span.count * L, t.a_stride = 1, t.a_segment = a.gates_block;
    t.b_block = a.hh_block[p], t.cin_block = q == 0 ? L : 0;
    for (int part = 0; part < 2; ++part) {
      const int64_t part0 = part == 0 ? 0 : fed, rows = (part == 0 ? fed : ends) - part0;
      if (rows <= 0) continue;
      const Tiling tiling(rows, share.b1 - share.b0, 1);
      const Cut x_part{a.dw_ih ? f.I : 0, tiling.block.pieces};
      for (int64_t k = 0; k < tiling.block.pieces; ++k) {
        const int64_t g = there_and_back(k, tiling.block.pieces, s);
        const int64_t b0 = share.b0 + tiling.block.begin(g), b1 = share.b0 + tiling.block.begin(g + 1);
        batch.vectors = int(b1 - b0);
        const int64_t segments = part == 0 ? blocks : 0;
        const Pieces piece(t.k, segments, rows, b1 - b0);
        const Cut row{rows, ceil_div(rows, piece.rows)};
        for (int64_t i = 0; i < row.pieces; ++i) {
          const int64_t i0 = part0 + row.begin(i);
          const int n = int(row.begin(i + 1) - row.begin(i));
          if (k == 0 && share.barrier && part == 0 && i + 1 < row.pieces)  // the next rows, from other cores
            for (int64_t b = 0; b < blocks; ++b)
              if (b < share.b0 || b >= share.b1)
                for (int64_t next = row.begin(i + 1); next < row.begin(i + 2); ++next)
                  prefetch<false>(gates(b, from + share.row(next)), slots);
          for (int r = 0; r < n; ++r) {
            const int64_t j = share.row(i0 + r);
            batch.a[r] = gates(0, from + j) + span.first * L;
            batch.cin[r] = q == 0 ? a.carry[0] + j * padded + b0 * L : f.zeros;
            if (s >= 0) {
              prefetch<false>(forward.saved(s, j, b0), (b1 - b0) * L * Cell::saved);
              if (q == 0 && a.dy.base) prefetch<false>(a.dy.at(s, j) + b0 * L, (b1 - b0) * L);
              if (Cell::saved == 0) {  // its gradients are so few that what dW needs, h and x, stays beside them
                prefetch<false>(f.y.at(s, j) + b0 * L, (b1 - b0) * L);
                prefetch<false>(f.x.at(s, j) + x_part.begin(k), x_part.begin(k + 1) - x_part.begin(k));
              }
            }
          }
          run_batch(batch, n, t, a.w_hh_t[p] + b0 * a.hh_block[p], segments, piece.segments);
          for (int r = 0; r < n; ++r)
            for (int64_t b = b0; b < b1; ++b) then(share.row(i0 + r), b, batch.result(r) + (b - b0) * L);
        }
      }
    }
  }

  template <int q, bool full>
  FUSEDRNN_INLINE void cell(int64_t s, int64_t now, int64_t j, int64_t b, int width, const T* product) const {
    const Lanes<T, full> lanes{width};
    constexpr Span operand = Cell::recurrent[q == 0 ? 0 : Cell::phases - q];  // of this phase's product
    const int64_t u = b * L;
    V slot[Cell::slots], carry[Cell::states], save[Cell::saved + 1];
    V grad = V::load(product);
    if (q == 0 && a.dy.base) grad = grad + lanes.load(a.dy.at(s, j) + u);
#pragma GCC unroll 8
    for (int i = 0; i < Cell::states; ++i) carry[i] = V::load(a.carry[i] + j * padded + u);
    const T* saved = forward.saved(s, j, b);
#pragma GCC unroll 8
    for (int i = 0; i < Cell::saved; ++i) save[i] = lanes.load(saved + i * lanes.stride());
    T* to = gates(b, now + j);
#pragma GCC unroll 8
    for (int i = 0; i < Cell::slots; ++i) slot[i] = q == 0 ? V(T(0)) : V::load(to + i * L);
    Cell::template backward<q>(grad, slot, carry, save, lanes.load(f.y.at(s, j) + u), lanes.load(forward.h_prev(s, j) + u));
#pragma GCC unroll 8
    for (int i = 0; i < Cell::slots; ++i)
      if (q == 0 || i < operand.first || i >= operand.first + operand.count)  // not those that other threads still read
        lanes.clear_rest(slot[i]).store(to + i * L);
#pragma GCC unroll 8
    for (int i = 0; i < Cell::states; ++i) carry[i].store(a.carry[i] + j * padded + u);
  }

  // The rows of a chunk, in the order in which the loop met them.
  struct Walk {
    const int64_t* active;
    int64_t s, j;
    FUSEDRNN_INLINE void skip(int64_t n) {
      for (j += n; j >= active[s] && s > 0; --s) j -= active[s];
    }
  };

  // The chunk's share of dW, db and dx: steps lo to hi, whose gradients are rows [batch, batch + rows); `done` rows were
  // reduced before them.
  void chunk_gradients(int64_t lo, int64_t hi, int64_t rows, int64_t done) const {
    const bool last = lo == 0;
    if (a.dw_ih) pack_operands(hi, rows);
    wait(team.all, team.rank);
    // The biases first: they read the gradients, many of which another core wrote, block by block from end to end, which is
    // the fastest way to fetch them for the products that follow.
    if (a.db_ih) bias_gradients(rows, done, last);
    if (a.dw_ih) {
      outer_product(Cell::input, f.I, a.x_panel, a.dw_ih, a.sum_w_ih, rows, done, last);
      for (int p = 0; p < Cell::phases; ++p)
        outer_product(Cell::recurrent[p], H, a.h_panel[p], a.dw_hh, a.sum_w_hh, rows, done, last);
    }
    if (a.dx.base) input_gradients(lo, hi);
  }

  // This rank's share of n tasks.
  FUSEDRNN_INLINE Cut tasks(int64_t n) const { return {n, team.plan.threads()}; }

  // The operands' rows as panels for the outer products.
  void pack_operands(int64_t hi, int64_t rows) const {
    const Cut input = tasks(ceil_div(f.I, L)), hidden = tasks(blocks);  // the columns that this thread reads, if one gate does
    pack_rows(hi, rows, input.begin(team.rank), input.begin(team.rank + 1), f.I, a.x_panel,
              [&](int64_t s, int64_t j) { return f.x.at(s, j); });
    for (int p = 0; p < Cell::phases; ++p)
      pack_rows(hi, rows, hidden.begin(team.rank), hidden.begin(team.rank + 1), H, a.h_panel[p],
                [&](int64_t s, int64_t j) { return p == 0 ? forward.h_prev(s, j) : forward.operand(s, j); });
  }

  // Vectors [v0, v1) of every row of the chunk; row(s, j) is where it lies, `width` elements long.
  template <class Row>
  void pack_rows(int64_t hi, int64_t rows, int64_t v0, int64_t v1, int64_t width, T* panel, Row row) const {
    if (v0 >= v1) return;
    Walk at{f.schedule.active, hi, 0};
    for (int64_t i = 0; i < rows; ++i, at.skip(1)) {
      const T* from = row(at.s, at.j);
      for (int64_t v = v0; v < v1; ++v) V::load(from + v * L, block_width<T>(width, v)).store(panel + v * panel_stride + i * L);
    }
  }

  // dw[gate(slot) * H + u][n] += sum over rows of gates[slot, u] * panel[n], for the slots of a span.
  void outer_product(Span span, int64_t N, const T* panel, T* dw, T* sum, int64_t rows, int64_t done, bool last) const {
    constexpr int wide = 3;  // then the rows of a tile divide the lanes of a vector
    const Cut columns{ceil_div(N, L), ceil_div(ceil_div(N, L), wide)};
    Cut cut = tasks(blocks * columns.pieces);
    const bool by_columns = span.count < wide;  // of gradients and panel, the larger part of a task is met again and again
    alignas(64) T scratch[8 * wide * L];
    Tile<T> t;
    t.segments = 1, t.a_stride = slots, t.a_segment = 0, t.b_block = panel_stride;
    for (int64_t task = cut.begin(team.rank); task < cut.begin(team.rank + 1); ++task) {
      const int64_t b = by_columns ? task % blocks : task / columns.pieces;
      const int64_t g = by_columns ? task / blocks : task % columns.pieces;
      const int64_t n0 = columns.begin(g), vectors = columns.begin(g + 1) - n0;
      const int64_t width = smallest(N - n0 * L, vectors * L);
      const bool whole = width == vectors * L;
      for (int64_t r0 = 0, r1; r0 < rows; r0 = r1) {  // up to the next border of a block of the reduction
        r1 = smallest(rows, r0 + reduction_rows - (done + r0) % reduction_rows);
        const bool starts = (done + r0) % reduction_rows == 0;
        const bool flush = sum && ((done + r1) % reduction_rows == 0 || (last && r1 == rows));
        const bool adds = a.adds || done + r0 >= reduction_rows;
        t.k = r1 - r0;
        t.b = panel + n0 * t.b_block + r0 * L;
        const Cut lane{block_width<T>(H, b), ceil_div(block_width<T>(H, b), tile_max_rows(wide))};
        const int64_t tiles = span.count * lane.pieces;
        const auto first_row = [&](int64_t i) {  // of tile i in dw
          return (Cell::slot_gate[span.first + i / lane.pieces] * H + b * L + lane.begin(i % lane.pieces)) * N + n0 * L;
        };
        for (int64_t i = 0; i < tiles; ++i) {
          const int64_t lane0 = lane.begin(i % lane.pieces), row = first_row(i);
          const int n = int(lane.begin(i % lane.pieces + 1) - lane0);
          T* to = (sum ? sum : dw) + row;
          if (i + 1 < tiles)
            for (int r = 0; r < n; ++r) prefetch<true>((sum ? sum : dw) + first_row(i + 1) + r * N, width);
          for (int r = 0; r < n; ++r) {
            t.a[r] = gates(b, batch + r0) + (span.first + i / lane.pieces) * L + lane0 + r;
            t.cout[r] = whole ? to + r * N : scratch + r * wide * L;
            t.cin[r] = starts ? f.zeros : t.cout[r];
            if (!starts && !whole)
              for (int64_t v = 0; v < width; ++v) t.cout[r][v] = to[r * N + v];
          }
          t.cin_block = starts ? 0 : L, t.cout_block = L;
          run_tile<Products<T, 1>>(n, int(vectors), t);
          if (!whole)
            for (int r = 0; r < n; ++r)
              for (int64_t v = 0; v < width; ++v) to[r * N + v] = t.cout[r][v];
          if (flush)
            for (int r = 0; r < n; ++r) add_to(dw + row + r * N, to + r * N, width, adds);
        }
      }
    }
  }

  static FUSEDRNN_INLINE void add_to(T* to, const T* from, int64_t n, bool adds) {
    if (adds)
      for (int64_t i = 0; i < n; ++i) to[i] += from[i];
    else
      for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  }

  void bias_gradients(int64_t rows, int64_t done, bool last) const {
    Cut cut = tasks(blocks);
    for (int64_t b = cut.begin(team.rank); b < cut.begin(team.rank + 1); ++b) {
      T* sum = a.sum_b + b * slots;
      for (int64_t r0 = 0, r1; r0 < rows; r0 = r1) {
        r1 = smallest(rows, r0 + reduction_rows - (done + r0) % reduction_rows);
        V acc[Cell::slots];
        for (int i = 0; i < Cell::slots; ++i) acc[i] = (done + r0) % reduction_rows == 0 ? V(T(0)) : V::load(sum + i * L);
        for (int64_t r = r0; r < r1; ++r)
          for (int i = 0; i < Cell::slots; ++i) acc[i] += V::load(gates(b, batch + r) + i * L);
        for (int i = 0; i < Cell::slots; ++i) acc[i].store(sum + i * L);
        if ((done + r1) % reduction_rows != 0 && !(last && r1 == rows)) continue;
        const bool adds = a.adds || done + r0 >= reduction_rows;
        const int width = block_width<T>(H, b);
        for (int i = Cell::input.first; i < Cell::input.first + Cell::input.count; ++i)
          add_to(a.db_ih + Cell::slot_gate[i] * H + b * L, sum + i * L, width, adds);
        for (int p = 0; p < Cell::phases; ++p)
          for (int i = Cell::recurrent[p].first; i < Cell::recurrent[p].first + Cell::recurrent[p].count; ++i)
            add_to(a.db_hh + Cell::slot_gate[i] * H + b * L, sum + i * L, width, adds);
      }
    }
  }

  // dx = W_ih^T times the gradients of the slots that x feeds. Each thread takes the rows whose gradients it computed, and
  // those that share rows split the columns.
  void input_gradients(int64_t lo, int64_t hi) const {
    int64_t rows = 0;
    for (int64_t s = lo; s <= hi; ++s) rows += forward.running(s);
    if (rows == 0) return;
    const Tiling tiling(rows, ceil_div(f.I, L), 1);
    const Cut mine{tiling.block.pieces, team.plan.unit_threads};
    Batch batch;
    Tile<T> t;
    t.k = Cell::input.count * L, t.a_stride = 1, t.a_segment = a.gates_block;
    t.b_block = a.ih_block, t.cin_block = 0;
    for (int64_t g = mine.begin(share.unit); g < mine.begin(share.unit + 1); ++g) {
      const int64_t n0 = tiling.block.begin(g), vectors = tiling.block.begin(g + 1) - n0;
      batch.vectors = int(vectors);
      const Pieces piece(t.k, blocks, rows, vectors);
      const Cut row{rows, ceil_div(rows, piece.rows)};
      // The share's row `own` of `here` at step s; row (s, j) of the chunk is number before + j.
      int64_t s = hi, own = 0, here = forward.running(hi), before = 0;
      for (int64_t i = 0; i < row.pieces; ++i) {
        const int n = int(row.begin(i + 1) - row.begin(i));
        T* to[Batch::most_rows];
        for (int r = 0; r < n; ++r, ++own) {
          while (own >= here) before += f.schedule.active[s], --s, own = 0, here = forward.running(s);
          const int64_t j = share.row(own);
          batch.a[r] = gates(0, this->batch + before + j) + Cell::input.first * L;
          batch.cin[r] = f.zeros;
          to[r] = a.dx.at(s, j) + n0 * L;
        }
        run_batch(batch, n, t, a.w_ih_t + n0 * a.ih_block, blocks, piece.segments);
        for (int r = 0; r < n; ++r) add_to(to[r], batch.result(r), smallest(f.I - n0 * L, vectors * L), a.dx_adds);
      }
    }
  }
};

}  // namespace fusedrnn::FUSEDRNN_TARGET
