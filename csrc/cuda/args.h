// What a layer's kernels are given on a GPU: the siblings of args.h. All pointers are of device memory; nothing here
// allocates, checks or knows of Python. T is the type of the arrays, Accumulate<T> that of every sum.
//
// Packed rows. Whatever has a row for each step of each sequence lies in one order, "packed": by time, then by
// sequence, longest first, without padding. Step t in time has rows offset[t] .. offset[t + 1]; sequence j (sorted) is
// row offset[t] + j. Where all sequences have T steps this is a contiguous (T, B, width) array.
#pragma once

#include "../args.h"  // not this file

#if defined(__CUDACC__) || defined(FUSEDRNN_EMULATED)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fusedrnn::cuda {

template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

struct Tf32 {};  // in place of T: float32 data whose products round their factors to TF32

struct Schedule {
  int steps, batch;
  bool backward_in_time;  // step s is then time length[j] - 1 - s of sequence j
  const int* active;      // (steps + 1): sequences that have a step s, never increasing; active[steps] = 0
  const int* length;      // (batch): sorted, longest first
  const int64_t* offset;  // (steps + 1)
  const int* from;        // (batch): the caller's index of sequence j, for states
  bool uniform;           // all sequences have `steps` steps: rows follow from that, without a look at the arrays
  // The packed row of step s, in the order of processing, of sequence j < active[s].
  FUSEDRNN_HD_INLINE int64_t row(int s, int j) const {
    if (uniform) return int64_t(backward_in_time ? steps - 1 - s : s) * batch + j;
    return offset[backward_in_time ? length[j] - 1 - s : s] + j;
  }
};

// The input's projection as a part of a layer's launch: its first blocks do it, for the others, a tile of 64 rows after the
// other in the order of steps.
template <class T>
struct Projection {
  int blocks, I;      // blocks: 0 where the input is there before the launch
  const T *x, *w_ih;  // (N, I); (gates*H, I), as the caller's: all rows aligned to 16 bytes
  unsigned* done;     // (tiles): how many parts of a tile are there; 0 before the launch
};

template <class T>
struct ForwardArgs {
  Schedule schedule;
  int begin, end;  // the steps to run; where they do not start at 0, `carry` and y hold what was left by the last call
  int H;
  Accumulate<T>* input;        // (N, H, input.count): W_ih x, without bias; only the rows of the steps to run are there
  const T* w_hh;               // (gates*H, H), as the caller's
  const Accumulate<T>* bias;   // (slots, H): b_ih and b_hh as the slots take them
  const T* state[max_states];  // (B, H) in the caller's order, or null for zeros
  T* final_state[max_states];  // (B, H) in the caller's order
  T* y;                        // (N, H), rows y_row elements apart; read again as h_{t-1}
  int64_t y_row;
  T* saved;              // (N, H, saved), or null for inference
  T* operand;            // (N, H) operands of the second phase, or (B, H) for inference; null with one phase
  Accumulate<T>* carry;  // (B, H) by sorted sequence: c between steps, where it is in no register
  Accumulate<T>* slots;  // (B, slots, H) likewise: pre-activations from phase to phase
  Projection<T> projection;
  int64_t steps() const { return end - begin; }
};

template <class T>
struct BackwardArgs {
  ForwardArgs<T> forward;  // as the forward ran; y, saved and operand are read
  const T* dy;             // (N, H), rows dy_row elements apart; or null for zeros
  int64_t dy_row;
  const T* dfinal_state[max_states];  // (B, H) in the caller's order, or null for zeros
  T* dstate[max_states];              // (B, H) in the caller's order, or null where not wanted
  const T* w_hh_t[max_phases];        // (H, recurrent[p].count * H): W_hh transposed, columns by slot, then unit
  T* gates;                           // (N, slots, H): the slots' gradients
  Accumulate<T>* carry[max_states];  // (B, H) by sorted sequence: dh and dc between steps, where they are in no register
  int64_t steps() const { return forward.schedule.steps; }
};

}  // namespace fusedrnn::cuda
