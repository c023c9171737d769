// Dropout between the layers of a stack.
#pragma once

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/threads.h"

namespace fusedrnn {

struct Dropout {
  double p;
  uint64_t seed;
  // Applies the mask of the boundary below `layer` to this rank's part of n elements.
  template <class T>
  void apply(const T* x, T* out, int64_t n, int64_t layer, int rank, int threads) const {
    Part part(n, rank, threads);
    auto threshold = uint32_t(std::min(p * 4294967296.0, 4294967295.0));
    kernels<T>().dropout(x + part.begin, out + part.begin, part.end - part.begin, seed,
                         uint64_t(layer) * uint64_t(n) + uint64_t(part.begin), threshold, T(1.0 / (1.0 - p)));
  }
};

}  // namespace fusedrnn
