// The kernel of the persistent path: see persistent.h for the way the work is cut. One source for every cell, type,
// pass and exchange. A step goes, for each of the cell's phases: wait for the operand, product with the weights that
// are on chip, partial sums meet in shared memory, the cell, hand the new values to all blocks of the group, then write
// what nobody waits for.
//
// Nothing else keeps blocks in step. Of a cluster, the operand has two buffers, used in turn, and that is enough: a block
// that gives part n has had every part n-1, and whoever gave part n-1 was done reading the operand n-2 that part n replaces.
#pragma once

#include "cuda/persistent_exchange.cuh"
#include "cuda/persistent_weights.cuh"
#include "cuda/projection.cuh"
#include "cuda/quick_activations.cuh"

namespace fusedrnn::cuda {

// Calls call(std::integral_constant<int, n>), of low <= n <= high; soonest where n is `high`.
template <int low, int high, class Call>
__device__ __forceinline__ void by_count(int n, Call call) {
  constexpr int middle = (low + high) / 2;
  if (low == high || n == high) {
    call(std::integral_constant<int, high>());
  } else if constexpr (low < high) {
    if (n > middle)
      by_count<(middle + 1 < high ? middle + 1 : high), (high - 1 > middle ? high - 1 : high)>(n, call);
    else
      by_count<low, middle>(n, call);
  }
}

// `simple`: all sequences have as many steps, and a thread has one pair. Most layers are so, and a step then has half of the
// branches, each of which takes some 30 cycles that nothing hides.
template <class T, class Cell, bool backward, template <bool> class Hand, bool simple>
struct Persistent {
  using V = CellValue<T>;
  using Args = std::conditional_t<backward, BackwardArgs<T>, ForwardArgs<T>>;
  using Hands = Hand<simple>;
  static constexpr int phases = Cell::phases, pairs = simple ? 1 : persistent_pairs;
  static constexpr int vector = 16 / int(sizeof(T)), chunk = chunk_bytes / int(sizeof(T));
  // Where some blocks may project the input for the others.
  static constexpr bool projects = !backward && simple && sizeof(T) == 2;

  template <int q>
  static constexpr int results = StageWeights<T, Cell, backward, q, false>::results;
  // Partial sums, of which the tile has [depth_warps][tile_cells][lane].
  template <int n>
  struct alignas(4 * (n == 3 ? 4 : n)) Sums {
    float of[n == 3 ? 4 : n];
  };
  template <int q>
  static constexpr int held_words = words_in_registers(sizeof(T), backward, Hands::kind, phases, q);

  const PersistentPlan& plan;
  const Args& a;
  const ForwardArgs<T>& f;
  const Hands exchange;
  const SharedAddress shared = exchange.shared;
  const int lane = lane_of_thread(), warp = warp_of_thread(), g = lane / 4, quarter = constant<simple>(lane % 4);
  const int places = constant<simple>(plan.places);
  const bool single = places == 1, few = places < 8;  // of one sequence; of less than the tensor cores multiply
  const int swizzle = constant<simple>(g < places ? swizzled(g, lane % 4, places) * 16 : -1);
  const int first_unit = exchange.rank * plan.units;
  const int first_row;  // sequence of the batch
  const int begin = backward ? 0 : f.begin;  // the steps to run: [begin, end)
  const int end = backward || f.schedule.length[first_row] < f.end ? f.schedule.length[first_row] : f.end;

  // Pair p of this thread: a hidden unit of a sequence. A warp's 32 lie side by side in the tile: 8 units by 4 sequences. Of
  // the cells of 8 units, warp w's p-th is number p * 8 + w.
  struct Pair {
    int unit, column;      // of the block; of the slice, below 0 where this lane has no pair
    int length;            // of the sequence; 0 where there is none
    int row, next, after;  // packed rows: of the step whose values were asked for, of the two that follow, where kept
    int place[phases];     // where slot 0 of it is in each stage's operand: 8 * bytes + swizzled(sequence); see stage_value
    int lane;              // where it is in the tile, in lanes
  } pair[pairs];
  // What this warp multiplies in each stage.
  struct Part {
    int groups, depth;    // of 8 units, how many of its own there are, 0: none; how many warps share such
    int chunks, operand;  // of k; bytes: where its lane reads the first
    SharedAddress sums;   // where the tile has those of the first group
  } part[phases];
  const SharedAddress tile = shared + unsigned(constant<simple>(plan.tile));
  const int tile_lanes = constant<simple>(plan.tile_cells * 32);  // from what one warp summed to what the next did
  Words held0[held_words<0>], held1[held_words<phases - 1>];  // weights

