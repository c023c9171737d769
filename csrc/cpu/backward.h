// The backward pass of a layer: see layer.h.
#pragma once

#include "cpu/layer.h"

namespace fusedrnn::FUSEDRNN_TARGET {

template <class T, class Cell>
struct Backward {
  using V = Vec<T>;
  static constexpr int L = V::lanes;
  static constexpr int slots = Cell::slots * L;
  const BackwardArgs<T>& a;
  const ForwardArgs<T>& f = a.forward;
  const LayerRows<T, Cell> layer;
  const Team& team;
  const Share share = layer.share;
  const int64_t H = f.H, blocks = ceil_div(H, L), padded = blocks * L;
  const int64_t batch = f.schedule.batch;
  const bool prefetches = team.plan.prefetch;  // panels: see Plan
  const int64_t panel_stride = operand_panel_stride(team.plan.chunk_rows, L);

  Backward(const BackwardArgs<T>& args, const Team& team) : a(args), layer(args.forward, team, 0), team(team) {}

  // The gradients of block b's slots, row i of them. The rows of a chunk, in the order in which the loop meets them:
  //
  //   [0, B): step hi + 1, kept from the previous chunk | from row B on: hi | hi - 1 | .. | lo, active[s] rows of each
  FUSEDRNN_INLINE T* slot_grads(int64_t b, int64_t i) const { return a.slot_grads + b * a.slot_grads_block + i * slots; }

  // Steps end - 1 down to begin; the call before, if any, ran those from `end` on.
  void run(int64_t begin, int64_t end) const {
    const int64_t* active = f.schedule.active;
    int64_t done = f.schedule.offset[f.schedule.steps] - f.schedule.offset[end];  // rows in the chunks before this one
    int64_t next_at = 0;  // the row where the gradients of step s + 1 start
    if (end == f.schedule.steps) start_dcarry();
    for (int64_t s = end - 1; s >= begin;) {
      const int64_t hi = s;
      int64_t used = 0;  // rows of this chunk
      for (; s >= begin && (used == 0 || used + active[s] <= team.plan.chunk_rows); --s) {
        step<0>(s, next_at, batch + used);
        next_at = batch + used;
        used += active[s];
      }
      chunk_gradients(s + 1, hi, used, done);
      done += used;
      if (s >= 0) {
        keep_step(s + 1, next_at);
        next_at = 0;
        wait(team.all, team.rank);
      }
    }
    if (begin > 0) return;
    product<0>(-1, next_at, [&](int64_t j, int64_t b0, int64_t b1, const T* grad) {
      T* const to = a.dcarry[0] + j * padded + b0 * L;
      for (int64_t b = 0; b < b1 - b0; ++b) V::load(grad + b * L).store(to + b * L);
    });
    finish_dcarry();
  }

  // Copies the gradients of step s from row `at` on to row 0 and the next, where the next chunk finds them.
  FUSEDRNN_INLINE void keep_step(int64_t s, int64_t at) const {
    for (int64_t b = share.b0; b < share.b1; ++b)
      for (int64_t r = 0; r < layer.running(s); ++r) {
        const int64_t j = share.row(r);
        for (int i = 0; i < Cell::slots; ++i) V::load(slot_grads(b, at + j) + i * L).store(slot_grads(b, j) + i * L);
      }
  }

  void start_dcarry() const {
    for (int i = 0; i < Cell::states; ++i)
      for (int64_t r = 0; r < share.rows; ++r)
        for (int64_t b = share.b0; b < share.b1; ++b) {
          const int64_t j = share.row(r);
          const T* from = a.dfinal_state[i] ? a.dfinal_state[i] + f.state_row[j] + b * L : f.zeros;
          V::load(from, block_width<T>(H, b)).store(a.dcarry[i] + j * padded + b * L);
        }
  }

  void finish_dcarry() const {
    for (int i = 0; i < Cell::states; ++i)
      if (a.dstate[i])
        for (int64_t r = 0; r < share.rows; ++r)
          for (int64_t b = share.b0; b < share.b1; ++b) {
            const int64_t j = share.row(r);
            int width = block_width<T>(H, b);
            T* to = a.dstate[i] + f.state_row[j] + b * L;
            V v = V::load(a.dcarry[i] + j * padded + b * L);
            (a.adds ? V::load(to, width) + v : v).store(to, width);
          }
  }

