// The functions of one ISA, for one float type, as a table. kernels_<isa>.cpp fills it; dispatch.h chooses among them.
#pragma once

#include "args.h"
#include "cells/all.h"

namespace fusedrnn {

// Both run steps [begin, end) of one layer, the backward pass from the last to the first. A sequence may be cut into such
// ranges of at least two steps each, run in order; every thread of the team must have finished one before the next.
template <class T>
struct CellKernels {
  void (*forward)(const ForwardArgs<T>&, const Team&, int64_t begin, int64_t end);
  void (*backward)(const BackwardArgs<T>&, const Team&, int64_t begin, int64_t end);
  bool fuses;  // whether its tiles can make both products of a step
};

template <class T>
struct Kernels {
  int lanes;
  CellKernels<T> cell[cell_count];
  void (*pack_gates)(const T* w, int64_t H, int64_t K, const int* gate, int count, int64_t b0, int64_t b1, T* out,
                     int64_t stride);
  void (*pack_transposed)(const T* w, int64_t H, int64_t N, const int* gate, int count, int64_t b, int64_t n0, int64_t n1,
                          T* out, int64_t stride);
  // out[i] = keep(seed, index + i) ? x[i] * scale : 0, where keep holds for a random word of at least `threshold`.
  void (*dropout)(const T* x, T* out, int64_t n, uint64_t seed, uint64_t index, uint32_t threshold, T scale);
  // The hash of hash.h, of rows `stride` apart; `place` is the first row's, in 8-byte words, and each takes as many places as
  // its stride has words. The same on every ISA; the hashes of pieces of whole words add up to that of all.
  uint64_t (*hash)(const T* p, int64_t rows, ptrdiff_t stride, int64_t columns, uint64_t place);
  // What the machine can do: floating-point operations done, and n elements read `rounds` times over, n a multiple of 8
  // vectors. What `read` returns only keeps the compiler from leaving out the work.
  double (*fma_chain)(int64_t rounds);
  T (*read)(const T* p, int64_t n, int64_t rounds);
};

}  // namespace fusedrnn
