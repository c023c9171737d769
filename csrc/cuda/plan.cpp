// Which path a layer takes on a GPU, and when its input is projected. Launches nothing.
#include "cuda/plan.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "cuda/projection.h"

namespace fusedrnn::cuda {
namespace {
std::atomic<int> forced{-1};
std::atomic<int64_t> forced_chunk{0};
std::atomic<int> forced_projected{-1};
constexpr int64_t most_input_bytes = int64_t(512) << 20;  // more would gain nothing: a launch per chunk is little then
}  // namespace

void set_chunk_override(int64_t steps) { forced_chunk = steps; }

int64_t chunk_steps(int64_t steps, int64_t bytes_per_step) {
  if (forced_chunk > 0) return std::min(steps, forced_chunk.load());
  const int64_t most = std::max<int64_t>(1, most_input_bytes / std::max<int64_t>(1, bytes_per_step));
  const int64_t chunks = std::max<int64_t>(1, (steps + most - 1) / most);
  return (steps + chunks - 1) / chunks;
}

void set_projected_override(int when) { forced_projected = when; }

InputPlan input_plan(const LayerPlan& layer, const CellInfo& cell, DType dtype, bool tf32, int64_t steps, int64_t batch,
                     int64_t H, int64_t I, bool uniform, bool aligned, int at_once, const Machine& machine) {
  const int forced = forced_projected;
  const auto may = [&](Projected when) { return forced < 0 || forced == int(when); };
  const PersistentPlan& p = layer.persistent;
  const bool persistent = layer.path == Path::persistent;
  if (uniform && aligned && persistent && may(Projected::within)) {
    const int blocks = projecting_blocks(p, cell, int(size_of(dtype)), steps, batch, H, I, machine, at_once);
    if (blocks > 0) return {Projected::within, blocks, layer};
  }
  const double operations = 2.0 * double(steps * batch) * double(cell.input.count * H) * double(I);
  const double rate = size_of(dtype) == 2 ? 5e14 : tf32 ? 2e14 : 4e13;  // of a whole card, a second
  const bool pays = operations / rate > 20e-6 && persistent && 4 * p.blocks * p.slices <= 3 * machine.processors;
  if (uniform && at_once == 1 && steps >= 4 && may(Projected::beside) && (pays || forced == int(Projected::beside)))
    return {Projected::beside, 0, layer};
  return {Projected::before, 0, layer};
}

std::string describe(const InputPlan& plan) {
  if (plan.when == Projected::within) return "by " + std::to_string(plan.blocks) + " blocks of its launch";
  return plan.when == Projected::beside ? "that of later steps beside the first" : "before";
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
