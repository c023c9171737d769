// A stack of layers in one or two directions: what a caller outside of C++ sees. Checks nothing that a caller can get
// wrong but sizes that overflow; allocates workspace, packs, plans, and runs the layers on a team of threads.
#pragma once

#include <memory>
#include <vector>

#include "args.h"
#include "cpu/memory.h"
#include "cpu/plan.h"
#include "order.h"
#include "spec.h"

namespace fusedrnn {

// What a plan must know of a layer that T_ steps of B rows pass through.
template <class T>
LayerSize layer_size(const Spec& spec, int64_t layer, int64_t T_, int64_t B);

// One layer's parameters in one direction, or their gradients, C-contiguous: (gates*H, in), (gates*H, H), (gates*H) and
// (gates*H); the biases may be null.
template <class T>
struct Weights {
  T *w_ih, *w_hh, *b_ih, *b_hh;
};
template <class T>
using StackWeights = std::vector<Weights<T>>;  // L*D: layer by layer, forward direction first

// A (T, B, width) array whose rows are contiguous; null where there is none.
template <class T>
struct Sequence {
  T* data = nullptr;
  ptrdiff_t step = 0, row = 0;  // strides of T and B
};

// The weights of a stack, packed for forward passes.
template <class T>
class Panels {
 public:
  Panels(const Spec& spec, const StackWeights<const T>& weights);  // all of it, on this thread
  explicit Panels(const Spec& spec);                                // room only
  void pack_input(const Weights<const T>& w, int64_t i, int64_t b);  // block b of layer and direction i, and its biases
  void pack_recurrent(const Weights<const T>& w, int64_t i, int64_t b);
  struct Layer {
    T *w_ih, *w_hh[max_phases], *bias;
    int64_t ih_block, hh_block[max_phases];
  };
  const Layer& operator[](int64_t i) const { return layers_[i]; }
  size_t bytes() const { return arena_.bytes(); }

 private:
  Spec spec_;
  std::vector<Layer> layers_;
  Arena arena_;
};

// What a training forward keeps for its backward passes.
template <class T>
struct Tape {
  Tape(const Spec& spec, int64_t T_, int64_t B_, const int64_t* lengths, bool has_state, double dropout, uint64_t seed);
  int64_t T_, B;
  Order order;
  std::vector<T*> saved, operand;  // per layer and direction
  std::vector<T*> y;               // per layer (T, B, D*H)
  T* h0 = nullptr;                 // (L*D, B, H), or null for zeros
  double dropout;
  uint64_t seed;
  uint64_t x_sum = 0, weights_sum = 0;  // checksums
  Arena arena;
  size_t bytes() const { return arena.bytes(); }
};

template <class T>
struct StackForward {
  Spec spec;
  int64_t T_, B;
  StackWeights<const T> weights;
  Sequence<const T> x;
  Sequence<T> y;
  const T* state[max_states];          // (L*D, B, H), or null for zeros
  T* final_state[max_states];
  const int64_t* lengths;              // (B), or null
  const Panels<T>* panels;             // or null: packed for this call
};

template <class T>
struct StackBackward {
  Spec spec;
  StackWeights<const T> weights;
  const Tape<T>* tape;
  Sequence<const T> x, dy;             // dy.data null: zeros
  const T* dfinal_state[max_states];   // null: zeros
  Sequence<T> dx;                      // null: not wanted
  T* dstate[max_states];               // null: not wanted
  StackWeights<T> dweights;            // empty: not wanted
  bool adds;                           // to dx, dstate and dweights
};

template <class T>
void run_forward(const StackForward<T>& call, Tape<T>* tape);  // tape null: inference

// Throws std::runtime_error, with nothing written, if x or the weights are not what the tape was made from.
template <class T>
void run_backward(const StackBackward<T>& call);

}  // namespace fusedrnn