  __device__ __forceinline__ Persistent(const PersistentPlan& plan, const Args& a, const ForwardArgs<T>& f, Hands exchange,
                                        int slice)
      : plan(plan), a(a), f(f), exchange(exchange), first_row(slice * plan.columns) {
    const int width = f.schedule.batch - first_row < plan.columns ? f.schedule.batch - first_row : plan.columns;
    const int columns = few ? 1 : places / 4;  // cells of 8 units: every other one of 8 sequences each, or all of up to 4
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      const int cell = p * persistent_warps + warp, c = cell % columns;
      const int unit = cell / columns * lane_units + g, column = few ? quarter : c / 2 * 8 + 2 * quarter + c % 2;
      const bool there = cell < plan.cells && column < places, valid = there && column < width && first_unit + unit < f.H;
      pair[p] = {unit, there ? column : -1, valid ? f.schedule.length[first_row + column] : 0, 0, 0, 0, {}, 0};
      pair[p].lane = constant<simple>(few ? (2 * cell + quarter % 2) * 32 + g * 4 + quarter / 2 : cell * 32 + lane);
#pragma unroll
      for (int q = 0; q < phases; ++q) {
        const int v = (exchange.rank * (plan.units / vector) + unit / vector) * plan.stage[q].slots;
        const int bytes = (v * places + (few ? 0 : column / 8 * 8)) * 16 + unit % vector * int(sizeof(T));
        pair[p].place[q] = step_constant(bytes * 8 + swizzled(column, v, places));
      }
    }
    divide<0>();
    if constexpr (phases > 1) divide<1>();
  }
  template <int q>
  __device__ __forceinline__ void divide() {
    const Stage& s = plan.stage[q];
    const int row = warp % s.row_warps, depth = warp / s.row_warps, tile_columns = few ? 2 : places / 4;
    const int groups = groups_of(results<q>, s.wide), all = plan.units / lane_units, left = all - row * groups;
    const int first = depth * s.warp_chunks, more = s.chunks - first;
    Part& p = part[q];
    p.groups = step_constant(depth >= s.depth_warps ? 0 : left < groups ? left : groups);
    p.depth = constant<simple>(s.depth_warps);
    p.sums = tile + unsigned(step_constant(((depth * plan.tile_cells + row * groups * tile_columns) * 32 + lane) *
                                           int(sizeof(Sums<results<q>>))));
    p.chunks = step_constant(more < 0 ? 0 : more < s.warp_chunks ? more : s.warp_chunks);
    p.operand = step_constant(more <= 0 ? 0 : (first * 4 + quarter) * places * 16);
  }

  // What took some computing.
  static __device__ __forceinline__ int step_constant(int x) { return constant<simple>(kept(x)); }
  template <int q>
  __device__ __forceinline__ auto& held() {
    if constexpr (q == 0)
      return held0;
    else
      return held1;
  }

  // ---- a step's product

  template <int q, bool wide>
  using WeightsOf = StageWeights<T, Cell, backward, q, wide>;
  template <int q, bool wide>
  __device__ __forceinline__ WeightsOf<q, wide> weights() const {
    return {plan, shared, f.H, first_unit, lane, warp, g, quarter, part[q].groups, part[q].chunks};
  }
  template <int q>
  __device__ __forceinline__ void load_weights() {
    const T* w;
    if constexpr (backward)
      w = a.w_hh_t[q];
    else
      w = f.w_hh;
    by_width<q>([&](auto wide) { weights<q, decltype(wide)::value>().load(w, held<q>()); });
  }

