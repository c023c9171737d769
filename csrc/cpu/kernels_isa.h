// Instantiates everything for the ISA whose flags this translation unit is compiled with.
#pragma once

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/hash.h"
#include "cpu/kernels.h"

#if defined(__FAST_MATH__)
#error "sigmoid and tanh rest on the order of their operations: compile without -ffast-math"
#endif

namespace fusedrnn::FUSEDRNN_TARGET {

template <class T, class Cell>
void forward(const ForwardArgs<T>& args, const Team& team, int64_t begin, int64_t end) {
  Forward<T, Cell>(args, team, begin, end).run(team);
}

template <class T, class Cell>
void backward(const BackwardArgs<T>& args, const Team& team, int64_t begin, int64_t end) {
  Backward<T, Cell>(args, team).run(begin, end);
}

// SplitMix64 (Steele, Lea and Flood, 2014) as a function of the element's number, so that any part of a mask can be
// made again, by any thread, in any order.
template <class T>
void dropout(const T* x, T* out, int64_t n, uint64_t seed, uint64_t index, uint32_t threshold, T scale) {
  for (int64_t i = 0; i < n; ++i) {
    uint64_t z = seed + (index + uint64_t(i)) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    out[i] = uint32_t(z >> 32) >= threshold ? x[i] * scale : T(0);
  }
}

template <class T>
double fma_chain(int64_t rounds) {
  using V = Vec<T>;
  constexpr int chains = 12;
  V acc[chains];
#pragma GCC unroll 12
  for (int i = 0; i < chains; ++i) acc[i] = V(T(i));
  const V x(T(0.5)), y(T(1));
  for (int64_t n = 0; n < rounds; ++n)
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i) acc[i] = fma(acc[i], x, y);
  V sum = acc[0];
  for (int i = 1; i < chains; ++i) sum += acc[i];
  T lanes[V::lanes];
  sum.store(lanes);
  return lanes[0] < T(0) ? 0.0 : 2.0 * chains * V::lanes * double(rounds);
}

template <class T>
T read(const T* p, int64_t n, int64_t rounds) {
  using V = Vec<T>;
  constexpr int chains = 8;
  V most[chains];
#pragma GCC unroll 8
  for (int i = 0; i < chains; ++i) most[i] = V(T(0));
  for (int64_t r = 0; r < rounds; ++r) {
    for (int64_t i = 0; i < n; i += chains * V::lanes)
#pragma GCC unroll 8
      for (int k = 0; k < chains; ++k) most[k] = max(most[k], V::load(p + i + k * V::lanes));
    asm volatile("" ::: "memory");  // the next round reads again
  }
  for (int i = 1; i < chains; ++i) most[0] = max(most[0], most[i]);
  T lanes[V::lanes];
  most[0].store(lanes);
  return lanes[0];
}

template <class T>
constexpr Kernels<T> table() {
#define FUSEDRNN_CELL_KERNELS(Cell) {forward<T, Cell>, backward<T, Cell>, Forward<T, Cell>::fuses},
  return {Vec<T>::lanes, {FUSEDRNN_FOR_EACH_CELL(FUSEDRNN_CELL_KERNELS)},
          pack_gates<T>, pack_transposed<T>,
          dropout<T>,    hash<T>,
          fma_chain<T>,  read<T>};
#undef FUSEDRNN_CELL_KERNELS
}

extern const Kernels<float> kernels_float = table<float>();
extern const Kernels<double> kernels_double = table<double>();

}  // namespace fusedrnn::FUSEDRNN_TARGET
