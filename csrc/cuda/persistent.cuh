// The kernel of the persistent path: see persistent.h for the way the work is cut. One source for every cell, type,
// pass and exchange. A step goes, for each of the cell's phases: wait for the operand, product with the weights that
// are on chip, partial sums meet in shared memory, the cell, hand the new values to all blocks of the group, then write
// what nobody waits for.
//
// Nothing else keeps blocks in step. The operand has two buffers, used in turn, and that is enough: a block that hands
// over part n has had every part n-1, and whoever gave part n-1 was done reading the operand n-2 that part n replaces.
#pragma once

#include "cuda/check.h"
#include "cuda/persistent_exchange.cuh"
#include "cuda/persistent_product.cuh"

namespace fusedrnn::cuda {

// Slots of the widest operand; the slots' gates, four bits each, since device code cannot index Cell::slot_gate.
template <class Cell>
constexpr int most_operand_slots(bool backward) {
  int most = 1;
  for (int q = 0; backward && q < Cell::phases; ++q) most = Cell::recurrent[q].count > most ? Cell::recurrent[q].count : most;
  return most;
}
template <class Cell>
constexpr int pack_slot_gates() {
  int gates = 0;
  for (int s = 0; s < Cell::slots; ++s) gates |= Cell::slot_gate[s] << 4 * s;
  return gates;
}

template <class T, class Cell, bool backward, class Hands>
struct Persistent {
  using V = Scalar<float>;
  using Args = std::conditional_t<backward, BackwardArgs<T>, ForwardArgs<T>>;
  static constexpr int phases = Cell::phases, pairs = persistent_pairs;
  static constexpr int vector = 16 / int(sizeof(T)), chunk = chunk_bytes / int(sizeof(T));
  static constexpr int operand_slots = most_operand_slots<Cell>(backward), gates_of_slots = pack_slot_gates<Cell>();
  static constexpr int vectors = 32 / vector;  // of the values that a warp's lanes hold, one each

  template <int q>
  static constexpr int in_registers = chunks_in_registers(sizeof(T), backward, phases, q);
  template <int q>
  struct Held {  // a warp's weights
    Words w[in_registers<q>][4];
  };

  const PersistentPlan& plan;
  const Args& a;
  const ForwardArgs<T>& f;
  const Hands exchange;
  const int lane = lane_of_thread(), warp = warp_of_thread(), g = lane / 4, quarter = lane % 4;
  const int slice = int(blockIdx.x) / plan.blocks, first_unit = int(blockIdx.x) % plan.blocks * plan.units;
  const int first_row = slice * plan.columns;  // sequence of the batch
  const int width = f.schedule.batch - first_row < plan.columns ? f.schedule.batch - first_row : plan.columns;
  const int begin = backward ? 0 : f.begin;  // the steps to run: [begin, steps)
  const int steps = backward || f.schedule.length[first_row] < f.end ? f.schedule.length[first_row] : f.end;

  // Pair p of this thread: a hidden unit of a sequence. None where length is 0.
  struct Pair {
    int unit, sequence;  // of all; of the batch, sorted
    int length;
    int at;                // in a slot's rows of the tile
    int row, next, after;  // packed rows of the step whose values were asked for and of the two that follow
  } pair[pairs];
  struct Vector {      // 16 bytes of the operand that this lane gives to some of the blocks
    int column, unit;  // of the slice; of the block. column < 0: none
  } give[pairs];
  Held<0> held0;
  Held<phases - 1> held1;

  __device__ __forceinline__ Persistent(const PersistentPlan& plan, const Args& a, const ForwardArgs<T>& f, Hands exchange)
      : plan(plan), a(a), f(f), exchange(exchange) {
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      const int e = p * persistent_threads + int(threadIdx.x), column = e / plan.units, u = e % plan.units;
      const bool there = column < width && first_unit + u < f.H;
      const int j = there ? first_row + column : 0;
      pair[p] = {there ? first_unit + u : 0, j, there ? f.schedule.length[j] : 0, column * plan.tile_rows + u, 0, 0, 0};
      const int v = p * persistent_threads + warp * 32 + lane % vectors * vector;
      give[p] = {v / plan.units < width ? v / plan.units : -1, v % plan.units};
    }
  }

