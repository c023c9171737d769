// The forward pass of a layer: see layer.h.
#pragma once

#include "cpu/layer.h"

namespace fusedrnn::FUSEDRNN_TARGET {

template <class T, class Cell>
struct Forward : LayerRows<T, Cell> {
  using Layer = LayerRows<T, Cell>;
  using Layer::a, Layer::begin, Layer::share, Layer::running, Layer::h_prev, Layer::operand, Layer::saved;
  using V = Vec<T>;
  static constexpr int L = V::lanes;
  static constexpr int slots = Cell::slots * L;
  // Where registers are few, a tile of both products must have no accumulators that one of them leaves idle.
  static constexpr bool fuses = tile_accumulators >= 24 || Cell::slots == Cell::input.count;
  const int64_t end;      // of the steps to run
  const bool prefetches;  // panels: see Plan
  const int64_t blocks = share.b1 - share.b0;
  T* const pre;
  Place<T>* const place;  // of the share's rows, at the step that runs

  Forward(const ForwardArgs<T>& args, const Team& team, int64_t begin, int64_t end)
      : Layer(args, team, begin), end(end), prefetches(team.plan.prefetch), pre(args.pre + team.rank * args.pre_thread),
        place(args.place + team.rank * args.place_thread) {}

  FUSEDRNN_INLINE Place<T> place_of(int64_t s, int64_t j) const {
    const ptrdiff_t row = a.state_row[j];
    const bool ends = j >= a.schedule.active[s + 1];
    T* const last = ends || (s + 1 == end && a.range_h) ? (ends ? a.final_state[0] : a.range_h) + row : nullptr;
    return {a.x.at(s, j),
            h_prev(s, j),
            Cell::phases > 1 ? operand(s, j) : nullptr,
            a.y.at(s, j),
            a.copy.base ? a.copy.at(s, j) : nullptr,
            last,
            Cell::states > 1 ? a.final_state[Cell::states - 1] + row : nullptr,
            a.saved ? saved(s, j, 0) : nullptr};
  }
  // The pre-activations of the share's row i at step s of the chunk that starts at step c, from block share.b0 on.
  FUSEDRNN_INLINE T* slots_at(int64_t s, int64_t c, int64_t i) const {
    return pre + ((s - c) * share.rows + i) * blocks * slots;
  }

  // How the slots of a step come about:
  //
  //   chunk of several steps            input_product() of the whole chunk, then in each step phase() adds W_hh h
  //   chunk of one step                 phase(), for one piece of the blocks after the other: input_product() of the step,
  //                                     then it adds W_hh h
  //   chunk of one step, plan.fused     phase(): one StepTile makes both; if the cell has one phase, the slots never leave
  //                                     its scratch
  //   only one row runs                 one_row(): the slots stay in registers up to the cell, from the bias in a chunk of
  //                                     one step, else from what input_product() left
  //
  // All give the same bits: bias, W_ih x and W_hh h make one chain of fma. A cell's later phases have no input product.
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

  // slots = bias + W_ih x, for blocks [first, last) of all rows of steps [c, c_end).
  void input_product(int64_t c, int64_t c_end, int64_t first, int64_t last) const {
    int64_t rows = 0;
    for (int64_t s = c; s < c_end; ++s) rows += running(s);
    const Tiling tiling(rows, last - first, Cell::input.count);
    Tile<T> t;
    t.k = a.I, t.segments = 1;
    t.b_block = a.ih_block, t.cin_block = t.cout_block = slots;
    for (int64_t g = 0; g < tiling.block.pieces; ++g) {
      const Range at_g = tiling.block.piece(g), next = tiling.block.piece(g + 1);
      const int64_t b0 = first + at_g.begin, b1 = first + at_g.end;
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
              if (!contains(Cell::input, v)) V::load(a.bias + b * slots + v * L).store(row + (b - b0) * slots + v * L);
        }
        t.prefetch_from = !prefetches ? nullptr
                                      : next_panel_share<T, Cell::input.count>(a.w_ih + (first + next.begin) * a.ih_block,
                                                                               a.ih_block, a.I, next.size(), p);
        run_products<Cell::input.count>(n, int(b1 - b0), t);
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
    // The next step's x comes from memory, so it is prefetched along the way: a part of each row with each piece of the blocks.
    const int64_t next_rows = with_input && s + 1 < end ? running(s + 1) : 0;
    const Cut next_x{a.I, tiling.block.pieces};
    alignas(64) T scratch[tile_accumulators * tile_parts(Cell::slots) * L];
    Tile<T> t;
    t.k = a.H, t.segments = 1;
    t.b_block = a.hh_block[p], t.cin_block = t.cout_block = slots;
    StepTile<T> both;
    both.I = a.I, both.H = a.H, both.ih_block = a.ih_block, both.hh_block = a.hh_block[p];
    for (int64_t n = 0; n < tiling.block.pieces; ++n) {
      const Range at_n = there_and_back(tiling.block, n, s + a.turn), next = there_and_back(tiling.block, n + 1, s + a.turn);
      const int64_t b0 = share.b0 + at_n.begin, b1 = share.b0 + at_n.end, next0 = share.b0 + next.begin;
      if (with_input && !fused) input_product(s, s + 1, b0, b1);
      t.b = both.w_hh = a.w_hh[p] + b0 * a.hh_block[p];
      both.w_ih = a.w_ih + b0 * a.ih_block, both.bias = a.bias + b0 * slots;
      const T *const next_ih = a.w_ih + next0 * a.ih_block, *const next_hh = a.w_hh[p] + next0 * a.hh_block[p];
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
        t.prefetch_from = !prefetches ? nullptr : next_panel_share<T, span.count>(next_hh, a.hh_block[p], a.H, next.size(), i);
        if (!fused) {
          for (int r = 0; r < rows; ++r) {
            t.a[r] = multiplied<p>(at[r]);
            t.cin[r] = t.cout[r] = out + r * out_row + span.first * L;
          }
          run_products<span.count>(rows, int(b1 - b0), t);
        } else if constexpr (p == 0 && fuses) {
          both.row = at, both.out = out, both.out_row = out_row;
          both.hh_prefetch_from = t.prefetch_from;
          both.ih_prefetch_from = next_panel_share<T, Cell::input.count>(next_ih, a.ih_block, a.I, next.size(), i);
          run_steps<Cell>(rows, int(b1 - b0), both);
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

  // The same for a single row, too little work to pay for storing the slots and reading them back: those of a few blocks
  // stay in registers up to their cell.
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
    multiply<T, 1, count / parts, NB * parts, false, Cell::slots / parts, first>(slot, {x}, 0, 0, k, b, b_block / parts,
                                                                                 nullptr);
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

}  // namespace fusedrnn::FUSEDRNN_TARGET
