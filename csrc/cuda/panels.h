// What a forward pass reads in another order than the caller's: W_ih with the gates of a hidden unit side by side, and the
// sums of the biases. The sibling of cpu/panels.h; W_hh has no panel here, since the kernels take it as it is.
#pragma once

#include "cuda/elementwise.h"
#include "cuda/stack.h"

namespace fusedrnn::cuda {

// One layer's in one direction.
template <class T>
struct Panel {
  T* w_ih;              // (H, input.count, I); null where the cell has one gate, whose weights lie so already
  Accumulate<T>* bias;  // (slots, H)
};

template <class T>
void pack(const Panel<T>& panel, const CellInfo& cell, const Weights& weights, int64_t H, int64_t I, Stream stream) {
  if (panel.w_ih) interleave_weights<T>(panel.w_ih, static_cast<const T*>(weights.w_ih), cell, cell.input, H, I, stream);
  slot_biases<T>(panel.bias, static_cast<const T*>(weights.b_ih), static_cast<const T*>(weights.b_hh), cell, H, stream);
}

// A stack's, one after the other in one piece of memory.
template <class T>
struct Panels {
  std::vector<Panel<T>> of;  // (L*D)
  int64_t bytes = 0;

  Panels(const Spec& spec, void* data) {
    const auto take = [&](int64_t n, size_t element) {
      const uintptr_t at = uintptr_t(data) + uintptr_t(bytes);
      bytes += (n * int64_t(element) + 255) / 256 * 256;
      return at;
    };
    const CellInfo& cell = spec.info();
    for (int64_t i = 0; i < spec.count(); ++i) {
      const int64_t I = spec.input_size(i / spec.D);
      Panel<T> panel{};
      if (cell.input.count > 1) panel.w_ih = reinterpret_cast<T*>(take(spec.H * cell.input.count * I, sizeof(T)));
      panel.bias = reinterpret_cast<Accumulate<T>*>(take(cell.slots * spec.H, sizeof(Accumulate<T>)));
      of.push_back(panel);
    }
  }
};

}  // namespace fusedrnn::cuda