  template <int q>
  __device__ __forceinline__ auto& held() {
    if constexpr (q == 0)
      return held0.w;
    else
      return held1.w;
  }
  template <int q>
  __device__ __forceinline__ int buffer() const {
    return plan.stage[q].operand_bytes(plan.columns, sizeof(T));
  }
  template <int q>
  __device__ __forceinline__ unsigned arriving() const {
    return unsigned(width * plan.stage[q].slots * plan.blocks * plan.units) * unsigned(sizeof(T));
  }
  __device__ __forceinline__ T* staging() const {  // [pair][slot][32] of this warp
    return reinterpret_cast<T*>(shared_memory<unsigned char>() + plan.staging) + warp * 32 * pairs * operand_slots;
  }
  __device__ __forceinline__ float* tile() const {
    return reinterpret_cast<float*>(shared_memory<unsigned char>() + plan.tile);
  }

  // ---- the weights

  // 16 bytes of the weights: this block's row, from element k of the operand on; 0 where there is no such row or unit.
  template <int q>
  __device__ __forceinline__ Words weights(int row, int k) const {
    const int padded = plan.blocks * plan.units, H = f.H;
    const int slot = row / plan.units, unit = first_unit + row % plan.units;  // of the result
    const int from = k % padded, part = k / padded;                           // unit and slot of the operand
    Words words = no_words();
    if (row >= plan.stage[q].rows || part >= plan.stage[q].slots || unit >= H || from >= H) return words;
    const T* w;
    if constexpr (backward)
      w = a.w_hh_t[q] + (int64_t(unit) * Cell::recurrent[q].count + part) * H + from;
    else
      w = f.w_hh + (int64_t(gates_of_slots >> 4 * (Cell::recurrent[q].first + slot) & 15) * H + unit) * H + from;
    if (from + vector <= H && uint64_t(w) % 16 == 0) {
      words = *reinterpret_cast<const Words*>(w);
    } else {
      // Elements come in at the upper end and push one another down: less to compile, 32 times, than a place for each.
      constexpr int bits = 8 * sizeof(T);
      uint64_t low = 0, high = 0;
#pragma unroll 1
      for (int i = 0; i < vector; ++i) {
        uint64_t element = 0;
        if (from + i < H) memcpy(&element, w + i, sizeof(T));
        low = low >> bits | high << (64 - bits), high = high >> bits | element << (64 - bits);
      }
      memcpy(words.w, &low, 8), memcpy(words.w + 2, &high, 8);
    }
    if (sizeof(T) == 4 && plan.tf32)
#pragma unroll
      for (int i = 0; i < 4; ++i) words.w[i] = round_to_tf32(words.w[i]);
    return words;
  }
  template <int q>
  __device__ __forceinline__ Words* spilled(int i, int r) const {  // chunk i beyond those in registers
    return reinterpret_cast<Words*>(shared_memory<unsigned char>() + plan.stage[q].weights) +
           ((i * plan.stage[q].row_warps * plan.stage[q].depth_warps + warp) * 4 + r) * 32 + lane;
  }
  // The chunks of k that are this warp's.
  template <int q>
  __device__ __forceinline__ int chunks(int& first) const {
    const Stage& s = plan.stage[q];
    first = warp / s.row_warps * s.warp_chunks;
    const int n = s.chunks - first;
    return warp >= s.row_warps * s.depth_warps || n < 0 ? 0 : n < s.warp_chunks ? n : s.warp_chunks;
  }

