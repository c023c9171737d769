// The persistent path: one launch runs all steps of a layer in one direction, forward or backward, with W_hh on chip
// from the first step to the last. A plan says how, or why not; it is a pure value of shapes and device.
//
// The batch is cut into slices that know nothing of each other. A group of blocks runs a slice; block r of it owns
// hidden units [r*U, (r+1)*U), the rows of the weights that these need, and their c and carry. What the next product
// needs of them, a block hands to all blocks of its group: through distributed shared memory where the group is a
// cluster, through global memory (the second cache level) where it is a part of a grid whose blocks are all resident.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cells/all.h"
#include "cuda/args.h"
#include "cuda/machine.h"

struct CUstream_st;  // cudaStream_t points to it

namespace fusedrnn::cuda {

constexpr int persistent_threads = 256, persistent_warps = persistent_threads / 32;
constexpr int persistent_pairs = 2;  // (unit, sequence) pairs of a thread, at most
constexpr int chunk_bytes = 64;      // of k that a warp multiplies at a time: 16 bytes for each of 4 lanes
constexpr int lane_units = 8;        // hidden units whose results lie side by side in the lanes of a warp
constexpr int workspace_fill = 0xff;  // every byte of a workspace before a launch: what nobody has given

enum class Exchange { cluster, grid };

// A warp multiplies tiles of 16 rows of the weights, half a tile for each slot of 8 units: all `count` slots of
// groups_of() times 8 units. `wide`, where there is one slot: 32 units and not 16, so that fewer warps read the operand.
FUSEDRNN_HD constexpr int groups_of(int count, bool wide) {
  return count == 1 ? (wide ? 4 : 2) : count % 2 == 0 && count > 2 ? 1 : 2;
}
FUSEDRNN_HD constexpr int tiles_of(int count, bool wide) { return count * groups_of(count, wide) / 2; }

// Of a lane's weights, 16 bytes each, those that registers hold; the rest is in shared memory. The most that the compiler
// keeps without a spill: float32's products need more registers for other things.
FUSEDRNN_HD constexpr int words_in_registers(int size, bool backward, Exchange exchange, int phases, int stage) {
  if (size == 2 && phases > 1) return stage == 1 ? 12 : 16;
  if (size == 2) return backward && exchange == Exchange::grid ? 28 : 32;
  return (phases > 1 ? (stage == 0 ? 12 : 8) : 20) - (backward && stage == 0 ? 4 : 0);
}

// One product of a step: the operand, of `slots` values for every unit, times a block's rows of the weights. Stage q is
// the product of forward phase q; of backward, whose stages 1.. give the gradients of later phases' operands.
struct Stage {
  int slots, results;          // values for every unit: of the operand; of the result
  bool wide;                   // see groups_of
  int row_warps, depth_warps;  // the warps split the units and k
  int chunks, warp_chunks;     // of k: all; of one warp
  // Of a cluster, who stores what: of all (16 bytes, receiving block) a thread takes every 256th, so many times; from one to
  // the next it goes on by so many of the 16 bytes and of the blocks.
  int passes, vector_step, block_step;
  // In bytes.
  int part, arriving;          // of the operand: what a block gives; what it gets
  int bytes;                   // of the operand: what arrives, rounded up to whole chunks
  int operand, weights;        // where they lie in shared memory. Of a cluster, two operands side by side
  int handed;                  // of a grid, where what it gives lies in the workspace of a step
};

struct PersistentPlan {
  const char* reason;  // why there is none, for people; null where there is one
  Exchange exchange;
  int slices, columns;  // columns: sequences of a slice
  int places;           // sequences that the operand has room for: 1, 4 (only of tensor cores), or a multiple of 8
  int blocks, units;    // of a group; of a block, a multiple of 8
  Stage stage[max_phases];
  int cells;            // of 8 units and every other one of 8 sequences, or all of up to 4: a pair for each lane
  int tile_cells;       // for which the tile has room: twice as many, where less than 8 sequences are multiplied as 8
  int tile, staging, input;  // bytes, in shared memory, where the barriers lie first
  int shared_bytes;
  int step_bytes;  // of a grid, in global memory: what a slice's blocks give one another in a step
  bool tf32;
  double estimated_us;  // of a step
  int staging_stage;  // bytes from a stage's staging, what a block of a grid gives, to the next stage's
  int64_t workspace_bytes(int64_t steps) const { return int64_t(step_bytes) * slices * steps; }
};

// size: of an element of the arrays, 4 or 2 bytes (float64 has no persistent path). at_once: how many such launches
// share the device, as two directions do.
PersistentPlan persistent_plan(const CellInfo& cell, int size, bool backward, int H, int64_t batch, bool tf32,
                               const Machine& machine, int at_once = 1);
// The plan of these measures, for tests and experiments.
PersistentPlan persistent_plan(const CellInfo& cell, int size, bool backward, int H, int64_t batch, bool tf32,
                               const Machine& machine, int at_once, Exchange exchange, int blocks, int columns);

// False where the driver refuses such a launch (see is_refusal); no array of args is touched then. Throws Error where
// it fails otherwise. workspace: plan.workspace_bytes() of the steps to run, filled with workspace_fill.
template <class T>
[[nodiscard]] bool persistent_forward(int cell, const PersistentPlan& plan, const ForwardArgs<T>& args, void* workspace,
                                      CUstream_st* stream);
template <class T>
[[nodiscard]] bool persistent_backward(int cell, const PersistentPlan& plan, const BackwardArgs<T>& args, void* workspace,
                                       CUstream_st* stream);

}  // namespace fusedrnn::cuda
