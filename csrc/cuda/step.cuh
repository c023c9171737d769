// One phase of one step of one layer, for any cell, size and type: the product with W_hh and the cell, in one kernel.
// What the persistent kernels cannot hold runs through these, a launch for each phase of each step.
#pragma once

#include "cuda/product.cuh"
#include "cuda/quick_activations.cuh"
#include "cuda/step.h"

namespace fusedrnn::cuda {

// h_{t-1} of step s, or null for zeros.
template <class T>
__device__ __forceinline__ const T* h_before(const ForwardArgs<T>& a, int s, int j) {
  if (s > 0) return a.y + a.schedule.row(s - 1, j) * a.y_row;
  return a.state[0] ? a.state[0] + int64_t(a.schedule.from[j]) * a.H : nullptr;
}

template <class T>
__device__ __forceinline__ T* operand_of(const ForwardArgs<T>& a, int s, int j) {
  return a.operand + (a.saved ? a.schedule.row(s, j) : j) * a.H;
}

template <class V, class T>
__device__ __forceinline__ V value_at(const T* p, int64_t i) {
  return p ? V(widen(p[i])) : V(0);
}

template <class T, class Number, class Cell, int p>
__global__ void __launch_bounds__(product_threads, 1) forward_step(const Call<ForwardArgs<T>>* call, int k) {
  using V = CellValue<T>;
  constexpr Span span = Cell::recurrent[p];
  const ForwardArgs<T> a = call->args;
  const int s = call->step + k, H = a.H;
  const int first = int(blockIdx.x) * 16 * product_tiles<Number>, u0 = int(blockIdx.y) * product_units;
  const int rows = a.schedule.active[s] - first;
  if (rows <= 0) return;
  const auto operand_row = [&](int row) -> const T* {
    if (row >= rows) return nullptr;
    return p == 0 ? h_before(a, s, first + row) : operand_of(a, s, first + row);
  };
  const auto weight_row = [&](int i, int unit) -> const T* {
    const int u = u0 + unit;
    return u < H ? a.w_hh + (int64_t(gate_of_slot<Cell>(span.first + i)) * H + u) * H : nullptr;
  };
  const int most = 16 * product_tiles<Number>;
  product<T, Number, span.count>(operand_row, weight_row, H, rows < most ? rows : most,
                                 [&](int row, int unit, const auto& sum) {
                                   const int j = first + row, u = u0 + unit;
                                   if (u >= H) return;
                                   const int64_t at = a.schedule.row(s, j);
                                   [[maybe_unused]] const int64_t state_at = int64_t(a.schedule.from[j]) * H + u;
                                   [[maybe_unused]] const bool last = j >= a.schedule.active[s + 1];
                                   V slot[Cell::slots], state[Cell::states], save[Cell::saved + 1], op;
#pragma unroll
                                   for (int i = 0; i < Cell::slots; ++i) {
                                     Accumulate<T> v;
                                     if constexpr (p > 0) {
                                       v = a.slots[(int64_t(j) * Cell::slots + i) * H + u];
                                     } else {
                                       v = a.bias[i * H + u];
                                       if (contains(Cell::input, i))
                                         v += a.input[(at * H + u) * Cell::input.count + i - Cell::input.first];
                                     }
                                     if (contains(span, i)) v += sum[i - span.first];
                                     slot[i] = V(v);
                                   }
                                   state[0] = value_at<V>(h_before(a, s, j), u);
                                   if constexpr (Cell::states > 1)
                                     state[1] = s == 0 ? value_at<V>(a.state[1], state_at) : V(a.carry[int64_t(j) * H + u]);
                                   Cell::template forward<p>(slot, state, save, &op);
                                   if constexpr (p + 1 < Cell::phases) {
#pragma unroll
                                     for (int i = 0; i < Cell::slots; ++i)
                                       a.slots[(int64_t(j) * Cell::slots + i) * H + u] = slot[i].r;
                                     operand_of(a, s, j)[u] = narrow<T>(op.r);
                                   } else {
                                     const T h = narrow<T>(state[0].r);
                                     a.y[at * a.y_row + u] = h;
                                     if (last) a.final_state[0][state_at] = h;
                                     if constexpr (Cell::states > 1) {
                                       a.carry[int64_t(j) * H + u] = state[1].r;
                                       if (last) a.final_state[1][state_at] = narrow<T>(state[1].r);
                                     }
                                     if (a.saved)
#pragma unroll
                                       for (int i = 0; i < Cell::saved; ++i)
                                         a.saved[(at * H + u) * Cell::saved + i] = narrow<T>(save[i].r);
                                   }
                                 });
}

// Phase q of backward at step s; s = -1 leaves what the initial states get.
template <class T, class Number, class Cell, int q>
__global__ void __launch_bounds__(product_threads, 1) backward_step(const Call<BackwardArgs<T>>* call, int k) {
  using V = CellValue<T>;
  constexpr int p = forward_phase<Cell>(q);
  constexpr Span span = Cell::recurrent[p];
  const BackwardArgs<T> a = call->args;
  const ForwardArgs<T>& f = a.forward;
  const int s = call->step - k, H = f.H;
  const int first = int(blockIdx.x) * 16 * product_tiles<Number>, u0 = int(blockIdx.y) * product_units;
  if (s < 0 && q > 0) return;
  const int from = q == 0 ? s + 1 : s;  // the step whose slots' gradients it reads: none beyond the last
  const int fed = f.schedule.active[from] - first, rows = f.schedule.active[s < 0 ? 0 : s] - first;
  if (rows <= 0) return;
  const auto gate_row = [&](int row) -> const T* {
    if (row >= fed) return nullptr;
    return a.gates + (f.schedule.row(from, first + row) * Cell::slots + span.first) * H;
  };
  const auto weight_row = [&](int, int unit) -> const T* {
    return u0 + unit < H ? a.w_hh_t[p] + int64_t(u0 + unit) * span.count * H : nullptr;
  };
  const int most = 16 * product_tiles<Number>;
  product<T, Number, 1>(
      gate_row, weight_row, span.count * H, rows < most ? rows : most, [&](int row, int unit, const auto& sum) {
        const int j = first + row, u = u0 + unit;
        if (u >= H) return;
        const int64_t state_at = int64_t(f.schedule.from[j]) * H + u, carry_at = int64_t(j) * H + u;
        V grad = V(sum[0]), carry[Cell::states];
#pragma unroll
        for (int i = 0; i < Cell::states; ++i)  // a sequence's last step comes first
          carry[i] = q == 0 && row >= fed ? value_at<V>(a.dfinal_state[i], state_at) : V(a.carry[i][carry_at]);
        if constexpr (q == 0) {
          grad = grad + carry[0];
          if (s < 0) {
            if (a.dstate[0]) a.dstate[0][state_at] = narrow<T>(grad.r);
            if constexpr (Cell::states > 1)
              if (a.dstate[1]) a.dstate[1][state_at] = narrow<T>(carry[1].r);
            return;
          }
        }
        const int64_t at = f.schedule.row(s, j);
        if (q == 0 && a.dy) grad = grad + V(widen(a.dy[at * a.dy_row + u]));
        V slot[Cell::slots], save[Cell::saved + 1];
        T* gates = a.gates + at * Cell::slots * H + u;
#pragma unroll
        for (int i = 0; i < Cell::saved; ++i) save[i] = V(widen(f.saved[(at * H + u) * Cell::saved + i]));
#pragma unroll
        for (int i = 0; i < Cell::slots; ++i) slot[i] = q == 0 ? V(0) : V(widen(gates[i * H]));
        Cell::template backward<q>(grad, slot, carry, save, V(widen(f.y[at * f.y_row + u])), value_at<V>(h_before(f, s, j), u));
#pragma unroll
        for (int i = 0; i < Cell::slots; ++i)
          if (q == 0 || !contains(span, i)) gates[i * H] = narrow<T>(slot[i].r);  // not those that other blocks still read
#pragma unroll
        for (int i = 0; i < Cell::states; ++i) a.carry[i][carry_at] = carry[i].r;
      });
}

template <class T, class Number, class Cell>
StepKernels<T> step_kernels() {
  StepKernels<T> k{};
  k.tile_rows = 16 * product_tiles<Number>, k.units = product_units, k.threads = product_threads;
  k.forward[0] = forward_step<T, Number, Cell, 0>, k.backward[0] = backward_step<T, Number, Cell, 0>;
  k.forward_shared[0] = product_shared<T, Number, Cell::recurrent[0].count>;
  if constexpr (Cell::phases > 1) {
    k.forward[1] = forward_step<T, Number, Cell, 1>, k.backward[1] = backward_step<T, Number, Cell, 1>;
    k.forward_shared[1] = product_shared<T, Number, Cell::recurrent[1].count>;
  }
  k.backward_shared = product_shared<T, Number, 1>;
  return k;
}

#define FUSEDRNN_STEP_KERNELS(Cell) step_kernels<FUSEDRNN_TYPE, FUSEDRNN_NUMBER, Cell>(),
#define FUSEDRNN_INSTANTIATE_STEPS(T, Number)                                              \
  template <>                                                                              \
  const StepKernels<T>& steps_of<T, Number>(int cell) {                                    \
    using FUSEDRNN_TYPE = T;                                                               \
    using FUSEDRNN_NUMBER = Number;                                                        \
    static const StepKernels<T> table[] = {FUSEDRNN_FOR_EACH_CELL(FUSEDRNN_STEP_KERNELS)}; \
    return table[cell];                                                                    \
  }

}  // namespace fusedrnn::cuda
