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
//   forward<p>(slot, state, save, operand)         after phase p's product; the last phase leaves the new state
//   backward<q>(grad, slot, carry, save, h, h_prev)
//       q = 0: grad is dL/dh_t; later q: grad is the gradient of the operand of phase `phases - q`. Fills the slots'
//       gradients as they become known, and in carry the part of dL/dh_{t-1} (and dL/dc_{t-1}) that no product brings.
#pragma once

namespace fusedrnn {

constexpr int max_states = 2, max_phases = 2;  // of any cell: what loops have room for

struct Span {  // slots [first, first + count)
  int first, count;
};

}  // namespace fusedrnn
