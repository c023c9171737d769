// What happens to arrays around the recurrence: rows into packed order and back, dropout, states, checksums, sums over
// rows. Every function puts its work into the stream and returns.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "cells/all.h"
#include "cuda/args.h"

namespace fusedrnn::cuda {

// A (T, B, width) array with strides in elements.
template <class T>
struct Strided {
  T* data;
  int64_t step, row, column;
};

// Packed rows of (T, B, width) arrays: see args.h.
struct Packing {
  int64_t T_, B;
  const int* length;      // (B) sorted
  const int* from;        // (B): the caller's index
  const int64_t* offset;  // (steps + 1)
};

// active (steps + 1), length (B), offset (steps + 1), from (B) of B sequences of T steps each; and zeros for n counts.
void uniform_schedule(int* active, int* length, int64_t* offset, int* from, int64_t T_, int64_t B, unsigned* counts, int64_t n,
                      cudaStream_t stream);

// Numbers of the host, which it may change or free at once, as int or int64_t. A copy would not do: where the GPU reads
// pageable memory itself, cudaMemcpyAsync may return before it has read.
template <class To>
void upload(To* to, const std::vector<int64_t>& values, cudaStream_t stream);

// packed (N, width) rows, `packed_row` elements apart, from the caller's array, or to it: then `adds` to what it holds,
// or else zeros where a sequence has ended.
template <class T>
void gather(T* packed, int64_t packed_row, const Strided<const T>& a, int64_t width, const Packing& p, cudaStream_t stream);
template <class T>
void scatter(const Strided<T>& a, const T* packed, int64_t packed_row, int64_t width, bool adds, const Packing& p,
             cudaStream_t stream);

// out = x times the mask of the boundary below `layer`, both packed (N, width): see cpu/kernels_isa.h for the mask.
template <class T>
void dropout(const T* x, T* out, int64_t width, int64_t layer, double probability, uint64_t seed, const Packing& p,
             cudaStream_t stream);

// to (B, H), the caller's order: from, or zeros; for sequences `first` and later of the sorted ones.
template <class T>
void pass_states(T* to, const T* from, int64_t H, int64_t first, const Packing& p, cudaStream_t stream);
template <class T>
void add_to(T* to, const T* from, int64_t n, cudaStream_t stream);

// (N, H): h_{t-1} of every row.
template <class T>
void previous_states(T* to, const ForwardArgs<T>& args, int64_t T_, cudaStream_t stream);

// (slots, H) from (gates*H) each, which may be null.
template <class T>
void slot_biases(Accumulate<T>* to, const T* b_ih, const T* b_hh, const CellInfo& cell, int64_t H, cudaStream_t stream);

// The gates of the slots of `span` side by side for each hidden unit: to (H, count, I) from w_ih (gates*H, I).
template <class T>
void interleave_weights(T* to, const T* w_ih, const CellInfo& cell, Span span, int64_t H, int64_t I, cudaStream_t stream);

// W_hh of the slots of a span, transposed: see BackwardArgs.
template <class T>
void transpose_weights(T* to, const T* w_hh, const CellInfo& cell, Span span, int64_t H, cudaStream_t stream);

// Gradients of the biases from those of the slots, (N, slots, H): sums over rows, always in the same order.
int64_t bias_gradients_rows(int64_t N);  // of the workspace (.., slots, H)
template <class T>
void bias_gradients(T* db_ih, T* db_hh, const T* gates, Accumulate<T>* workspace, int64_t N, const CellInfo& cell, int64_t H,
                    bool adds, cudaStream_t stream);

// *sum += the checksum of n elements, numbered from `index`; of the caller's x, padding left out. It finds changes, not
// adversaries; sums of integers, so that the order does not matter.
template <class T>
void add_checksum(unsigned long long* sum, const T* data, int64_t n, int64_t index, cudaStream_t stream);
template <class T>
void add_checksum(unsigned long long* sum, const Strided<const T>& a, int64_t width, const Packing& p, cudaStream_t stream);

}  // namespace fusedrnn::cuda
