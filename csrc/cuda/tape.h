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
      : stream(call.stream), T_(call.T_), order(call.T_, call.B, call.lengths), dropout(call.dropout), seed(call.seed),
        saved(call.spec.count()), operand(call.spec.count()), y(call.spec.L) {}
  Stream stream;
  int64_t T_;
  Order order;
  double dropout;
  uint64_t seed;
  // On the device, in `arena`:
  int *active, *length, *from;
  int64_t* offset;
  std::vector<void*> saved, operand;  // per layer and direction: (N, H, saved), (N, H)
  std::vector<void*> y;               // per layer (N, D*H)
  void* h0 = nullptr;                 // (L*D, B, H), or null for zeros
  unsigned long long* sums = nullptr;  // checksums of x and of the weights
  Arena arena;
  cudaEvent_t ready = nullptr;  // recorded when forward was done
  ~Tape() {
    if (ready && !is_forked()) cudaEventDestroy(ready);
  }
};

}  // namespace fusedrnn::cuda