  // Leaves the partial sums of stage q's product in the tile, which holds them until the next.
  template <int q, class Number, bool wide>
  __device__ __forceinline__ void multiply(int k) {
    constexpr int count = results<q>, groups = groups_of(count, wide);
    constexpr int words = WeightsOf<q, wide>::words, chunks = held_words<q> / words;
    using P = Product<Number, words / 2>;
    constexpr bool many = !simple || (backward && Hands::kind == Exchange::cluster);  // registers in use
    constexpr int buffers = many && P::buffers > 2 ? 2 : P::buffers, ahead = buffers - 1;
    const Part& p = part[q];
    if (p.groups == 0) return;
    const int next = chunk_bytes * places, tile_columns = few ? 2 : places / 4;
    SharedAddress at = exchange.operand(q, k) + unsigned(p.operand), to = p.sums;
    constexpr unsigned size = sizeof(Sums<count>);
    int c = 0;
    do {
      P sum;
      const auto load = [&](typename P::Operand& b, int i) { P::load(b, at + unsigned(i * next), swizzle, quarter); };
      typename P::Operand b[buffers] = {};
#pragma unroll
      for (int i = 0; i < ahead; ++i)
        if (i < chunks) load(b[i], i < p.chunks ? i : 0);
      const auto products = [&](int there, auto most) {  // a constant, so that there is no branch for each chunk; or most
#pragma unroll
        for (int i = 0; i < decltype(most)::value; ++i) {
          if (i >= there) break;
          if (i + ahead < decltype(most)::value && i + ahead < there) load(b[(i + ahead) % buffers], i + ahead);
          sum.add([&](int x) -> const Words& { return held<q>()[i * words + x]; }, b[i % buffers]);
        }
      };
      if constexpr (simple && ahead > 0)
        by_count<0, chunks>(p.chunks < chunks ? p.chunks : chunks, [&](auto n) { products(decltype(n)::value, n); });
      else
        products(p.chunks, std::integral_constant<int, chunks>());
      const WeightsOf<q, wide> spilled = weights<q, wide>();
      SharedAddress from = spilled.first_spilled();
#pragma unroll(sizeof(T) == 2 ? 2 : 1)
      for (int i = chunks; i < p.chunks; ++i, from += unsigned(spilled.spilled_chunk())) {
        typename P::Operand b = {};
        load(b, i);
        Words w[words];
#pragma unroll
        for (int x = 0; x < words; ++x) w[x] = load_shared<Words>(from + unsigned(x * spilled.spilled_word));
        sum.add([&](int x) -> const Words& { return w[x]; }, b);
      }
      sum.finish(quarter);
#pragma unroll
      for (int j = 0; j < groups; ++j) {
        if (j > 0 && j >= p.groups) continue;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          Sums<count> sums;
#pragma unroll
          for (int i = 0; i < count; ++i) sums.of[i] = sum.at(i * groups + j, e);
          store_shared(to + unsigned((j * tile_columns + e) * 32) * size, sums);
        }
      }
      c += 8, at += 8 * 16, to += 2 * 32 * size;
    } while (c < places);
  }
  template <int q, bool wide>
  __device__ __forceinline__ void multiply(int k) {
    if constexpr (sizeof(T) == 2)
      multiply<q, T, wide>(k);
    else if (plan.tf32)
      multiply<q, Tf32, wide>(k);
    else if (!single)
      multiply<q, float, wide>(k);
    else
      multiply<q, OneSequence, wide>(k);
  }
  // Calls with std::bool_constant<stage q is wide>.
  template <int q, class Call>
  __device__ __forceinline__ void by_width(Call call) const {
    if constexpr (results<q> == 1) {
      if (plan.stage[q].wide)
        call(std::true_type());
      else
        call(std::false_type());
    } else {
      call(std::false_type());
    }
  }

  // Operand k of stage q is awaited and multiplied; then add_sums finds results.
  template <int q>
  __device__ __forceinline__ void product(int k) {
    exchange.template wait<backward ? 4 : 3>(q, k);
    by_width<q>([&](auto wide) { multiply<q, decltype(wide)::value>(k); });
    sync_block();
  }
  // Adds what the warps found of pair p, in their order, to its slots.
  template <int q>
  __device__ __forceinline__ void add_sums(int p, V* to) const {
    constexpr int count = results<q>;
    const SharedAddress at = tile + unsigned(pair[p].lane) * unsigned(sizeof(Sums<count>));
    if (part[q].depth > 4)
      add_sums<count, persistent_warps>(at, persistent_warps, to);
    else
      add_sums<count, 4>(at, part[q].depth, to);
  }
  template <int count, int depth>
  __device__ __forceinline__ void add_sums(SharedAddress at, int there, V* to) const {
    Sums<count> sums[depth];
#pragma unroll
    for (int d = 0; d < depth; ++d)
      sums[d] =
          d < there ? load_shared<Sums<count>>(at + unsigned(d * tile_lanes) * unsigned(sizeof(Sums<count>))) : Sums<count>{};
#pragma unroll
    for (int i = 0; i < count; ++i) {
      float total = sums[0].of[i];
#pragma unroll
      for (int d = 1; d < depth; ++d) total += sums[d].of[i];
      to[i] += V(total);
    }
  }

  // ---- handing over

  // Puts a value of pair p into number k of operand q. Outside of a sequence's steps stale values stay there, perhaps NaN:
  // no other sequence reads them.
  template <int q>
  __device__ __forceinline__ void stage_value(int p, int slot, int k, T value) const {
    if (pair[p].column < 0) return;
    if (sizeof(T) == 4 && plan.tf32) value = rounded_to_tf32(value);
    const int place = pair[p].place[q], column = swizzled(place & 7, slot, places);
    store_shared(exchange.part(q, k) + unsigned((place >> 3) + (slot * places + column) * 16), Hands::clean(value));
  }
  static __device__ __forceinline__ T rounded_to_tf32(T value) {
    if constexpr (sizeof(T) == 4) {
      uint32_t bits;
      memcpy(&bits, &value, 4);
      return as_float(round_to_tf32(bits));
    } else {
      return value;
    }
  }

  // Weights, zeros where an operand or a part is read before it is written, barriers.
  __device__ __forceinline__ void start() {
    if (simple) sync_block();  // shared memory has pinned the constants of all threads
    start<0>();
    if constexpr (phases > 1) start<1>();
    exchange.sync_group();
  }
  template <int q>
  __device__ __forceinline__ void start() {
    load_weights<q>();
    for (int k = 0; k < (Hands::kind == Exchange::cluster ? 2 : 1); ++k) clear(exchange.operand(q, k), plan.stage[q].bytes);
    if (Hands::kind == Exchange::grid) clear(shared + unsigned(plan.staging + q * plan.staging_stage), plan.stage[q].part);
    exchange.start(q);
  }
  static __device__ __forceinline__ void clear(SharedAddress at, int bytes) {
    for (int i = int(threadIdx.x) * 16; i < bytes; i += persistent_threads * 16) store_shared(at + unsigned(i), no_words());
  }

  __device__ __forceinline__ bool runs(int p, int s) const { return s < pair[p].length; }
  // The packed row of step s; some row where there is no such step.
  __device__ __forceinline__ int row(int p, int s) const {
    const Schedule& order = f.schedule;
    if (simple || order.uniform) return (order.backward_in_time ? order.steps - 1 - s : s) * order.batch + sequence(p);
    return s >= 0 && runs(p, s) ? int(order.offset[order.backward_in_time ? pair[p].length - 1 - s : s]) + sequence(p) : 0;
  }
  __device__ __forceinline__ int sequence(int p) const { return first_row + pair[p].column; }  // of the batch, sorted
  __device__ __forceinline__ int unit_of(int p) const { return first_unit + pair[p].unit; }  // of all
  __device__ __forceinline__ int64_t state_at(int p) const { return int64_t(f.schedule.from[sequence(p)]) * f.H + unit_of(p); }
  __device__ __forceinline__ int64_t place(int p, int64_t row) const { return row * f.H + unit_of(p); }
  __device__ __forceinline__ int64_t carry_at(int p) const { return int64_t(sequence(p)) * f.H + unit_of(p); }

  // ---- forward

  V bias[backward ? 1 : pairs][Cell::slots], state[pairs][Cell::states], slot[pairs][Cell::slots];
  // Where the input of pair p waits for its step: no register would do, since the compiler moves those between steps, and a
  // move waits for what is asked for. Two steps ahead where that needs no look at the schedule.
  static constexpr int steps_ahead = simple ? 2 : 1;
  static constexpr int inputs = Cell::input.count;
  const SharedAddress first_input = shared + unsigned(constant<simple>(plan.input + int(threadIdx.x) * inputs * 4));
  __device__ __forceinline__ SharedAddress input(int p, int k) const {
    return first_input + unsigned((simple ? k & 1 : p) * (persistent_threads * inputs * 4));
  }

  // Asks for the input of step s, the k-th of this launch; where a row takes a look at the schedule, also for the next one's.
  __device__ __forceinline__ void ask_forward(int s, int k) {
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      if (simple) pair[p].next = row(p, s);
      pair[p].row = pair[p].next;
      if (s >= end || !runs(p, s)) continue;
      const float* from = f.input + place(p, pair[p].row) * inputs;
      const SharedAddress to = input(p, k);
      if constexpr (inputs == 4)
        copy_async<16>(to, from);
      else
#pragma unroll
        for (int i = 0; i < inputs; ++i) copy_async<4>(to + 4u * i, from + i);
      if (!simple) pair[p].next = row(p, s + 1);
    }
    copy_async_commit();
  }

  __device__ __forceinline__ void run_forward() {
    if (end <= begin) return;
    start();
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      pair[p].next = row(p, begin);
#pragma unroll
      for (int i = 0; i < Cell::slots; ++i) bias[p][i] = V(pair[p].length > 0 ? f.bias[i * f.H + unit_of(p)] : 0.0f);
#pragma unroll
      for (int i = 0; i < Cell::states; ++i) {
        float v = 0;
        if (begin == 0 && f.state[i] && runs(p, 0)) v = widen(f.state[i][state_at(p)]);
        if (begin > 0 && runs(p, begin))
          v = i == 0 ? widen(f.y[row(p, begin - 1) * f.y_row + unit_of(p)]) : f.carry[carry_at(p)];
        state[p][i] = V(v);
      }
      stage_value<0>(p, 0, 0, narrow<T>(state[p][0].r));
    }
    exchange.give(0, 0);
    int until = runs_until(begin);
