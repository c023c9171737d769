// Long short-term memory (Hochreiter and Schmidhuber, 1997, with the forget gate of Gers et al., 2000):
//
//   i = sigmoid(..)   f = sigmoid(..)   g = tanh(..)   o = sigmoid(..)      each of W_ih x + b_ih + W_hh h + b_hh
//   c' = f c + i g    h' = o tanh(c')
#pragma once

#include "cells/activations.h"
#include "cells/cell.h"

namespace fusedrnn {

struct Lstm {
  static constexpr const char* name = "lstm";
  static constexpr int gates = 4, states = 2, slots = 4, saved = 5, phases = 1;
  static constexpr int slot_gate[slots] = {0, 1, 2, 3};
  static constexpr Span input = {0, 4};
  static constexpr Span recurrent[phases] = {{0, 4}};

  template <int phase, class V>
  static FUSEDRNN_HD_INLINE void forward(V* slot, V* state, V* save, V*) {
    V i = sigmoid(slot[0]);
    V f = sigmoid(slot[1]);
    V g = tanh(slot[2]);
    V o = sigmoid(slot[3]);
    V c = state[1];
    save[0] = i, save[1] = f, save[2] = g, save[3] = o, save[4] = c;
    state[1] = fma(f, c, i * g);
    state[0] = o * tanh(state[1]);
  }

  template <int phase, class V>
  static FUSEDRNN_HD_INLINE void backward(V dh, V* slot, V* carry, const V* save, V, V) {
    V i = save[0], f = save[1], g = save[2], o = save[3], c = save[4];
    V t = tanh(fma(f, c, i * g));  // tanh(c') again: cheaper than one more value in the tape
    V dc = fma(dh * o, tanh_grad(t), carry[1]);
    slot[0] = dc * g * sigmoid_grad(i);
    slot[1] = dc * c * sigmoid_grad(f);
    slot[2] = dc * i * tanh_grad(g);
    slot[3] = dh * t * sigmoid_grad(o);
    carry[0] = V(0);
    carry[1] = dc * f;
  }
};

}  // namespace fusedrnn
