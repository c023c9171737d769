// The weights of a stack as the kernels read them.
#pragma once

#include <vector>

#include "args.h"
#include "cpu/memory.h"
#include "cpu/threads.h"
#include "spec.h"

namespace fusedrnn {

// One layer's parameters in one direction, or their gradients, C-contiguous: (gates*H, in), (gates*H, H), (gates*H) and
// (gates*H); the biases may be null.
template <class T>
struct Weights {
  T *w_ih, *w_hh, *b_ih, *b_hh;
};
template <class T>
using StackWeights = std::vector<Weights<T>>;  // L*D: layer by layer, forward direction first

// Calls then(i, b) for this rank's blocks of hidden units of every layer and direction.
template <class Then>
void each_block(const Spec& spec, int64_t lanes, int rank, int threads, Then then) {
  const Part part(ceil_div(spec.H, lanes), rank, threads);
  for (int64_t i = 0; i < spec.count(); ++i)
    for (int64_t b = part.begin; b < part.end; ++b) then(i, b);
}

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

// The same for backward passes: the transposes of the recurrent weights, and of those of the inputs where their gradients
// are wanted, which the bottom layer's may not be.
template <class T>
class TransposedPanels {
 public:
  TransposedPanels(const Spec& spec, bool with_dx);  // room only
  // Blocks [in0, in1) of the inputs and [h0, h1) of the hidden units, of what block b of the gates' rows holds.
  void pack_input(const Weights<const T>& w, int64_t i, int64_t b, int64_t in0, int64_t in1);
  void pack_recurrent(const Weights<const T>& w, int64_t i, int64_t b, int64_t h0, int64_t h1);
  struct Layer {
    T *w_ih = nullptr, *w_hh[max_phases];
    int64_t ih_block, hh_block[max_phases];
  };
  const Layer& operator[](int64_t i) const { return layers_[i]; }

 private:
  Spec spec_;
  std::vector<Layer> layers_;
  Arena arena_;
};

}  // namespace fusedrnn