#pragma unroll
    for (int i = 0; i < steps_ahead; ++i) ask_forward(begin + i, i);
    for (int s = begin, k = 0;; until = runs_until(s)) {
      for (; s < until; ++s, ++k) forward_phase<0>(s, k);
      if (s >= end) break;
    }
    if constexpr (Cell::states > 1)
#pragma unroll
      for (int p = 0; p < pairs; ++p)
        if (runs(p, end)) f.carry[carry_at(p)] = state[p][1].r;
    exchange.sync_group();  // no block leaves while another may write to it
  }

  // Steps s and later may run until there, since the input that they ask for is there. Waits for what step s asks for.
  __device__ __forceinline__ int runs_until(int s) const {
    if (projects && f.projection.blocks > 0) {
      const int wanted = s + steps_ahead + 1, steps = projected_steps(f, s, wanted < end ? wanted : end);
      if (steps < end) return steps - steps_ahead;
    }
    return end;
  }

  template <int q>
  __device__ __forceinline__ void forward_phase(int s, int k) {  // the k-th of this launch
    constexpr Span span = Cell::recurrent[q];
    constexpr bool last = q + 1 == phases;
    constexpr int next = last ? 0 : q + 1;  // the stage that the new values feed
    const int next_k = last ? k + 1 : k;
    V save[pairs][Cell::saved + 1] = {}, operand[pairs] = {};
    bool ran[pairs];
#pragma unroll
    for (int p = 0; p < pairs; ++p) ran[p] = runs(p, s);
    product<q>(k);
    if (q == 0) copy_async_wait<steps_ahead - 1>();
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      if (!ran[p]) continue;
      if constexpr (q == 0) {
        float fed[inputs];
        const SharedAddress from = input(p, k);
        if constexpr (inputs == 4) {
          const Words words = load_shared<Words>(from);
          memcpy(fed, &words, sizeof fed);
        } else {
#pragma unroll
          for (int i = 0; i < inputs; ++i) fed[i] = load_shared<float>(from + 4u * i);
        }
#pragma unroll
        for (int i = 0; i < Cell::slots; ++i) {
          const int n = i - Cell::input.first;
          slot[p][i] = bias[p][i];
          if (n >= 0 && n < inputs) slot[p][i] += V(fed[n]);
        }
      }
      add_sums<q>(p, slot[p] + span.first);
      Cell::template forward<q>(slot[p], state[p], save[p], &operand[p]);
      const T value = narrow<T>((last ? state[p][0] : operand[p]).r);
      if (last) state[p][0] = V(widen(value));  // h is what y holds
      stage_value<next>(p, 0, next_k, value);
    }
    if (!last || s + 1 < end) exchange.give(next, next_k);
    int64_t at[pairs];  // rows of step s
