// A GPU for plans: an H100 or H200, as far as plans look.
#pragma once

#include "cuda/machine.h"

namespace fusedrnn::tests {

inline const cuda::Machine hopper = [] {
  cuda::Machine machine;
  machine.name = "emulated", machine.major = 9, machine.processors = 132, machine.shared_per_block = 227 << 10;
  machine.max_cluster = 16;
  machine.cooperative = 132;
  for (int i = 0; i < 5; ++i) machine.clusters[i] = 132 >> i;
  return machine;
}();

}  // namespace fusedrnn::tests
