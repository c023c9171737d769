// Where the weights and biases of a stack go, as forward passes read them.
#include "cuda/panels.h"

#include "cuda/check.h"
#include "cuda/memory.h"

namespace fusedrnn::cuda {

int64_t panel_bytes(const Spec& spec, DType dtype) {
  return with_type(dtype, [&](auto t) { return Panels<decltype(t)>(spec, nullptr).bytes; });
}

void pack(const Spec& spec, DType dtype, int device, Stream stream, const std::vector<Weights>& weights, void* panels) {
  const OnDevice here(device);
  note_pass({"freeze", spec.info().name, name_of(dtype), device, 0, 0, spec.H, spec.L});
  with_type(dtype, [&](auto t) {
    const Panels<decltype(t)> all(spec, panels);
    for (int64_t i = 0; i < spec.count(); ++i)
      pack(all.of[i], spec.info(), weights[i], spec.H, spec.input_size(i / spec.D), stream);
  });
}

}  // namespace fusedrnn::cuda
