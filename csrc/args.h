// What a layer's loops are given. Plain structs: nothing here allocates, checks or knows of Python.
//
//   T  time steps      B  batch       I  input size     H  hidden size     N  rows of a schedule (the sum of all lengths)
//   s  step, in the order of processing (the reverse direction counts from a sequence's end)
//   j  row of the batch, longest sequence first, so that the rows still running at step s are the first active[s]
//
// All sizes and strides count elements. No buffer that is written may overlap another unless it says so.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cells/cell.h"
#include "cells/value.h"

namespace fusedrnn {

FUSEDRNN_HD_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t reduction_rows = 4096;  // sums over T*B are cut into blocks of so many rows, added in block order

// Rows of a (T, B, width) array in the order of processing: row (s, j) starts at base + s * step + row[j].
template <class T>
struct Rows {
  T* base;
  ptrdiff_t step;
  const ptrdiff_t* row;  // (B)
  FUSEDRNN_INLINE T* at(int64_t s, int64_t j) const { return base + s * step + row[j]; }
};

// All pointers that one row of the batch needs at one step. Null: the cell or the pass has no such array.
template <class T>
struct Place {
  const T *x, *h;      // what the products multiply: x_t (I) and h_{t-1} (H)
  T* operand;          // of the second phase (H)
  T *y, *copy, *last;  // what h_t is stored to (H); last: null but where a sequence or a range of steps ends
  T *state, *saved;    // the second state (H), in place, and the tape's values (saved * H)
};

struct Schedule {
  int64_t steps, batch;
  const int64_t* active;  // (steps + 1): rows running at step s, never increasing; active[steps] = 0
  const int64_t* offset;  // (steps + 1): rows before step s, so that (s, j) is row offset[s] + j of N
};

// How the work is cut. It changes the time only: every plan gives the same bits.
struct Plan {
  int row_threads = 1;      // the batch is split so many ways, which needs no barrier
  int unit_threads = 1;     // the hidden units are split so many ways, with a barrier after each phase of a step
  int64_t chunk_steps = 1;  // time steps whose input product is computed at once
  bool fused = false;       // in chunks of one step a tile makes both products
  bool prefetch = false;    // what a thread reads again and again exceeds its L2, so tiles prefetch the next panel
  int64_t chunk_rows = 1;   // rows of backward whose weight gradients are computed at once (at least one step's)
  double estimated_us = 0;  // what the cost model expects of the layer; for FUSEDRNN_TRACE
  FUSEDRNN_INLINE int threads() const { return row_threads * unit_threads; }
};

class Barrier;
void wait(Barrier* barrier, int rank);  // of threads.h; a null barrier has one member
Barrier* barrier_at(Barrier* barriers, int i);

// A team of threads that runs one layer. Rank r has row part r / unit_threads and unit part r % unit_threads.
struct Team {
  Plan plan;
  Barrier* all;   // of all threads of the team
  Barrier* rows;  // (row_threads): of the threads that share a part of the batch
  int rank;
};

// Distance between blocks of the panels below: one vector more than they need, so that a row's vectors in neighbouring blocks
// do not all fall into one cache set.
FUSEDRNN_INLINE int64_t operand_panel_stride(int64_t chunk_rows, int64_t lanes) { return (chunk_rows + 1) * lanes; }

template <class T>
struct ForwardArgs {
  int64_t I, H;
  Schedule schedule;
  Rows<const T> x;                // I wide
  Rows<T> y;                      // H wide; read again as h_{t-1}
  Rows<T> copy;                   // a second copy of y, or base = null
  const T* state[max_states];     // (B, H) initial states, or null for zeros; row j starts at state_row[j]
  T* final_state[max_states];     // (B, H) likewise; may be state[s] where s > 0, and y of the last step where s = 0
  const ptrdiff_t* state_row;     // (B)
  // Panels: see gemm.h
  const T* w_ih;                  // [blocks of H][parts][I][input.count / parts * lanes], blocks ih_block apart
  const T* w_hh[max_phases];      // [blocks of H][parts][H][recurrent[p].count / parts * lanes], blocks hh_block[p] apart
  const T* bias;                  // [blocks of H][slots * lanes]
  int64_t ih_block, hh_block[max_phases];
  // Tape: null for inference
  T* saved;                       // (N, saved * H): per row [blocks of H][saved][lanes], the last block as wide as it is
  T* operand;                     // (N, H) operands of the second phase; (B, H) for inference; null with one phase
  int64_t turn;                   // added to s in there_and_back: a stream, whose every step is s = 0, alternates 0 and 1
  // Workspace
  T* pre;                         // per thread [chunk_steps][its rows][its blocks][slots * lanes], pre_thread apart
  int64_t pre_thread;
  Place<T>* place;                // per thread [its rows], place_thread apart: at the step that runs
  int64_t place_thread;
  T* range_h;                     // (B, H): h from one range of steps to the next; null where there is one range
  const T* zeros;                 // H + lanes zeros
};

template <class T>
struct BackwardArgs {
  ForwardArgs<T> forward;                    // as the forward ran; panels and pre are not used
  Rows<const T> dy;                          // H wide, or base = null for zeros
  const T* dfinal_state[max_states];         // (B, H), or null for zeros
  T* dstate[max_states];                     // (B, H), or null where not wanted
  Rows<T> dx;                                // I wide, or base = null where not wanted
  bool dx_adds;                              // to what dx holds
  T *dw_ih, *dw_hh;                          // (gates*H, I) and (gates*H, H), both null where not wanted
  T *db_ih, *db_hh;                          // (gates*H), or null
  bool adds;                                 // to what dstate, dw and db hold
  // Panels: see pack_transposed
  const T* w_ih_t;                           // [blocks of I][blocks of H * input.count * lanes][lanes], ih_block apart
  const T* w_hh_t[max_phases];               // [blocks of H][blocks of H * recurrent[p].count * lanes][lanes]
  int64_t ih_block, hh_block[max_phases];
  // Workspace, shared by the team
  T* slot_grads;                             // [blocks of H][B + chunk_rows][slots * lanes], slot_grads_block apart
  int64_t slot_grads_block;
  T* dcarry[max_states];                     // (B, blocks of H * lanes): from step to step, what no product brings of the
                                             // states' gradients
  T* x_panel;                                // [blocks of I][chunk_rows][lanes], operand_panel_stride apart
  T* h_panel[max_phases];                    // [blocks of H][chunk_rows][lanes], likewise
  T *sum_w_ih, *sum_w_hh;                    // like dw: the running block of 4096 rows; null where dw itself can hold it
  T* sum_b;                                  // [blocks of H][slots * lanes]
};

}  // namespace fusedrnn