  template <int q>
  __device__ __forceinline__ void load_weights() {
    int first;
    const int n = chunks<q>(first), fold = plan.stage[q].fold;
    const int row = warp % plan.stage[q].row_warps * row_tile / fold + g;
    const auto load = [&](int i, int r) {
      const int at = fold == 2 ? 2 * i + r / 2 : i;
      return at < n ? weights<q>(row + 8 * (fold == 2 ? r % 2 : r), (first + at) * chunk + quarter * vector) : no_words();
    };
#pragma unroll
    for (int i = 0; i < in_registers<q>; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) held<q>()[i][r] = load(i, r);
    for (int i = in_registers<q>; i * fold < n; ++i)
      for (int r = 0; r < 4; ++r) *spilled<q>(i - in_registers<q>, r) = load(i, r);
  }

  // ---- a step's product

  // Leaves the partial sums of stage q's product in the tile, which holds them until the next.
  template <int q, class Number, int fold>
  __device__ __forceinline__ void multiply(int k) {
    constexpr int group = Product<Number>::group > 1 ? Product<Number>::group / fold : 1;
    const Stage& s = plan.stage[q];
    int first;
    const int n = chunks<q>(first);
    const T* operand = reinterpret_cast<const T*>(exchange.operand(q, k, buffer<q>())) + first * chunk + quarter * vector;
    float* to = tile() + warp / s.row_warps * plan.tile_columns() * plan.tile_rows + warp % s.row_warps * (row_tile / fold);
    if (n == 0 && warp >= s.row_warps * s.depth_warps) return;
    constexpr int columns = Product<Number>::columns;
    for (int c = 0; c < width; c += columns, operand += columns * s.stride, to += columns * plan.tile_rows) {
      Product<Number> sum;
      const auto load = [&](int i) {
        const auto at = [&](int column) {  // of some other sequence where there is none: its result is not used
          return *reinterpret_cast<const Words*>(operand + (c + column < width ? column : 0) * s.stride + i * chunk);
        };
        return i < n ? Product<Number>::load(at, g) : Product<Number>::none();
      };
#pragma unroll
      for (int i = 0; i < in_registers<q>; i += group) {
        if (i * fold < n) {
          typename Product<Number>::Operand b[group][fold];
#pragma unroll
          for (int j = 0; j < group; ++j)
#pragma unroll
            for (int m = 0; m < fold; ++m)
              b[j][m] = i + j < in_registers<q> ? load((i + j) * fold + m) : Product<Number>::none();
#pragma unroll
          for (int j = 0; j < group; ++j)
            if (i + j < in_registers<q>) sum.add(held<q>()[i + j], b[j][0], b[j][fold - 1]);
        }
      }
#pragma unroll(sizeof(T) == 2 ? 2 : 1)
      for (int i = in_registers<q>; i * fold < n; ++i) {
        typename Product<Number>::Operand b[fold];
#pragma unroll
        for (int m = 0; m < fold; ++m) b[m] = load(i * fold + m);
        Words w[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) w[r] = *spilled<q>(i - in_registers<q>, r);
        sum.add(w, b[0], b[fold - 1]);
      }
      sum.template store<fold>(to, plan.tile_rows, g, quarter);
    }
  }

  template <int q, int fold>
  __device__ __forceinline__ void multiply_folded(int k) {
    if constexpr (sizeof(T) == 2)
      multiply<q, T, fold>(k);
    else if (plan.tf32)
      multiply<q, Tf32, fold>(k);
    else if (width > 2)
      multiply<q, float, fold>(k);
    else
      multiply<q, OneSequence, fold>(k);
  }

