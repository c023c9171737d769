#include "cuda/plan.h"

#include <algorithm>
#include <atomic>
#include <limits>

namespace fusedrnn::cuda {
namespace {
std::atomic<int> forced{-1};
std::atomic<int64_t> forced_chunk{0};
std::atomic<bool> forced_beside{false};
constexpr int64_t most_input_bytes = int64_t(512) << 20;  // more would gain nothing: a launch per chunk is little then
}  // namespace

void set_chunk_override(int64_t steps) { forced_chunk = steps; }

int64_t chunk_steps(int64_t steps, int64_t bytes_per_step) {
  if (forced_chunk > 0) return std::min(steps, forced_chunk.load());
  const int64_t most = std::max<int64_t>(1, most_input_bytes / std::max<int64_t>(1, bytes_per_step));
  const int64_t chunks = std::max<int64_t>(1, (steps + most - 1) / most);
  return (steps + chunks - 1) / chunks;
}

void set_beside_override(bool on) { forced_beside = on; }

bool worth_a_launch(DType dtype, bool tf32, int64_t steps, double operations) {
  const double rate = size_of(dtype) == 2 ? 5e14 : tf32 ? 2e14 : 4e13;  // of a whole card, a second
  return steps >= 4 && (forced_beside || operations / rate > 20e-6);
}

bool leaves_room(const LayerPlan& plan, const Machine& machine) {
  const PersistentPlan& p = plan.persistent;
  return forced_beside || (plan.path == Path::persistent && 4 * p.blocks * p.slices <= 3 * machine.processors);
}

void set_path_override(int path) { forced = path; }
int path_override() { return forced; }

LayerPlan layer_plan(const CellInfo& cell, DType dtype, bool backward, int64_t H, int64_t batch, int64_t rows, bool tf32,
                     int at_once, const Machine& machine) {
  const auto steps = [](std::string why) { return LayerPlan{Path::per_step, {}, std::move(why)}; };
  if (forced == int(Path::per_step)) return steps("asked for");
  if (dtype == DType::float64) return steps("float64 is for checks");
  if (rows + 2 * batch > std::numeric_limits<int>::max()) return steps("more rows than an int counts");
  const PersistentPlan plan = persistent_plan(cell, int(size_of(dtype)), backward, int(H), batch, tf32, machine, at_once);
  if (plan.reason) return steps(plan.reason);
  return {Path::persistent, plan, "W_hh fits on chip"};
}

std::string describe(const LayerPlan& plan) {
  if (plan.path == Path::per_step) return "per step: " + plan.reason;
  const PersistentPlan& p = plan.persistent;
  return std::string("persistent, ") + std::to_string(p.slices) + " x " + std::to_string(p.blocks) + " blocks, each " +
         std::to_string(p.units) + " units of " + std::to_string(p.columns) + " sequences, " +
         (p.exchange == Exchange::cluster ? "h through clusters" : "h through the second cache level") + ": " + plan.reason;
}

}  // namespace fusedrnn::cuda
