// What a training forward keeps for its backward passes.
#pragma once

#include <vector>

#include "cpu/memory.h"
#include "order.h"
#include "spec.h"

namespace fusedrnn {

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

}  // namespace fusedrnn
