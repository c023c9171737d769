// The cost model of a layer on a CPU, and the search for the cheapest plan. Runs nothing.
#include "cpu/plan.h"

#include "cpu/threads.h"

#include <algorithm>
#include <cmath>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace fusedrnn {
namespace {

PlanOverride override_values;

// What things cost on a core of today, in nanoseconds; only their proportions matter. Measured on Zen 4, what passes between
// cores also on a Xeon: docs/performance.md.
constexpr double fma_bytes_per_ns = 235.0;    // of vectors multiplied and added
constexpr double l2_bytes_per_ns = 117.0;     // a panel read once per row tile
constexpr double l3_bytes_per_ns = 90.0;      // a panel that the second level does not hold, once per step
constexpr double memory_bytes_per_ns = 17.0;  // a core's, where all read
constexpr double exchange_bytes_per_ns = 5;   // rows that another core has just written: 80 with a shared cache, 3 without
constexpr double cell_ns = 12.0;              // the epilogue of one vector
constexpr double hop_ns = 200.0;              // a line from one core to another: 25 where they share a cache, 215 where not
constexpr double tile_ns = 8.0;
constexpr double start_ns = 5000.0;           // handing work to another thread and waiting for it

double barrier_ns(int members) { return hop_ns * Barrier::rounds(members); }

// The caller gives each thread its work in turn, by a line each. Backward packs in a round of its own before, and its threads
// meet around the weight gradients.
double handing_ns(double threads, bool forward) { return (start_ns + hop_ns * (threads - 2)) * (forward ? 1 : 3); }

// The time of one layer over all steps, cut `rows` x `units` ways.
double layer_ns(const LayerSize& size, const Machine& machine, int rows, int units, bool forward) {
  const double B = double(ceil_div(size.B, rows));
  const double blocks = double(ceil_div(ceil_div(size.H, size.lanes), units));
  const double gates = size.cell->gates, vector_bytes = size.lanes * size.element_bytes;
  const double vectors = blocks * gates * double(size.H);       // of W_hh that this thread multiplies with
  const double weights = vectors * vector_bytes;
  const double fma = B * weights / fma_bytes_per_ns;
  const double tiles = double(ceil_div(int64_t(B), 6));
  // The first row tile meets the panel where it lies, the others in the second cache level. Large panels come
  // from memory to every thread that has rows of its own; with few rows W_ih is read once a chunk only.
  const double per_step = gates * double(size.H * (size.H + (B < 8 ? 0 : size.I))) * size.element_bytes;
  double first = weights / l2_bytes_per_ns;
  if (per_step > 0.75 * double(machine.l3_bytes))
    first = per_step / units / memory_bytes_per_ns;
  else if (weights > 0.75 * double(machine.l2_bytes))
    first = weights / l3_bytes_per_ns;
  const double reading = first + (tiles - 1) * weights / l2_bytes_per_ns;
  // Reads and arithmetic overlap: hypot() is near the larger where one dominates, sqrt(2) times it where they are equal.
  double step = std::hypot(fma, reading) + B * blocks * cell_ns + tiles * blocks * tile_ns;
  if (units > 1) {
    const double row_bytes = double(size.H) * size.element_bytes * (forward ? 1.0 : gates);
    step += B * row_bytes * (units - 1) / units / exchange_bytes_per_ns + barrier_ns(units) * size.cell->phases;
  }
  // The input product; in backward, the gradients of x and of both weight matrices.
  const double products = forward ? double(size.I) : double(2 * size.I + size.H);
  const double rest = B * blocks * gates * products * vector_bytes / fma_bytes_per_ns;
  double ns = double(size.T) * (step + rest);
  const double threads = rows * units;
  if (threads == 1) return ns;
  ns += handing_ns(threads, forward);
  if (!forward) {
    // dW reads what other threads wrote: h and x, which all packed, and, where rows are cut, its blocks' gradients. (With
    // one gate it reads all gradients, and its own columns of h and x.)
    const double h = double(size.H * size.cell->phases), gradients = rows > 1 ? gates * double(size.H) / threads : 0;
    const double row_bytes = (gradients + h + double(size.I)) * size.element_bytes * (threads - 1) / threads;
    ns += double(size.T * size.B) * row_bytes / exchange_bytes_per_ns;
  }
  return ns;
}

// Calls then(parts) for 1, 2, .. `most` parts of n things, less those that leave the largest part as it was: they would cost
// threads and gain nothing. `forced` above 0 stands for all of them.
template <class Then>
void each_cut(int64_t n, int64_t most, int forced, Then then) {
  if (forced > 0) most = std::min<int64_t>(forced, most);
  for (int64_t parts = forced > 0 ? std::max<int64_t>(1, most) : 1; parts <= most;) {
    then(int(parts));
    const int64_t largest = ceil_div(n, parts);
    parts = largest > 1 ? ceil_div(n, largest - 1) : most + 1;
  }
}

Plan cut(const LayerSize& size, const Machine& machine, int threads, bool several, bool forward) {
  const int64_t blocks = ceil_div(size.H, size.lanes);
  if (threads == 1 || (blocks == 1 && size.B == 1)) several = false;
  Plan best;
  double best_ns = 0;
  each_cut(blocks, std::min<int64_t>(threads, blocks), override_values.unit_threads, [&](int units) {
    each_cut(size.B, std::min<int64_t>(threads / units, size.B), override_values.row_threads, [&](int rows) {
      if (several && rows * units == 1) return;
      const double ns = layer_ns(size, machine, rows, units, forward);
      if (best_ns == 0 || ns < best_ns) best_ns = ns, best.row_threads = rows, best.unit_threads = units;
    });
  });
  best.estimated_us = best_ns * 1e-3;
  return best;
}

// The time of layers [begin, end) one after the other, to which the work is handed once.
double layers_ns(const std::vector<LayerSize>& layers, int begin, int end, const Machine& machine, int threads, bool forward) {
  double ns = 0, most_handing = 0;
  for (int l = begin; l < end; ++l) {
    const Plan plan = cut(layers[l], machine, threads, false, forward);
    const double handing = plan.threads() > 1 ? handing_ns(plan.threads(), forward) : 0;
    ns += 1e3 * plan.estimated_us - handing;
    most_handing = std::max(most_handing, handing);
  }
  return ns + most_handing;
}

Wave wave(const std::vector<LayerSize>& layers, const Machine& machine, int threads, bool forward) {
  const int L = int(layers.size());
  Wave best;
  // A wavefront must be clearly better (10 %): it adds waiting that the model does not see.
  double best_ns = 0.9 * layers_ns(layers, 0, L, machine, threads, forward);
  const int64_t most = layers[0].T / 2;
  for (int teams = 2; teams <= std::min(L, threads); ++teams) {
    if (override_values.teams > 0 && teams != std::min({override_values.teams, L, threads})) continue;
    double slowest = 0, per_range = 0;  // of any team
    for (int team = 0, l = 0; team < teams; ++team) {
      const int first = l;
      double again = 0;
      for (; l < L && int64_t(l) * teams / L == team; ++l) {
        const LayerSize& size = layers[l];
        // Each range reads W_ih again; in backward it reads and writes the gradients of all weights.
        const double row = double(size.cell->gates * size.H) * size.element_bytes;
        again += 2 * hop_ns +
                 (forward ? row * double(size.I) / l2_bytes_per_ns : 2 * row * double(size.I + size.H) / l3_bytes_per_ns);
      }
      slowest = std::max(slowest, layers_ns(layers, first, l, machine, threads / teams, forward));
      per_range = std::max(per_range, again);
    }
    int64_t ranges = int64_t(std::sqrt((teams - 1) * slowest / per_range));  // waiting at the start against work done again
    if (override_values.ranges > 0) ranges = override_values.ranges;
    ranges = std::min(std::max<int64_t>(ranges, 2), most);
    if (ranges < 2) continue;
    const double ns =
        slowest * (1 + double(teams - 1) / double(ranges)) + double(ranges) * per_range + handing_ns(threads, forward);
    if (override_values.teams > 0 || ns < best_ns) best_ns = ns, best = {teams, ranges, ns * 1e-3};
  }
  return override_values.teams == 1 ? Wave{} : best;
}

int64_t cache_bytes([[maybe_unused]] int level, int64_t otherwise) {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const long bytes = sysconf(level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return otherwise;
}

}  // namespace

Machine this_machine() {
  static const Machine machine{cache_bytes(2, 1 << 20), cache_bytes(3, 32 << 20)};
  return machine;
}

Plan forward_plan(const LayerSize& size, const Machine& machine, int threads, bool several) {
  Plan plan = cut(size, machine, threads, several, true);
  // A chunk's pre-activations take at most a quarter of the second cache level; longer chunks read W_ih less often. With
  // enough rows for a tile the input product is made along with the recurrent one instead, in chunks of one step, where
  // the panels of a tile stay in the second level beside its rows.
  const int64_t rows = ceil_div(size.B, plan.row_threads);
  const int64_t row_bytes =
      ceil_div(ceil_div(size.H, size.lanes), plan.unit_threads) * size.lanes * size.cell->slots * size.element_bytes;
  const int64_t block_bytes = (size.I + size.H) * std::max(size.cell->slots, 4) * size.lanes * size.element_bytes;
  plan.fused = size.fuses && block_bytes <= machine.l2_bytes / 3;
  plan.chunk_steps = plan.fused && rows >= 4 ? 1 : machine.l2_bytes / 4 / std::max<int64_t>(1, rows * row_bytes);
  const int64_t unit_bytes = size.cell->gates * (size.I + size.H) * size.element_bytes;
  plan.prefetch = ceil_div(size.H, plan.unit_threads) * unit_bytes > machine.l2_bytes / 2;
  if (override_values.prefetch > 0) plan.prefetch = override_values.prefetch == 1;
  if (override_values.fused > 0) plan.fused = size.fuses && override_values.fused == 1;
  if (override_values.chunk_steps > 0) plan.chunk_steps = override_values.chunk_steps;
  plan.chunk_steps = std::max<int64_t>(1, std::min(plan.chunk_steps, size.T));
  return plan;
}

Plan backward_plan(const LayerSize& size, const Machine& machine, int threads, bool several) {
  Plan plan = cut(size, machine, threads, several, false);
  plan.chunk_rows = override_values.chunk_rows > 0 ? override_values.chunk_rows : 512;
  plan.chunk_rows = std::max(size.B, std::min(plan.chunk_rows, size.T * size.B));
  const int64_t row_bytes = size.cell->gates * size.H * size.element_bytes;  // of W_hh as of the chunk's gradients
  plan.prefetch = (plan.chunk_rows + ceil_div(size.H, plan.unit_threads)) * row_bytes > machine.l2_bytes / 3;
  if (override_values.prefetch > 0) plan.prefetch = override_values.prefetch == 1;
  return plan;
}

Wave forward_wave(const std::vector<LayerSize>& layers, const Machine& machine, int threads) {
  return wave(layers, machine, threads, true);
}

Wave backward_wave(const std::vector<LayerSize>& layers, const Machine& machine, int threads) {
  return wave(layers, machine, threads, false);
}

void set_plan_override(const PlanOverride& values) { override_values = values; }

bool are_threads_overridden() {
  const PlanOverride& o = override_values;
  return o.row_threads > 0 || o.unit_threads > 0 || o.teams > 0;
}

}  // namespace fusedrnn