  // Operand k of stage q is awaited and multiplied; then add_sums finds results.
  template <int q>
  __device__ __forceinline__ void product(int k) {
    exchange.wait(q, k, buffer<q>(), arriving<q>(), width);
    if constexpr (backward || Cell::recurrent[q].count == 1) {
      if (plan.stage[q].fold == 2)
        multiply_folded<q, 2>(k);
      else
        multiply_folded<q, 1>(k);
    } else {
      multiply_folded<q, 1>(k);
    }
    sync_block();
  }
  // Adds what the warps found of pair p in slots 0 .. count - 1 of the result, in their order.
  template <int q, int count>
  __device__ __forceinline__ void add_sums(int p, V* to) const {
    const float* at = tile() + pair[p].at;
    const int next = plan.tile_columns() * plan.tile_rows, n = plan.stage[q].depth_warps;
    constexpr int together = count == 1 ? persistent_warps : 2;  // as many loads as fill the time until the first is there
    float total[count] = {};
    for (int d = 0; d < n; d += together, at += together * next) {
      float part[together][count];
#pragma unroll
      for (int i = 0; i < together; ++i)
#pragma unroll
        for (int slot = 0; slot < count; ++slot) part[i][slot] = d + i < n ? at[i * next + slot * plan.units] : 0.0f;
#pragma unroll
      for (int i = 0; i < together; ++i)
#pragma unroll
        for (int slot = 0; slot < count; ++slot) total[slot] += part[i][slot];
    }
#pragma unroll
    for (int slot = 0; slot < count; ++slot) to[slot] += V(total[slot]);
  }

  // ---- handing over

  __device__ __forceinline__ void stage_value(int p, int slot, T value) const {
    staging()[(p * operand_slots + slot) * 32 + lane] = value;
  }
  // Gives what was staged as number k of operand q. Before a sequence's first step and after its last, what is staged
  // is what was, finite or not: no other sequence sees it.
  template <int q>
  __device__ __forceinline__ void hand_over(int k) const {
    sync_warp();
    const Stage& s = plan.stage[q];
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      if (give[p].column < 0) continue;
      const int to = give[p].column * s.stride + first_unit + give[p].unit;
      for (int slot = 0; slot < s.slots; ++slot) {
        const Words words =
            *reinterpret_cast<const Words*>(staging() + (p * operand_slots + slot) * 32 + lane % vectors * vector);
        exchange.give(q, k, buffer<q>(), (to + slot * plan.blocks * plan.units) * int(sizeof(T)), words, lane / vectors,
                      32 / vectors);
      }
    }
    exchange.given(q, k);  // the next values are staged after the next product's barrier
  }

  // Weights, zeros where an operand or a staged value is read before it is written, barriers.
  __device__ __forceinline__ void start() {
    load_weights<0>();
    if constexpr (phases > 1) load_weights<1>();
    for (int i = 0; i < pairs * operand_slots; ++i) staging()[i * 32 + lane] = narrow<T>(0);
    zero<0>();
    exchange.start(0, arriving<0>());
    if constexpr (phases > 1) {
      zero<1>();
      exchange.start(1, arriving<1>());
    }
    exchange.sync_group();
  }
  template <int q>
  __device__ __forceinline__ void zero() const {
    for (int k = 0; k < (Hands::kind == Exchange::cluster ? 2 : 1); ++k)
      for (int i = int(threadIdx.x) * 16; i < buffer<q>(); i += persistent_threads * 16)
        *reinterpret_cast<Words*>(exchange.operand(q, k, buffer<q>()) + i) = no_words();
  }

  __device__ __forceinline__ bool runs(int p, int s) const { return s < pair[p].length; }
  // The packed row of step s; some row where there is no such step.
  __device__ __forceinline__ int row(int p, int s) const {
    return s >= 0 && runs(p, s) ? int(f.schedule.row(s, pair[p].sequence)) : 0;
  }
  __device__ __forceinline__ int64_t state_at(int p) const {
    return int64_t(f.schedule.from[pair[p].sequence]) * f.H + pair[p].unit;
  }

  __device__ __forceinline__ int64_t carry_at(int p) const { return int64_t(pair[p].sequence) * f.H + pair[p].unit; }

  // ---- forward

  V bias[backward ? 1 : pairs][Cell::slots], state[pairs][Cell::states], slot[pairs][Cell::slots];
  float input[backward ? 1 : pairs][Cell::input.count];

  // Asks for the input of step s, whose row is known, and for the row of the next.
  __device__ __forceinline__ void ask_forward(int s) {
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      pair[p].row = pair[p].next;
      if (!runs(p, s)) continue;
#pragma unroll
      for (int i = 0; i < Cell::input.count; ++i)
        input[p][i] = f.input[(int64_t(pair[p].row) * Cell::input.count + i) * f.H + pair[p].unit];
      pair[p].next = row(p, s + 1);
    }
  }

  __device__ __forceinline__ void run_forward() {
    if (steps <= begin) return;
    start();
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      pair[p].next = row(p, begin);
#pragma unroll
      for (int i = 0; i < Cell::slots; ++i) bias[p][i] = V(pair[p].length > 0 ? f.bias[i * f.H + pair[p].unit] : 0.0f);
#pragma unroll
      for (int i = 0; i < Cell::states; ++i) {
        float v = 0;
        if (begin == 0 && f.state[i] && runs(p, 0)) v = widen(f.state[i][state_at(p)]);
        if (begin > 0 && runs(p, begin))
          v = i == 0 ? widen(f.y[row(p, begin - 1) * f.y_row + pair[p].unit]) : f.carry[carry_at(p)];
        state[p][i] = V(v);
      }
      stage_value(p, 0, narrow<T>(state[p][0].r));
    }
    hand_over<0>(0);
    ask_forward(begin);
    for (int s = begin; s < steps; ++s) {
#pragma unroll
      for (int p = 0; p < pairs; ++p)
#pragma unroll
        for (int i = 0; i < Cell::slots; ++i) {
          const int fed = i - Cell::input.first;
          slot[p][i] = bias[p][i];
          if (fed >= 0 && fed < Cell::input.count) slot[p][i] += V(input[p][fed]);
        }
      forward_phase<0>(s);
    }
    if constexpr (Cell::states > 1)
