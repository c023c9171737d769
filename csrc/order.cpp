// Sequences sorted by length, so that those still running at a step are the first.
#include "order.h"

#include <algorithm>
#include <numeric>

namespace fusedrnn {

Order::Order(int64_t T, int64_t B, const int64_t* lengths) : from(B), length(B, T) {
  std::iota(from.begin(), from.end(), 0);
  if (lengths) {
    std::stable_sort(from.begin(), from.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    for (int64_t j = 0; j < B; ++j) length[j] = lengths[from[j]];
  }
  const int64_t steps = B > 0 ? length[0] : 0;
  active.assign(steps + 1, 0);
  offset.assign(steps + 1, 0);
  int64_t running = B;
  for (int64_t s = 0; s < steps; ++s) {
    while (length[running - 1] <= s) --running;
    active[s] = running;
    offset[s + 1] = offset[s] + running;
  }
}

}  // namespace fusedrnn
