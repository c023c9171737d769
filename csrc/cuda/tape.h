// What a training forward on a GPU keeps for its backward passes: the sibling of cpu/tape.h.
#pragma once

#include <vector>

#include "cuda/check.h"
#include "cuda/memory.h"
#include "cuda/stack.h"

namespace fusedrnn::cuda {

class Tape {
 public:
  Tape(const StackForward& call)
      : spec(call.spec), dtype(call.dtype), device(call.device), stream(call.stream), T_(call.T_), B(call.B),
        order(call.T_, call.B, call.lengths), saved(spec.count()), operand(spec.count()), y(spec.L), dropout(call.dropout),
        seed(call.seed) {}
  Spec spec;
  DType dtype;
  int device;
  Stream stream;
  int64_t T_, B;
  Order order;
  int *active, *length, *from;  // on the device, like all below
  int64_t* offset;
  std::vector<void*> saved, operand;  // per layer and direction: (N, H, saved), (N, H)
  std::vector<void*> y;               // per layer (N, D*H)
  void* h0 = nullptr;                 // (L*D, B, H), or null for zeros
  double dropout;
  uint64_t seed;
  unsigned long long* sums = nullptr;  // checksums of x and of the weights
  Arena arena;
  cudaEvent_t ready = nullptr;  // recorded when forward was done
  ~Tape() {
    if (ready && !is_forked()) cudaEventDestroy(ready);
  }
};

}  // namespace fusedrnn::cuda