#pragma unroll
      for (int p = 0; p < pairs; ++p)
        if (runs(p, steps)) f.carry[carry_at(p)] = state[p][1].r;
    exchange.sync_group();  // no block leaves while another may write to it
  }

  template <int q>
  __device__ __forceinline__ void forward_phase(int s) {
    constexpr Span span = Cell::recurrent[q];
    constexpr bool last = q + 1 == phases;
    V save[pairs][Cell::saved + 1], operand[pairs];
    product<q>(s - begin);
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      if (!runs(p, s)) continue;
      add_sums<q, span.count>(p, slot[p] + span.first);
      Cell::template forward<q>(slot[p], state[p], save[p], &operand[p]);
      const T value = narrow<T>((last ? state[p][0] : operand[p]).r);
      if (last) state[p][0] = V(widen(value));  // h is what y holds
      stage_value(p, 0, value);
    }
    if (!last || s + 1 < steps) hand_over<last ? 0 : q + 1>((last ? s + 1 : s) - begin);
    int64_t at[pairs];  // rows of step s
#pragma unroll
    for (int p = 0; p < pairs; ++p) at[p] = pair[p].row;
    if (last && s + 1 < steps) ask_forward(s + 1);
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      if (!runs(p, s)) continue;
      const int unit = pair[p].unit;
      if constexpr (!last) {
        f.operand[(f.saved ? at[p] : pair[p].sequence) * f.H + unit] = narrow<T>(operand[p].r);
      } else {
        f.y[at[p] * f.y_row + unit] = narrow<T>(state[p][0].r);
        if (f.saved)
#pragma unroll
          for (int i = 0; i < Cell::saved; ++i) f.saved[(at[p] * Cell::saved + i) * f.H + unit] = narrow<T>(save[p][i].r);
        if (s + 1 == pair[p].length)
#pragma unroll
          for (int i = 0; i < Cell::states; ++i) f.final_state[i][state_at(p)] = narrow<T>(state[p][i].r);
      }
    }
    if constexpr (!last) forward_phase<q + 1>(s);
  }

  // ---- backward: `state` holds the carry, `slot` the slots' gradients

  T saved[backward ? pairs : 1][Cell::saved + 1], dy[backward ? pairs : 1], h[backward ? pairs : 1],
      h_prev[backward ? pairs : 1];

  // Asks for what the forward pass left of step s and for dy. Rows are known of s and s - 1, and asked for of s - 2.
  __device__ __forceinline__ void ask_backward(int s) {
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      const int unit = pair[p].unit;
      pair[p].row = pair[p].next;
      pair[p].next = pair[p].after;
      pair[p].after = row(p, s - 2);
      if (!runs(p, s)) continue;
      const int64_t now = pair[p].row, before = pair[p].next;
#pragma unroll
      for (int i = 0; i < Cell::saved; ++i) saved[p][i] = f.saved[(now * Cell::saved + i) * f.H + unit];
      dy[p] = a.dy ? a.dy[now * a.dy_row + unit] : narrow<T>(0);
      h[p] = f.y[now * f.y_row + unit];
      if (s > 0)
        h_prev[p] = f.y[before * f.y_row + unit];
      else
        h_prev[p] = f.state[0] ? f.state[0][state_at(p)] : narrow<T>(0);
    }
  }

  __device__ __forceinline__ void run_backward() {
    if (steps == 0) return;
    start();
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      pair[p].next = row(p, steps - 1), pair[p].after = row(p, steps - 2);
#pragma unroll
      for (int i = 0; i < Cell::states; ++i)
        state[p][i] = V(a.dfinal_state[i] && pair[p].length > 0 ? widen(a.dfinal_state[i][state_at(p)]) : 0.0f);
    }
    ask_backward(steps - 1);
    for (int s = steps - 1; s >= 0; --s) backward_stage<0>(s);
    if (a.dstate[0]) product<0>(steps - 1);
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      if (pair[p].length == 0) continue;
      if (a.dstate[0]) add_sums<0, 1>(p, &state[p][0]);