#pragma unroll
    for (int p = 0; p < pairs; ++p) at[p] = simple ? row(p, s) : pair[p].row;
    if (last && s + 1 < end) ask_forward(s + steps_ahead, k + steps_ahead);
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      if (!ran[p]) continue;
      const int unit = unit_of(p);
      if constexpr (!last) {
        f.operand[(f.saved ? at[p] : sequence(p)) * f.H + unit] = narrow<T>(operand[p].r);
      } else {
        f.y[at[p] * f.y_row + unit] = narrow<T>(state[p][0].r);
        if (f.saved)
#pragma unroll
          for (int i = 0; i < Cell::saved; ++i) f.saved[place(p, at[p]) * Cell::saved + i] = narrow<T>(save[p][i].r);
        if (s + 1 == pair[p].length)
#pragma unroll
          for (int i = 0; i < Cell::states; ++i) f.final_state[i][state_at(p)] = narrow<T>(state[p][i].r);
      }
    }
    if constexpr (!last) forward_phase<q + 1>(s, k);
  }

  // ---- backward: `state` holds the carry, `slot` the slots' gradients

  T saved[backward ? pairs : 1][Cell::saved + 1], dy[backward ? pairs : 1], h[backward ? pairs : 1],
      h_prev[backward ? pairs : 1];

  // Asks for what the forward pass left of step s and for dy. Rows are known of s and s - 1, and asked for of s - 2.
  __device__ __forceinline__ void ask_backward(int s) {
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      const int unit = unit_of(p);
      pair[p].row = pair[p].next;
      pair[p].next = pair[p].after;
      pair[p].after = row(p, s - 2);
      if (!runs(p, s)) continue;
      const int64_t now = pair[p].row, before = pair[p].next;
#pragma unroll
      for (int i = 0; i < Cell::saved; ++i) saved[p][i] = f.saved[place(p, now) * Cell::saved + i];
      dy[p] = a.dy ? a.dy[now * a.dy_row + unit] : narrow<T>(0);
      h[p] = f.y[now * f.y_row + unit];
      if (s > 0)
        h_prev[p] = f.y[before * f.y_row + unit];
      else
        h_prev[p] = f.state[0] ? f.state[0][state_at(p)] : narrow<T>(0);
    }
  }

  __device__ __forceinline__ void run_backward() {
    if (end == 0) return;
    start();
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      pair[p].next = row(p, end - 1), pair[p].after = row(p, end - 2);
#pragma unroll
      for (int i = 0; i < Cell::states; ++i)
        state[p][i] = V(a.dfinal_state[i] && pair[p].length > 0 ? widen(a.dfinal_state[i][state_at(p)]) : 0.0f);
    }
    ask_backward(end - 1);
    for (int s = end - 1, k = 0; s >= 0; --s, ++k) backward_stage<0>(s, k);
    if (a.dstate[0]) product<0>(end - 1);
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      if (pair[p].length == 0) continue;
      if (a.dstate[0]) add_sums<0>(p, &state[p][0]);