  // Phase 0: dL/dh_t = dy + dcarry + what step s + 1 sends back, then the cell. Later phases: an operand's gradient.
  template <int q>
  FUSEDRNN_INLINE void step(int64_t s, int64_t next, int64_t now) const {
    product<q>(s, q == 0 ? next : now, [&](int64_t j, int64_t b0, int64_t b1, const T* grad) {
      const RowAt at(*this, s, now, j);
      for (int64_t b = b0; b < b1; ++b, grad += L) {
        const int width = block_width<T>(H, b);
        if (width == L)
          cell<q, true>(at, b, width, grad);
        else
          cell<q, false>(at, b, width, grad);
      }
    });
    share.wait();
    if constexpr (q + 1 < Cell::phases) step<q + 1>(s, next, now);
  }

  // Rows of a product with a transposed panel, whose results lie in `scratch` until they are used, or go to `out`.
  struct Batch {
    static constexpr int most_rows = 48;
    const T *a[most_rows], *cin[most_rows];
    T* out[most_rows];
    bool direct = false;
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
      segments = ceil_div(all, ceil_div(all, largest(1, panel_piece / (k * vectors))));  // pieces of one size, or nearly
      this->rows = Batch::most_rows;
    }
  };

  // result(r), or out[r], = cin[r] + a[r] times the panel at b, for n rows; b_block, a_segment, k and cin_block are t's. Tile
  // i of the panel's last piece prefetches from follows(i) on.
  template <class Follows>
  FUSEDRNN_INLINE void run_batch(Batch& batch, int n, Tile<T>& t, const T* b, int64_t segments, int64_t piece,
                                 Follows follows) const {
    const Cut tiles{n, ceil_div(n, tile_max_rows(batch.vectors))};
    const ptrdiff_t cin_block = t.cin_block;
    t.cout_block = L;
    for (int64_t first = 0; first == 0 || first < segments; first += piece) {
      const bool last = first + piece >= segments;
      t.segments = smallest(piece, segments - first);
      t.b = b + first * t.k * L;
      t.cin_block = first == 0 ? cin_block : L;
      for (int64_t i = 0; i < tiles.pieces; ++i) {
        const int r0 = int(tiles.begin(i)), rows = int(tiles.begin(i + 1)) - r0;
        for (int r = 0; r < rows; ++r) {
          t.a[r] = batch.a[r0 + r] + first * t.a_segment;
          t.cout[r] = last && batch.direct ? batch.out[r0 + r] : batch.result(r0 + r);
          t.cin[r] = first == 0 ? batch.cin[r0 + r] : batch.result(r0 + r);
        }
        t.prefetch_from = !prefetches ? nullptr
                          : last      ? follows(i)
                                      : next_panel_share<T, 1>(t.b + piece * t.k * L, t.b_block, piece * t.k, batch.vectors, i);
        run_products<1, Layout::segments>(rows, batch.vectors, t);
      }
    }
    t.cin_block = cin_block;
  }

