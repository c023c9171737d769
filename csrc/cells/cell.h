// What a cell is: the words in which rnn.h, lstm.h and gru.h describe themselves to the loops of cpu/ and cuda/.
//
// A cell is a struct of constants and two functions, written once on a value type V (a SIMD vector, or one number):
//
//   name       as the registry, the bindings and the tests know it
//   gates      row blocks of H in the weight matrices (PyTorch's order)
//   states     vectors carried from step to step: 1 (h) or 2 (h, c)
//   slots      pre-activations held per hidden unit; slot_gate says which gate's weights each one takes
//   input      the slots that W_ih x feeds
//   phases     products per step; recurrent[p] are the slots that phase p's operand feeds. The operand of phase 0 is
//              h_{t-1}; that of a later phase is written, a vector per unit, by the phase before it
//   saved      values that the tape keeps per unit and step, beside h itself and the operands of later phases
//
//                    slots         input     recurrent[0], by h   recurrent[1], by r h   saved
//   Lstm             i f g o       all       all                  -                      i f g o c
//   Gru              n_x r z n_h   n_x r z   r z n_h              -                      r z n n_h
//   GruResetBefore   r z n         all       r z                  n                      r z n
//   Rnn              h             all       all                  -                      -
//
//   (Gru's n = tanh(n_x + r n_h), with n_x = W_in x + b_in and n_h = W_hn h + b_hn.)
//
//   forward<p>(slot, state, save, operand)         after phase p's product; the last phase leaves the new state
//   backward<q>(grad, slot, carry, save, h, h_prev)
//       q = 0: grad is dL/dh_t; later q: grad is the gradient of the operand of phase `phases - q`. Fills the slots'
//       gradients as they become known, and in carry the part of dL/dh_{t-1} (and dL/dc_{t-1}) that no product brings.
//       So the last phase's operand comes second: of GruResetBefore, q = 0 gives the gradients of z and n; those of n make
//       that of r h, by which q = 1 gives r's. Those of r and z go into dL/dh_{t-1}, with which step t - 1 begins.
#pragma once

#include "cells/value.h"

namespace fusedrnn {

constexpr int max_states = 2, max_phases = 2;  // of any cell: what loops have room for

struct Span {  // slots [first, first + count)
  int first, count;
};
// A function of values: in device code a cell's constants have no address, which a member would take.
FUSEDRNN_HD_INLINE constexpr bool contains(Span span, int slot) { return slot >= span.first && slot < span.first + span.count; }

// Backward's phase q starts with the transpose of this forward phase's product, which gives the gradient of its operand.
template <class Cell>
FUSEDRNN_HD_INLINE constexpr int forward_phase(int q) {
  return q == 0 ? 0 : Cell::phases - q;
}

}  // namespace fusedrnn
