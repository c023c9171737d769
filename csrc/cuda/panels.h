// Weights as a forward pass reads them: with the gates of a hidden unit side by side. The sibling of cpu/panels.h; W_hh has
// no panel here, since the kernels take it as it is.
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

// Where a stack's panels lie in one piece of memory, in bytes from its beginning.
struct PanelPlaces {
  struct Place {
    int64_t w_ih, bias;
  };
  std::vector<Place> of;  // (L*D)
  int64_t bytes = 0;      // all

  PanelPlaces(const Spec& spec, int64_t element, int64_t accumulator) : of(spec.count()) {
    const auto take = [&](int64_t n, int64_t size) {
      const int64_t at = bytes;
      bytes += (n * size + 255) / 256 * 256;
      return at;
    };
    const CellInfo& cell = spec.info();
    for (int64_t i = 0; i < spec.count(); ++i) {
      const int64_t gates = cell.input.count > 1 ? cell.input.count : 0;
      of[i].w_ih = take(spec.H * gates * spec.input_size(i / spec.D), element);
      of[i].bias = take(cell.slots * spec.H, accumulator);
    }
  }
};

template <class T>
std::vector<Panel<T>> panels_in(const Spec& spec, void* data) {
  const PanelPlaces places(spec, sizeof(T), sizeof(Accumulate<T>));
  unsigned char* const bytes = static_cast<unsigned char*>(data);
  std::vector<Panel<T>> panels;
  for (const auto& place : places.of)
    panels.push_back({spec.info().input.count > 1 ? reinterpret_cast<T*>(bytes + place.w_ih) : nullptr,
                      reinterpret_cast<Accumulate<T>*>(bytes + place.bias)});
  return panels;
}

}  // namespace fusedrnn::cuda
