// Gated recurrent units (Cho et al., 2014), two different functions that share their gates:
//
//   r = sigmoid(..)   z = sigmoid(..)                              each of W_ih x + b_ih + W_hh h + b_hh
//   n = tanh(W_in x + b_in + r (W_hn h + b_hn))                    Gru: reset after the product (cuDNN, PyTorch, Keras)
//   n = tanh(W_in x + b_in + W_hn (r h) + b_hn)                    GruResetBefore: the original
//   h' = z h + (1 - z) n
#pragma once

#include "cells/activations.h"
#include "cells/cell.h"

namespace fusedrnn {

struct Gru {
  // Slots: the input part of n, then r and z, then the recurrent part of n, so that both products feed neighbours.
  static constexpr const char* name = "gru";
  static constexpr int gates = 3, states = 1, slots = 4, saved = 4, phases = 1;
  static constexpr int slot_gate[slots] = {2, 0, 1, 2};
  static constexpr Span input = {0, 3};
  static constexpr Span recurrent[phases] = {{1, 3}};

  template <int phase, class V>
  static FUSEDRNN_HD_INLINE void forward(V* slot, V* state, V* save, V*) {
    V r = sigmoid(slot[1]);
    V z = sigmoid(slot[2]);
    V n = tanh(fma(r, slot[3], slot[0]));
    save[0] = r, save[1] = z, save[2] = n, save[3] = slot[3];
    state[0] = fma(z, state[0] - n, n);
  }

  template <int phase, class V>
  static FUSEDRNN_HD_INLINE void backward(V dh, V* slot, V* carry, const V* save, V, V h_prev) {
    V r = save[0], z = save[1], n = save[2], n_recurrent = save[3];
    V dn = dh * (V(1) - z) * tanh_grad(n);
    slot[0] = dn;
    slot[1] = dn * n_recurrent * sigmoid_grad(r);
    slot[2] = dh * (h_prev - n) * sigmoid_grad(z);
    slot[3] = dn * r;
    carry[0] = dh * z;
  }
};

struct GruResetBefore {
  static constexpr const char* name = "gru_reset_before";
  static constexpr int gates = 3, states = 1, slots = 3, saved = 3, phases = 2;
  static constexpr int slot_gate[slots] = {0, 1, 2};
  static constexpr Span input = {0, 3};
  static constexpr Span recurrent[phases] = {{0, 2}, {2, 1}};

  template <int phase, class V>
  static FUSEDRNN_HD_INLINE void forward(V* slot, V* state, V* save, V* operand) {
    if constexpr (phase == 0) {
      slot[0] = sigmoid(slot[0]);
      slot[1] = sigmoid(slot[1]);
      *operand = slot[0] * state[0];
    } else {
      V n = tanh(slot[2]);
      save[0] = slot[0], save[1] = slot[1], save[2] = n;
      state[0] = fma(slot[1], state[0] - n, n);
    }
  }

  template <int phase, class V>
  static FUSEDRNN_HD_INLINE void backward(V grad, V* slot, V* carry, const V* save, V, V h_prev) {
    V r = save[0], z = save[1], n = save[2];
    if constexpr (phase == 0) {  // grad = dL/dh
      slot[1] = grad * (h_prev - n) * sigmoid_grad(z);
      slot[2] = grad * (V(1) - z) * tanh_grad(n);
      carry[0] = grad * z;
    } else {  // grad = dL/d(r h_prev)
      slot[0] = grad * h_prev * sigmoid_grad(r);
      carry[0] = fma(grad, r, carry[0]);
    }
  }
};

}  // namespace fusedrnn
