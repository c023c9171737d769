// Which persistent plan fits, and what a step of it should take. The costs below are of data sheets and of papers, not
// measured by us: bench/native/cuda_latency.cu is there to replace them.
#include <algorithm>

#include "cuda/persistent.h"

namespace fusedrnn::cuda {

namespace {

constexpr double clock_per_us = 1700;  // cycles
constexpr double shared_bytes_per_clock = 128;
constexpr double products_per_clock = 1250;  // of a multiprocessor's mma.sync, 16 bits; half of it for TF32
constexpr double fma_per_clock = 128;
constexpr double step_clocks = 500;     // a phase's tile, cell, barrier and stores
constexpr double cluster_clocks = 500;  // from a store to a peer until the peer's barrier lets it pass
constexpr double grid_clocks = 2200;    // store, flag, its polling and the loads after it, through the second cache

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

double clocks_of(const PersistentPlan& p, const Stage& s, bool backward, int phases, int q, int size, int64_t batch) {
  const double columns = double(std::min<int64_t>(p.columns, batch));
  const double width = size == 4 && !p.tf32 && columns <= 2 ? columns : p.tile_columns();
  const double k = double(s.chunks) * chunk_bytes / size, rows = double(s.row_warps) * row_tile / s.fold;
  const double held = chunks_in_registers(size, backward, phases, q),
               more = std::max(0.0, double(ceil_div(s.warp_chunks, s.fold)) - held);
  const double weights = more * row_tile * chunk_bytes * s.row_warps * s.depth_warps;
  const double operand = k * size * columns * s.row_warps;
  const double rate = size == 2 ? products_per_clock : p.tf32 ? products_per_clock / 2 : fma_per_clock;
  const double busy = double(s.row_warps * s.depth_warps) / persistent_warps;
  const double product = std::max(rows * k * width / (rate * busy), (weights + operand) / shared_bytes_per_clock);
  const double bytes = double(s.slots) * p.units * columns * size * p.blocks;  // into and out of a block
  const double transfer = p.exchange == Exchange::cluster ? bytes / 32 : bytes / 64;
  const double latency = p.exchange == Exchange::grid ? grid_clocks : p.blocks > 1 ? cluster_clocks : 150;
  return product + step_clocks + latency + transfer;
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
    // A cluster of another size than asked for would waste no less, and 3 or 5 blocks place badly.
    p.blocks = blocks;
    if (clusters_of(machine, blocks) == 0) return refuse("the device has no clusters of so many blocks");
  } else if (int64_t(p.blocks) * p.slices * at_once > machine.cooperative) {
    return refuse("the blocks of all slices are not resident at once");
  }
  if (p.units * columns > persistent_pairs * persistent_threads) return refuse("a thread would have too many units");

  int64_t shared = 0, workspace = 0;
  int tile = 0;
  const int per_chunk = chunk_bytes / size;
  const auto take = [](int64_t& from, int64_t bytes) {
    const int64_t at = from;
    from += ceil_div(bytes, 128) * 128;
    return at;
  };
  p.barriers = int(take(shared, 2 * max_phases * 8));
  int most_slots = 1;
  for (int q = 0; q < cell.phases; ++q) {
    Stage& s = p.stage[q];
    s.slots = backward ? cell.recurrent[q].count : 1;
    s.rows = (backward ? 1 : cell.recurrent[q].count) * p.units;
    s.fold = s.rows <= row_tile / 2 && (backward || cell.recurrent[q].count == 1) ? 2 : 1;
    s.row_warps = int(ceil_div(s.rows, row_tile / s.fold));
    if (s.row_warps > persistent_warps) return refuse("a block would have too many rows of the weights");
    s.chunks = int(ceil_div(int64_t(s.slots) * p.blocks * p.units, per_chunk));
    s.depth_warps = std::min(persistent_warps / s.row_warps, s.chunks);
    s.warp_chunks = int(ceil_div(s.chunks, s.depth_warps));
    // Rows of the operand 64 bytes off a multiple of 128: eight lanes that load from two of them meet in no bank.
    s.stride = (s.chunks + (s.chunks + 1) % 2) * per_chunk;
    const bool grid = exchange == Exchange::grid;
    s.operand = int(take(shared, (grid ? 1 : 2) * s.operand_bytes(columns, size)));
    s.handed = int(take(workspace, 2 * s.operand_bytes(columns, size)));
    const int more = std::max(0, int(ceil_div(s.warp_chunks, s.fold)) - chunks_in_registers(size, backward, cell.phases, q));
    s.weights = int(take(shared, int64_t(more) * s.row_warps * s.depth_warps * row_tile * chunk_bytes));
    p.tile_rows = std::max(p.tile_rows, s.row_warps * row_tile + 4);  // 4: a store of the tile meets in no bank
    tile = std::max(tile, s.depth_warps);
    most_slots = std::max(most_slots, s.slots);
  }
  p.tile = int(take(shared, int64_t(tile) * p.tile_columns() * p.tile_rows * 4));
  p.staging = int(take(shared, int64_t(persistent_threads) * persistent_pairs * most_slots * size));
  p.flags = int(take(workspace, int64_t(max_phases) * p.blocks * 4));
  p.workspace_slice = exchange == Exchange::grid ? int(workspace) : 0;
  if (shared > machine.shared_per_block) return refuse("the weights do not fit on chip");
  p.shared_bytes = int(shared);

  double clocks = 0;
  for (int q = 0; q < cell.phases; ++q) clocks += clocks_of(p, p.stage[q], backward, cell.phases, q, size, batch);
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
  for (int blocks = 1; blocks <= machine.max_cluster; blocks *= 2)
    for (int columns = 8; columns <= 16; columns += 8)
      if (int64_t(blocks - 1) * 8 < H) consider(Exchange::cluster, blocks, int(std::min<int64_t>(columns, batch)));
  for (int slices = 1; slices <= machine.processors && slices <= ceil_div(batch, 8); ++slices) {
    const int columns = int(std::min<int64_t>(round_up(ceil_div(batch, slices), 8), batch));
    for (int units = 8; units * columns <= persistent_pairs * persistent_threads && units < H + 8; units += 8)
      consider(Exchange::grid, int(ceil_div(H, units)), columns);
  }
  return best;
}

}  // namespace fusedrnn::cuda