#pragma unroll
      for (int i = 0; i < Cell::states; ++i)
        if (a.dstate[i]) a.dstate[i][state_at(p)] = narrow<T>(state[p][i].r);
    }
    exchange.sync_group();
  }

  template <int q>
  __device__ __forceinline__ void backward_stage(int s) {
    constexpr bool last = q + 1 == phases;
    constexpr int next = last ? 0 : q + 1;  // the stage that these gradients feed
    constexpr Span fed = Cell::recurrent[next];
    const int k = steps - 1 - s;  // how many operands of each stage were given before
    if (q > 0 || k > 0) product<q>(q == 0 ? k - 1 : k);
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      if (!runs(p, s)) continue;
      V save[Cell::saved + 1];
#pragma unroll
      for (int i = 0; i < Cell::saved; ++i) save[i] = V(widen(saved[p][i]));
      V grad(0.0f);
      if (q == 0) grad = state[p][0] + V(widen(dy[p]));
      if (q > 0 || runs(p, s + 1)) add_sums<q, 1>(p, &grad);
      Cell::template backward<q>(grad, slot[p], state[p], save, V(widen(h[p])), V(widen(h_prev[p])));
#pragma unroll
      for (int i = 0; i < fed.count; ++i) stage_value(p, i, narrow<T>(slot[p][fed.first + i].r));
    }
    if (!last || s > 0 || a.dstate[0]) hand_over<next>(k);
    if constexpr (last) {
      int64_t at[pairs];
#pragma unroll
      for (int p = 0; p < pairs; ++p) at[p] = pair[p].row;
      const bool ran[pairs] = {runs(0, s), runs(pairs - 1, s)};
      if (s > 0) ask_backward(s - 1);
#pragma unroll
      for (int p = 0; p < pairs; ++p) {
        if (!ran[p]) continue;
#pragma unroll
        for (int i = 0; i < Cell::slots; ++i) a.gates[(at[p] * Cell::slots + i) * f.H + pair[p].unit] = narrow<T>(slot[p][i].r);
      }
    } else {
      backward_stage<q + 1>(s);
    }
  }
};

