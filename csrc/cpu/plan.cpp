#include "cpu/plan.h"

#include <algorithm>
#include <atomic>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace fusedrnn {
namespace {

PlanOverride override_values;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Below this many multiplications a step, a second thread costs more in barriers than it saves.
constexpr int64_t min_step_products = 24 * 1024;

Plan shared_plan(const LayerSize& size, int threads, bool forward) {
  Plan plan;
  const int64_t blocks = ceil_div(size.H, size.lanes);
  const int64_t step_products = size.B * size.cell->gates * size.H * (size.H + (forward ? size.I : 0));
  if (step_products < min_step_products) threads = 1;
  // Hidden units first: each thread then keeps its own slice of W_hh in its own cache. The batch takes what is left.
  plan.unit_threads = int(std::min<int64_t>(threads, blocks));
  plan.row_threads = int(std::max<int64_t>(1, std::min<int64_t>(threads / plan.unit_threads, size.B / 4)));
  if (override_values.unit_threads > 0)
    plan.unit_threads = int(std::min<int64_t>({override_values.unit_threads, threads, blocks}));
  if (override_values.unit_threads > 0 || override_values.row_threads > 0)
    plan.row_threads = int(std::max<int64_t>(
        1, std::min<int64_t>({std::max(override_values.row_threads, 1), threads / plan.unit_threads, size.B})));
  return plan;
}

}  // namespace

Machine this_machine() {
  static const Machine machine = [] {
    Machine m{1 << 20};
#if defined(_SC_LEVEL2_CACHE_SIZE)
    long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (bytes > 0) m.l2_bytes = bytes;
#endif
    return m;
  }();
  return machine;
}

Plan forward_plan(const LayerSize& size, const Machine& machine, int threads) {
  Plan plan = shared_plan(size, threads, true);
  // A chunk's pre-activations take at most a quarter of the second cache level; longer chunks read W_ih less often.
  const int64_t rows = ceil_div(size.B, plan.row_threads);
  const int64_t row_bytes =
      ceil_div(ceil_div(size.H, size.lanes), plan.unit_threads) * size.lanes * size.cell->slots * size.element_bytes;
  plan.chunk_steps = std::max<int64_t>(1, machine.l2_bytes / 4 / std::max<int64_t>(1, rows * row_bytes));
  if (override_values.chunk_steps > 0) plan.chunk_steps = override_values.chunk_steps;
  plan.chunk_steps = std::max<int64_t>(1, std::min(plan.chunk_steps, size.T));
  return plan;
}

Plan backward_plan(const LayerSize& size, const Machine&, int threads) {
  Plan plan = shared_plan(size, threads, false);
  plan.chunk_rows = override_values.chunk_rows > 0 ? override_values.chunk_rows : 512;
  plan.chunk_rows = std::max(size.B, std::min(plan.chunk_rows, size.T * size.B));
  return plan;
}

void set_plan_override(const PlanOverride& values) { override_values = values; }

}  // namespace fusedrnn
