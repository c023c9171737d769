// A stack of layers in one or two directions: the entry points of C++ programs and of the bindings. Of the arguments only
// sizes that overflow are noticed: see fusedrnn.h. Allocates workspace, packs, plans, runs the layers on a team of threads.
#pragma once

#include "args.h"
#include "cpu/panels.h"
#include "cpu/sequence.h"
#include "cpu/tape.h"
#include "spec.h"

namespace fusedrnn {

template <class T>
struct StackForward {
  Spec spec{};
  int64_t T_ = 0, B = 0;
  StackWeights<const T> weights;
  Sequence<const T> x;  // (T, B, I)
  Sequence<T> y;  // (T, B, D*H)
  const T* state[max_states] = {};  // (L*D, B, H), or null for zeros
  T* final_state[max_states] = {};  // likewise, of all states that the cell has
  const int64_t* lengths = nullptr;  // (B), or null
  const Panels<T>* panels = nullptr;  // or null: packed for this call
};

template <class T>
struct StackBackward {
  Spec spec{};
  StackWeights<const T> weights;
  const Tape<T>* tape = nullptr;
  Sequence<const T> x, dy;  // dy.data null: zeros
  const T* dfinal_state[max_states] = {};  // null: zeros
  Sequence<T> dx;  // null: not wanted
  T* dstate[max_states] = {};  // null: not wanted
  StackWeights<T> dweights;  // empty: not wanted
  bool adds = false;  // to dx, dstate and dweights
};

template <class T>
void run_forward(const StackForward<T>& call, Tape<T>* tape);  // tape null: inference

// Throws std::runtime_error, with nothing written, if x or the weights are not what the tape was made from.
template <class T>
void run_backward(const StackBackward<T>& call);

}  // namespace fusedrnn
