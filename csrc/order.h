// The order in which sequences of different length run. The same for every device.
#pragma once

#include <stdint.h>

#include <vector>

#include "args.h"

namespace fusedrnn {

// Which row runs when: sequences sorted by length, longest first.
struct Order {
  Order(int64_t T, int64_t B, const int64_t* lengths);
  std::vector<int64_t> active, offset;  // see Schedule
  std::vector<int64_t> from;            // (B): the caller's batch index of row j
  std::vector<int64_t> length;          // (B): of row j
  int64_t rows() const { return offset.back(); }
  Schedule schedule(int64_t B) const { return {int64_t(active.size()) - 1, B, active.data(), offset.data()}; }
};

}  // namespace fusedrnn