#pragma unroll
      for (int i = 0; i < Cell::states; ++i)
        if (a.dstate[i]) a.dstate[i][state_at(p)] = narrow<T>(state[p][i].r);
    }
    exchange.sync_group();
  }

  template <int q>
  __device__ __forceinline__ void backward_stage(int s, int k) {  // k operands of each stage were given before
    constexpr bool last = q + 1 == phases;
    constexpr int next = last ? 0 : q + 1;  // the stage that these gradients feed
    constexpr Span fed = Cell::recurrent[next];
    if (q > 0 || k > 0) product<q>(q == 0 ? k - 1 : k);
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      if (!runs(p, s)) continue;
      V save[Cell::saved + 1];
#pragma unroll
      for (int i = 0; i < Cell::saved; ++i) save[i] = V(widen(saved[p][i]));
      V grad(0.0f);
      if (q == 0) grad = state[p][0] + V(widen(dy[p]));
      if (q > 0 || runs(p, s + 1)) add_sums<q>(p, &grad);
      Cell::template backward<q>(grad, slot[p], state[p], save, V(widen(h[p])), V(widen(h_prev[p])));
#pragma unroll
      for (int i = 0; i < fed.count; ++i) stage_value<next>(p, i, k, narrow<T>(slot[p][fed.first + i].r));
    }
    if (!last || s > 0 || a.dstate[0]) exchange.give(next, k);
    if constexpr (last) {
      int64_t at[pairs];
#pragma unroll
      for (int p = 0; p < pairs; ++p) at[p] = pair[p].row;
      bool ran[pairs];
#pragma unroll
      for (int p = 0; p < pairs; ++p) ran[p] = runs(p, s);
      if (s > 0) ask_backward(s - 1);
#pragma unroll
      for (int p = 0; p < pairs; ++p) {
        if (!ran[p]) continue;
#pragma unroll
        for (int i = 0; i < Cell::slots; ++i) a.gates[(at[p] * Cell::slots + i) * f.H + unit_of(p)] = narrow<T>(slot[p][i].r);
      }
    } else {
      backward_stage<q + 1>(s, k);
    }
  }
};

