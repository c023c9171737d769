#include "cuda/panels.h"

#include "cuda/memory.h"

namespace fusedrnn::cuda {

int64_t panel_bytes(const Spec& spec, DType dtype) {
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    return PanelPlaces(spec, sizeof(T), sizeof(Accumulate<T>)).bytes;
  });
}

void pack(const Spec& spec, DType dtype, int device, Stream stream, const std::vector<Weights>& weights, void* panels) {
  const OnDevice here(device);
  with_type(dtype, [&](auto t) {
    const auto all = panels_in<decltype(t)>(spec, panels);
    for (int64_t i = 0; i < spec.count(); ++i)
      pack(all[i], spec.info(), weights[i], spec.H, spec.input_size(i / spec.D), stream);
  });
}

}  // namespace fusedrnn::cuda
