// The simple recurrent cell (J. L. Elman, "Finding structure in time", 1990):  h' = act(W_ih x + b_ih + W_hh h + b_hh)
#pragma once

#include "cells/activations.h"
#include "cells/cell.h"

namespace fusedrnn {

struct TanhActivation {
  static constexpr char name[] = "rnn_tanh";
  template <class V> static FUSEDRNN_HD_INLINE V of(V x) { return tanh(x); }
  template <class V> static FUSEDRNN_HD_INLINE V grad(V y) { return tanh_grad(y); }
};

struct ReluActivation {
  static constexpr char name[] = "rnn_relu";
  template <class V> static FUSEDRNN_HD_INLINE V of(V x) { return relu(x); }
  template <class V> static FUSEDRNN_HD_INLINE V grad(V y) { return relu_grad(y); }
};

template <class Activation>
struct Rnn {
  static constexpr const char* name = Activation::name;
  static constexpr int gates = 1, states = 1, slots = 1, saved = 0, phases = 1;
  static constexpr int slot_gate[slots] = {0};
  static constexpr Span input = {0, 1};
  static constexpr Span recurrent[phases] = {{0, 1}};

  template <int phase, class V>
  static FUSEDRNN_HD_INLINE void forward(V* slot, V* state, V*, V*) {
    state[0] = Activation::of(slot[0]);
  }

  template <int phase, class V>
  static FUSEDRNN_HD_INLINE void backward(V grad, V* slot, V* carry, const V*, V h, V) {
    slot[0] = grad * Activation::grad(h);
    carry[0] = V(0);
  }
};

using RnnTanh = Rnn<TanhActivation>;
using RnnRelu = Rnn<ReluActivation>;

}  // namespace fusedrnn