  // Calls then(j, b0, b1, grad) for every running row and a few blocks of the share, where grad holds the gradient of the
  // operand of the matching forward phase: W_hh^T times the slots' gradients at rows `from`, on top of dcarry when q = 0.
  template <int q, class Then>
  FUSEDRNN_INLINE void product(int64_t s, int64_t from, Then then) const {
    constexpr int p = forward_phase<Cell>(q);
    constexpr Span span = Cell::recurrent[p];
    const int64_t steps = f.schedule.steps;
    // Rows that ended at step s got nothing from a later step: for them the product is empty.
    int64_t fed = q > 0 ? layer.running(s) : s + 1 < steps ? layer.running(s + 1) : 0;
    int64_t ends = s >= 0 ? layer.running(s) : fed;
    Batch batch;
    Tile<T> t;
    t.k = span.count * L, t.a_segment = a.slot_grads_block;
    t.b_block = a.hh_block[p], t.cin_block = q == 0 ? L : 0;
    t.prefetch_segment = t.k * L;
    for (int part = 0; part < 2; ++part) {
      const int64_t part0 = part == 0 ? 0 : fed, rows = (part == 0 ? fed : ends) - part0;
      if (rows <= 0) continue;
      const Tiling tiling(rows, share.b1 - share.b0, 1);
      const Cut x_part{a.dw_ih ? f.I : 0, tiling.block.pieces};
      for (int64_t k = 0; k < tiling.block.pieces; ++k) {
        const Range at_k = there_and_back(tiling.block, k, s), next = there_and_back(tiling.block, k + 1, s);
        const int64_t b0 = share.b0 + at_k.begin, b1 = share.b0 + at_k.end;
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
                for (int64_t r = row.begin(i + 1); r < row.begin(i + 2); ++r)
                  prefetch<false>(slot_grads(b, from + share.row(r)), slots);
          for (int r = 0; r < n; ++r) {
            const int64_t j = share.row(i0 + r);
            batch.a[r] = slot_grads(0, from + j) + span.first * L;
            batch.cin[r] = q == 0 ? a.dcarry[0] + j * padded + b0 * L : f.zeros;
            if (s >= 0) {
              prefetch<false>(layer.saved(s, j, b0), (b1 - b0) * L * Cell::saved);
              if (q == 0 && a.dy.base) prefetch<false>(a.dy.at(s, j) + b0 * L, (b1 - b0) * L);
              if (Cell::saved == 0) {  // its gradients are so few that what dW needs, h and x, stays beside them
                prefetch<false>(f.y.at(s, j) + b0 * L, (b1 - b0) * L);
                prefetch<false>(f.x.at(s, j) + x_part.begin(k), x_part.begin(k + 1) - x_part.begin(k));
              }
            }
          }
          const T* const panel = a.w_hh_t[p] + b0 * a.hh_block[p];
          const T* const after = a.w_hh_t[p] + (share.b0 + next.begin) * a.hh_block[p];
          run_batch(batch, n, t, panel, segments, piece.segments, [&](int64_t tile) {
            const bool cut = piece.segments < segments;  // then the next rows begin with the panel's first piece
            const T* const next_panel = cut && i + 1 < row.pieces ? panel : after;
            return next_panel_share<T, 1>(next_panel, t.b_block, piece.segments * t.k, b1 - b0, cut ? tile : i);
          });
          for (int r = 0; r < n; ++r) then(share.row(i0 + r), b0, b1, batch.result(r));
        }
      }
    }
  }

  // Where the cells of row j at step s have what they need, from the first hidden unit on. Found once for several blocks:
  // the compiler cannot know that what is stored meanwhile changes none of it.
  struct RowAt {
    const T *dy, *h, *h_prev, *saved;
    T *slot_grads, *dcarry[Cell::states];
    ptrdiff_t slot_grads_block;
    FUSEDRNN_INLINE RowAt(const Backward& w, int64_t s, int64_t now, int64_t j)
        : dy(w.a.dy.base ? w.a.dy.at(s, j) : nullptr), h(w.f.y.at(s, j)), h_prev(w.layer.h_prev(s, j)),
          saved(w.layer.saved(s, j, 0)), slot_grads(w.slot_grads(0, now + j)), slot_grads_block(w.a.slot_grads_block) {
      for (int i = 0; i < Cell::states; ++i) dcarry[i] = w.a.dcarry[i] + j * w.padded;
    }
  };

  template <int q, bool full>
  FUSEDRNN_INLINE void cell(const RowAt& at, int64_t b, int width, const T* product) const {
    const Lanes<T, full> lanes{width};
    constexpr Span operand = Cell::recurrent[forward_phase<Cell>(q)];  // of this phase's product
    const int64_t u = b * L;
    V slot[Cell::slots], carry[Cell::states], save[Cell::saved + 1];
    V grad = V::load(product);
    if (q == 0 && at.dy) grad = grad + lanes.load(at.dy + u);
#pragma GCC unroll 8
    for (int i = 0; i < Cell::states; ++i) carry[i] = V::load(at.dcarry[i] + u);
    const T* const saved = at.saved + u * Cell::saved;
#pragma GCC unroll 8
    for (int i = 0; i < Cell::saved; ++i) save[i] = lanes.load(saved + i * lanes.stride());
    T* const to = at.slot_grads + b * at.slot_grads_block;
#pragma GCC unroll 8
    for (int i = 0; i < Cell::slots; ++i) slot[i] = q == 0 ? V(T(0)) : V::load(to + i * L);
    Cell::template backward<q>(grad, slot, carry, save, lanes.load(at.h + u), lanes.load(at.h_prev + u));
#pragma GCC unroll 8
    for (int i = 0; i < Cell::slots; ++i)
      if (q == 0 || !contains(operand, i))  // not those that other threads still read
        lanes.clear_rest(slot[i]).store(to + i * L);
#pragma GCC unroll 8
    for (int i = 0; i < Cell::states; ++i) carry[i].store(at.dcarry[i] + u);
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

  // Packs x, h and later phases' operands as panels for the outer products. Where those go by columns, a thread packs about
  // the columns that it reads there.
  void pack_operands(int64_t hi, int64_t rows) const {
    const Cut input = tasks(ceil_div(f.I, L)), hidden = tasks(blocks);
    pack_rows(hi, rows, input.begin(team.rank), input.begin(team.rank + 1), f.I, a.x_panel,
              [&](int64_t s, int64_t j) { return f.x.at(s, j); });
    for (int p = 0; p < Cell::phases; ++p)
      pack_rows(hi, rows, hidden.begin(team.rank), hidden.begin(team.rank + 1), H, a.h_panel[p],
                [&](int64_t s, int64_t j) { return p == 0 ? layer.h_prev(s, j) : layer.operand(s, j); });
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

  // Of an outer product: block b of the hidden units by vectors [v0, v1) of the columns.
  struct OuterTask {
    Span span;
    int64_t N;
    const T* panel;
    T *dw, *sum;
    int64_t b, v0, v1;
    bool to_next_block;  // this rank's next task is of block b + 1, so its gradients are prefetched
  };

  // dw[gate(slot) * H + u][n] += sum over rows of slot_grads[slot, u] * panel[n], for the slots of a span.
  //
  // `sum` is null where dw itself can be the running sum: all rows of the pass make one block of the reduction, and there is
  // nothing to add to. Else the tiles accumulate in `sum`, which at each border, every reduction_rows rows, goes to dw: in
  // block order, which fixes the bits.
  void outer_product(Span span, int64_t N, const T* panel, T* dw, T* sum, int64_t rows, int64_t done, bool last) const {
    constexpr int wide = outer_tile_vectors;
    const Cut columns{ceil_div(N, L), ceil_div(ceil_div(N, L), wide)};
    const Cut cut = tasks(blocks * columns.pieces);
    // A task multiplies a block's gradients, count vectors a row, with `wide` vectors a row of the panel. Tasks that follow one
    // another share the larger of the two.
    const bool by_columns = span.count < wide;
    for (int64_t i = cut.begin(team.rank); i < cut.begin(team.rank + 1); ++i) {
      const int64_t b = by_columns ? i % blocks : i / columns.pieces;
      const int64_t g = by_columns ? i / blocks : i % columns.pieces;
      const bool to_next_block =
          prefetches && b + 1 < blocks && i + 1 < cut.begin(team.rank + 1) && (by_columns || g + 1 == columns.pieces);
      const OuterTask task{span, N, panel, dw, sum, b, columns.begin(g), columns.begin(g + 1), to_next_block};
      for (int64_t r0 = 0, r1; r0 < rows; r0 = r1) {  // up to the next border
        r1 = smallest(rows, r0 + reduction_rows - (done + r0) % reduction_rows);
        const bool starts = (done + r0) % reduction_rows == 0;
        const bool flush = sum && ((done + r1) % reduction_rows == 0 || (last && r1 == rows));
        reduce_block(task, r0, r1, starts, flush, a.adds || done + r0 >= reduction_rows);
      }
    }
  }

  // Adds a task's rows [r0, r1) of the chunk, which lie in one block of the reduction, to the running sum. `starts`: they are
  // the block's first, so the sum starts from zeros. `flush`: they are its last, so the sum goes to dw, which it `adds` to or
  // else overwrites.
  FUSEDRNN_INLINE void reduce_block(const OuterTask& task, int64_t r0, int64_t r1, bool starts, bool flush, bool adds) const {
    constexpr int wide = outer_tile_vectors;
    const int64_t b = task.b, N = task.N, n0 = task.v0 * L, vectors = task.v1 - task.v0;
    const int64_t width = smallest(N - n0, vectors * L);
    const bool whole = width == vectors * L;
    const Cut lane{block_width<T>(H, b), ceil_div(block_width<T>(H, b), tile_max_rows(wide))};
    const int64_t tiles = task.span.count * lane.pieces;
    T *const dw = task.dw, *const sum = task.sum ? task.sum : dw;
    const auto first_row = [&](int64_t i) {  // of tile i in dw
      return (Cell::slot_gate[task.span.first + i / lane.pieces] * H + b * L + lane.begin(i % lane.pieces)) * N + n0;
    };
    alignas(64) T scratch[8 * wide * L];
    Tile<T> t;
    t.segments = 1, t.a_stride = slots, t.b_block = panel_stride;
    t.k = r1 - r0;
    t.b = task.panel + task.v0 * t.b_block + r0 * L;
    t.cin_block = starts ? 0 : L, t.cout_block = L;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t lane0 = lane.begin(i % lane.pieces), row = first_row(i);
      const int n = int(lane.begin(i % lane.pieces + 1) - lane0);
      T* to = sum + row;
      if (i + 1 < tiles)
        for (int r = 0; r < n; ++r) prefetch<true>(sum + first_row(i + 1) + r * N, width);
      t.a[0] = slot_grads(b, batch + r0) + (task.span.first + i / lane.pieces) * L + lane0;
      for (int r = 0; r < n; ++r) {
        t.cout[r] = whole ? to + r * N : scratch + r * wide * L;
        t.cin[r] = starts ? f.zeros : t.cout[r];
        if (!starts && !whole)
          for (int64_t v = 0; v < width; ++v) t.cout[r][v] = to[r * N + v];
      }
      // The i-th share of the next block's gradients, all of which are one piece of memory.
      t.prefetch_from = task.to_next_block && i < Cell::slots ? slot_grads(b + 1, batch + r0) + i * t.k * L : nullptr;
      run_products<1, Layout::columns>(n, int(vectors), t);
      if (!whole)
        for (int r = 0; r < n; ++r)
          for (int64_t v = 0; v < width; ++v) to[r * N + v] = t.cout[r][v];
      if (flush)
        for (int r = 0; r < n; ++r) add_to(dw + row + r * N, to + r * N, width, adds);
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
          for (int i = 0; i < Cell::slots; ++i) acc[i] += V::load(slot_grads(b, batch + r) + i * L);
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
    for (int64_t s = lo; s <= hi; ++s) rows += layer.running(s);
    if (rows == 0) return;
    const Tiling tiling(rows, ceil_div(f.I, L), 1);
    const Cut mine{tiling.block.pieces, team.plan.unit_threads};
    Batch batch;
    Tile<T> t;
    t.k = Cell::input.count * L, t.a_segment = a.slot_grads_block;
    t.b_block = a.ih_block, t.cin_block = 0;
    for (int64_t g = mine.begin(share.unit); g < mine.begin(share.unit + 1); ++g) {
      const int64_t n0 = tiling.block.begin(g), vectors = tiling.block.begin(g + 1) - n0;
      const int64_t width = smallest(f.I - n0 * L, vectors * L);
      batch.vectors = int(vectors), batch.direct = !a.dx_adds && width == vectors * L;
      const Pieces piece(t.k, blocks, rows, vectors);
      const Cut row{rows, ceil_div(rows, piece.rows)};
      const bool cut = piece.segments < blocks;
      t.prefetch_segment = cut ? t.k * L : t.a_segment;
      // The share's row `own` of `here` at step s; row (s, j) of the chunk is number before + j.
      int64_t s = hi, own = 0, here = layer.running(hi), before = 0;
      for (int64_t i = 0; i < row.pieces; ++i) {
        const int n = int(row.begin(i + 1) - row.begin(i));
        for (int r = 0; r < n; ++r, ++own) {
          while (own >= here) before += f.schedule.active[s], --s, own = 0, here = layer.running(s);
          const int64_t j = share.row(own);
          batch.a[r] = slot_grads(0, this->batch + before + j) + Cell::input.first * L;
          batch.cin[r] = f.zeros;
          batch.out[r] = a.dx.at(s, j) + n0 * L;
          prefetch<true>(batch.out[r], width);  // the tile's stores would wait for it
        }
        const T* const panel = a.w_ih_t + n0 * a.ih_block;
        run_batch(batch, n, t, panel, blocks, piece.segments, [&](int64_t tile) {
          if (!cut) return i + 1 < row.pieces ? batch.a[0] + n * share.stride * slots : nullptr;  // the next rows' gradients
          return next_panel_share<T, 1>(panel, t.b_block, piece.segments * t.k, vectors, tile);
        });
        if (!batch.direct)
          for (int r = 0; r < n; ++r) add_to(batch.out[r], batch.result(r), width, a.dx_adds);
      }
    }
  }
};

}  // namespace fusedrnn::FUSEDRNN_TARGET