template <class T, class Cell, bool backward, class Hands>
__global__ void __launch_bounds__(persistent_threads, 1)
    persistent_kernel(const __grid_constant__ PersistentPlan plan,
                      const __grid_constant__ std::conditional_t<backward, BackwardArgs<T>, ForwardArgs<T>> args,
                      unsigned char* workspace) {
  // A build for a GPU without clusters has these kernels too, empty: no plan launches them.
  if constexpr (FUSEDRNN_CLUSTERS || std::is_same_v<Hands, GridExchange>) {
    Hands exchange{plan};
    if constexpr (std::is_same_v<Hands, GridExchange>)
      exchange.workspace = workspace + int64_t(blockIdx.x) / plan.blocks * plan.workspace_slice;
    if constexpr (backward)
      Persistent<T, Cell, true, Hands>(plan, args, args.forward, exchange).run_backward();
    else
      Persistent<T, Cell, false, Hands>(plan, args, args, exchange).run_forward();
  }
}

// ---- host: a file of a few lines instantiates these for one T

template <class T, class Cell, bool backward, class Args>
bool launch_persistent(const PersistentPlan& plan, const Args& args, void* workspace, cudaStream_t stream) {
  const bool grid = plan.exchange == Exchange::grid;
  const char* const name = backward ? "persistent backward" : "persistent forward";
  Launch how;
  how.grid = dim3(unsigned(plan.blocks * plan.slices)), how.block = dim3(persistent_threads);
  how.shared = size_t(plan.shared_bytes), how.stream = stream;
  how.cluster = grid ? 1 : plan.blocks, how.cooperative = grid;
  if (grid) FUSEDRNN_CUDA(cudaMemsetAsync(workspace, 0, size_t(plan.workspace_bytes()), stream));
  const cudaError_t code = try_launch(
      name, how,
      grid ? persistent_kernel<T, Cell, backward, GridExchange> : persistent_kernel<T, Cell, backward, ClusterExchange>, plan,
      args, static_cast<unsigned char*>(workspace));
  if (is_refusal(code)) return cudaGetLastError(), false;
  check(code, name);
  return true;
}

template <class T>
bool persistent_forward(int cell, const PersistentPlan& plan, const ForwardArgs<T>& args, void* workspace,
                        cudaStream_t stream) {
  int number = 0;
#define FUSEDRNN_LAUNCH(Cell) \
  if (cell == number++) return launch_persistent<T, Cell, false>(plan, args, workspace, stream);
  FUSEDRNN_FOR_EACH_CELL(FUSEDRNN_LAUNCH)
#undef FUSEDRNN_LAUNCH
  return false;
}

template <class T>
bool persistent_backward(int cell, const PersistentPlan& plan, const BackwardArgs<T>& args, void* workspace,
                         cudaStream_t stream) {
  int number = 0;
#define FUSEDRNN_LAUNCH(Cell) \
  if (cell == number++) return launch_persistent<T, Cell, true>(plan, args, workspace, stream);
  FUSEDRNN_FOR_EACH_CELL(FUSEDRNN_LAUNCH)
#undef FUSEDRNN_LAUNCH
  return false;
}

#define FUSEDRNN_PERSISTENT(T)                                                                                 \
  template bool persistent_forward<T>(int, const PersistentPlan&, const ForwardArgs<T>&, void*, cudaStream_t); \
  template bool persistent_backward<T>(int, const PersistentPlan&, const BackwardArgs<T>&, void*, cudaStream_t);

}  // namespace fusedrnn::cuda
