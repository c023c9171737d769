// Which persistent plan fits, and what a step of it should take.
#include <algorithm>

#include "cuda/persistent.h"
#include "cuda/projection.h"

namespace fusedrnn::cuda {

namespace {

// Cycles of a step, fitted to the times of all plans of 180 layers on an H200 (bench/native/cuda_steps.cpp): the plan that
// takes least by this sum takes 1.1 % more than the fastest, on the average.
constexpr double clock_per_us = 1800;
constexpr double step_clocks = 1310, more_pairs_clocks = 950;  // all but the rest; for a thread's further pairs
constexpr double products_per_clock = 1160, tf32_products_per_clock = 350, fma_per_clock = 85;  // of a multiprocessor
constexpr double weights_per_clock = 188, operand_per_clock = 48;  // bytes of shared memory, beside the products
constexpr double cluster_bytes_per_clock = 26;                     // that come into a block
constexpr double grid_clocks = 905, grid_bytes_per_clock = 30, grid_all_bytes_per_clock = 13200;  // the last: into all blocks

// Believed, not yet measured: what a block takes for a tile's part; for each value of k, of each 8 rows or units of a warp.
constexpr double projected_part_clocks = 1500, projected_k_clocks = 1.4;

int round_up(int64_t n, int to) { return int(ceil_div(n, to) * to); }

PersistentPlan refuse(const char* reason) {
  PersistentPlan plan{};
  plan.reason = reason;
  return plan;
}

int clusters_of(const Machine& machine, int blocks) {
  int i = 0;
  while (1 << i < blocks) ++i;
  return i < 5 && 1 << i == blocks ? machine.clusters[i] : 0;
}

double clocks_of(const PersistentPlan& p, const Stage& s, bool backward, int phases, int q, int size) {
  const int words = 2 * tiles_of(s.results, s.wide), held = words_in_registers(size, backward, p.exchange, phases, q) / words;
  const double warps = s.row_warps * s.depth_warps, more = std::max(0, s.warp_chunks - held);
  const double weights = more * words * 32 * 16 * warps * std::max(1, p.places / 8), operand = double(s.bytes) * s.row_warps;
  const double rows = double(tiles_of(s.results, s.wide)) * 16 * s.row_warps, k = double(s.chunks) * chunk_bytes / size;
  const double columns = size == 4 && !p.tf32 ? p.places : std::max(8, p.places);
  const double rate = size == 2 ? products_per_clock : p.tf32 ? tf32_products_per_clock : fma_per_clock;
  const double product =
      rows * k * columns / (rate * warps / persistent_warps) + weights / weights_per_clock + operand / operand_per_clock;
  const double bytes = double(s.part) * p.blocks;  // into a block
  const double exchange = p.exchange == Exchange::grid ? grid_clocks + bytes / grid_bytes_per_clock +
                                                             bytes * p.blocks * p.slices / grid_all_bytes_per_clock
                                                       : bytes / cluster_bytes_per_clock;
  return step_clocks + (ceil_div(p.cells, persistent_warps) - 1) * more_pairs_clocks + product + exchange;
}

}  // namespace

PersistentPlan persistent_plan(const CellInfo& cell, int size, bool backward, int H, int64_t batch, bool tf32,
                               const Machine& machine, int at_once, Exchange exchange, int blocks, int columns) {
  PersistentPlan p{};
  p.exchange = exchange, p.columns = columns, p.tf32 = tf32 && size == 4;
  p.slices = int(ceil_div(batch, columns));
  p.units = round_up(ceil_div(H, blocks), 8);
  p.blocks = int(ceil_div(H, p.units));
  if (exchange == Exchange::cluster) {
    // Powers of two alone: other sizes leave as many multiprocessors idle, and pack badly. One block is no cluster, since
    // blocks store to one another.
    p.blocks = blocks;
    if (blocks < 2) return refuse("a cluster has two blocks or more");
    if (clusters_of(machine, blocks) == 0) return refuse("the device has no clusters of so many blocks");
  } else if (int64_t(p.blocks) * p.slices * at_once > machine.cooperative) {
    return refuse("the blocks of all slices are not resident at once");
  }
  p.places = columns == 1 ? 1 : columns <= 4 && (size == 2 || tf32) ? 4 : round_up(columns, 8);
  p.cells = p.units / lane_units * (p.places < 8 ? 1 : p.places / 4);
  p.tile_cells = p.places < 8 ? 2 * p.cells : p.cells;
  if (p.cells > persistent_pairs * persistent_warps) return refuse("a thread would have too many units");

  int64_t shared = 0, step = 0;
  int64_t tile = 0;
  const auto take = [](int64_t& from, int64_t bytes) {
    const int64_t at = from;
    from += ceil_div(bytes, 128) * 128;
    return at;
  };
  const bool grid = exchange == Exchange::grid;
  take(shared, 2 * max_phases * 8);  // barriers
  for (int q = 0; q < cell.phases; ++q) {
    Stage& s = p.stage[q];
    s.slots = backward ? cell.recurrent[q].count : 1, s.results = backward ? 1 : cell.recurrent[q].count;
    s.wide = s.results == 1 && p.units > 2 * lane_units;
    s.row_warps = int(ceil_div(p.units, lane_units * groups_of(s.results, s.wide)));
    if (s.row_warps > persistent_warps) return refuse("a block would have too many rows of the weights");
    s.depth_warps = persistent_warps / s.row_warps;
    s.part = s.slots * p.units * p.places * size;
    s.arriving = p.blocks * s.part;
    const int vectors = s.part / 16;
    s.passes = int(ceil_div(int64_t(vectors) * p.blocks, persistent_threads));
    s.vector_step = persistent_threads % vectors, s.block_step = persistent_threads / vectors;
    s.chunks = int(ceil_div(int64_t(s.slots) * p.blocks * p.units * size, chunk_bytes));
    s.warp_chunks = int(ceil_div(s.chunks, s.depth_warps));
    s.bytes = s.chunks * chunk_bytes * p.places;
    s.operand = int(take(shared, (grid ? 1 : 2) * int64_t(s.bytes)));
    s.handed = int(take(step, int64_t(p.blocks) * s.part));
    const int words = 2 * tiles_of(s.results, s.wide),
              more = std::max(0, s.warp_chunks - words_in_registers(size, backward, exchange, cell.phases, q) / words);
    s.weights = int(take(shared, int64_t(more) * words * s.row_warps * s.depth_warps * 32 * 16));
    const int floats = s.results == 3 ? 4 : s.results;
    tile = std::max<int64_t>(tile, int64_t(s.depth_warps) * p.tile_cells * 32 * floats * 4);
    p.staging_stage = std::max(p.staging_stage, grid ? round_up(s.part, 128) : 0);
  }
  p.tile = int(take(shared, tile));
  p.staging = int(take(shared, int64_t(p.staging_stage) * cell.phases));
  static_assert(persistent_pairs == 2, "as many inputs wait for a thread: of its pairs, or of two steps");
  p.input = int(take(shared, backward ? 0 : int64_t(persistent_pairs) * persistent_threads * cell.input.count * 4));
  p.step_bytes = grid ? int(step) : 0;
  if (shared > machine.shared_per_block) return refuse("the weights do not fit on chip");
  p.shared_bytes = int(std::max<int64_t>(shared, persistent_threads * 4));  // see constant()

  double clocks = 0;
  for (int q = 0; q < cell.phases; ++q) clocks += clocks_of(p, p.stage[q], backward, cell.phases, q, size);
  if (exchange == Exchange::cluster) {
    clocks *= double(ceil_div(int64_t(p.slices) * at_once,
                              clusters_of(machine, blocks)));  // clusters wait for one another's end, for nothing else
  }
  p.estimated_us = clocks / clock_per_us;
  return p;
}

PersistentPlan persistent_plan(const CellInfo& cell, int size, bool backward, int H, int64_t batch, bool tf32,
                               const Machine& machine, int at_once) {
  if (size == 8) return refuse("float64 runs step by step");
  if (batch <= 0) return refuse("the batch is empty");
  bool any = machine.cooperative > 0;
  for (int clusters : machine.clusters) any = any || clusters > 0;
  PersistentPlan best = refuse(any ? "W_hh does not fit on chip" : "the driver launches neither clusters nor resident grids");
  const auto consider = [&](Exchange exchange, int blocks, int columns) {
    const PersistentPlan p = persistent_plan(cell, size, backward, H, batch, tf32, machine, at_once, exchange, blocks, columns);
    if (!p.reason && (best.reason || p.estimated_us < best.estimated_us)) best = p;
  };
  for (int blocks = 2; blocks <= machine.max_cluster; blocks *= 2)
    for (int columns : {4, 8, 16})
      if (blocks == 2 || int64_t(blocks - 1) * 8 < H)
        consider(Exchange::cluster, blocks, int(std::min<int64_t>(columns, batch)));
  for (int slices = 1; slices <= machine.processors && slices <= ceil_div(batch, 4); ++slices) {
    const int64_t each = ceil_div(batch, slices);
    const int columns = int(std::min<int64_t>(each <= 4 ? 4 : round_up(each, 8), batch));
    for (int units = 8; units * columns <= persistent_pairs * persistent_threads && units < H + 8; units += 8)
      consider(Exchange::grid, int(ceil_div(H, units)), columns);
  }
  return best;
}

int projecting_blocks(const PersistentPlan& plan, const CellInfo& cell, int size, int64_t steps, int64_t batch, int64_t H,
                      int64_t I, const Machine& machine, int at_once) {
  const int count = cell.input.count;
  if (plan.reason || size != 2 || plan.cells > persistent_warps || projection_shared_bytes(count) > machine.shared_per_block)
    return 0;
  if (!machine.projects[int(plan.exchange)] || machine.cooperative == 0 || I * size % 16 != 0) return 0;
  if (8 * batch > projection_sight * projected_rows) return 0;  // or else few steps are seen at a time
  const bool grid = plan.exchange == Exchange::grid;
  const int64_t all = grid ? machine.cooperative : int64_t(clusters_of(machine, plan.blocks)) * plan.blocks;
  const int64_t group = grid ? 1 : plan.blocks, idle = all / group / at_once * group - int64_t(plan.slices) * plan.blocks;
  const int64_t tiles = projection_tiles(steps * batch), parts = projection_parts(H);
  const double part = projected_part_clocks + projected_k_clocks * double(projected_rows / 16 + count) * double(I);
  // In half of the recurrence's time, and a part or two of each tile: the rest of the card is left to others.
  const auto most_parts = int64_t(double(steps) * plan.estimated_us * clock_per_us / (2 * part));  // of a block
  if (most_parts == 0 || idle <= 0) return 0;
  const int64_t blocks = ceil_div(std::max(ceil_div(tiles * parts, most_parts), std::min(parts, idle)), group) * group;
  return blocks <= idle && parts <= 2 * blocks ? int(blocks) : 0;
}

}  // namespace fusedrnn::cuda