template <class T, class Cell, bool backward, template <bool> class Hands, bool simple>
__global__ void __launch_bounds__(persistent_threads, 1)
    persistent_kernel(const __grid_constant__ PersistentPlan plan,
                      const __grid_constant__ std::conditional_t<backward, BackwardArgs<T>, ForwardArgs<T>> args,
                      unsigned char* workspace) {
  // A build for a GPU without clusters has these kernels too, empty: no plan launches them.
  constexpr bool grid = Hands<simple>::kind == Exchange::grid;
  if constexpr (FUSEDRNN_CLUSTERS || grid) {
    int block = int(blockIdx.x);
    if constexpr (!backward)
      if constexpr (Persistent<T, Cell, false, Hands, simple>::projects) {
        block -= args.projection.blocks;
        if (block < 0) return project_input<T, Cell>(args);
      }
    const int slice = block / plan.blocks, rank = constant<simple>(block % plan.blocks);
    const SharedAddress shared = SharedAddress(constant<simple>(kept(int(shared_address(shared_memory<unsigned char>())))));
    const auto run = [&](const Hands<simple>& exchange) {
      if constexpr (backward)
        Persistent<T, Cell, true, Hands, simple>(plan, args, args.forward, exchange, slice).run_backward();
      else
        Persistent<T, Cell, false, Hands, simple>(plan, args, args, exchange, slice).run_forward();
    };
    if constexpr (grid)
      run({plan, rank, shared, Cell::phases, slice, workspace});
    else
      run({plan, rank, shared, Cell::phases});
  }
}

}  // namespace fusedrnn::cuda
