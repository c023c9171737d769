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
constexpr int row_tile = 32;         // rows of the weights that a warp multiplies at a time, or half of it: Stage::fold
constexpr int chunk_bytes = 64;      // of k that it multiplies at a time: 16 bytes for each of 4 lanes

enum class Exchange { cluster, grid };

// Chunks of k (pairs of them where rows are folded) whose weights a warp keeps in registers, 16 registers a thread
// each; the rest is in shared memory. As many as leave nothing to spill: float32's products need more registers for
// other things.
FUSEDRNN_HD constexpr int chunks_in_registers(int size, bool backward, int phases, int stage) {
  if (size == 2) return phases > 1 ? (stage == 0 ? 5 : 3) : 8;
  return (phases > 1 ? (stage == 0 ? 3 : 2) : 5) - (backward && stage == 0 ? 1 : 0);
}

// One product of a step: the operand, of `slots` values for every unit, times a block's `rows` rows of the weights.
// Stage q is the product of forward phase q; of backward, whose stages 1.. give the gradients of later phases'
// operands.
struct Stage {
  int slots, rows;
  int fold;                    // 2: so few rows that a warp takes half a row_tile, and two chunks of k in one place
  int row_warps, depth_warps;  // the warps split the rows, row_tile / fold each, and k
  int chunks, warp_chunks;     // of k: all; of one warp
  int stride;                  // elements from sequence to sequence of the operand
  int operand, handed;  // bytes: where it lies in shared memory; of a grid, in the slice's workspace. Two buffers,
                        // but one in the shared memory of a grid's blocks, which fetch it
  int weights;          // bytes: in shared memory
  FUSEDRNN_HD_INLINE int operand_bytes(int columns, int size) const { return columns * stride * size; }  // of one buffer
};

struct PersistentPlan {
  const char* reason;  // why there is none, for people; null where there is one
  Exchange exchange;
  int slices, columns;  // columns: sequences of a slice
  int blocks, units;    // of a group; of a block, a multiple of 8
  Stage stage[max_phases];
  int tile, tile_rows;    // floats [depth_warps][tile_columns()][tile_rows]: where partial sums meet
  int staging, barriers;  // bytes, in shared memory
  int shared_bytes;
  int flags, workspace_slice;  // bytes, in global memory and of it; all is zero at the launch
  bool tf32;
  double estimated_us;  // of a step, by arithmetic that no card has confirmed: see docs/cuda.md
  FUSEDRNN_HD_INLINE int tile_columns() const { return (columns + 7) / 8 * 8; }
  int64_t workspace_bytes() const { return int64_t(workspace_slice) * slices; }
};

// size: of an element of the arrays, 4 or 2 bytes (float64 has no persistent path). at_once: how many such launches
// share the device, as two directions do.
PersistentPlan persistent_plan(const CellInfo& cell, int size, bool backward, int H, int64_t batch, bool tf32,
                               const Machine& machine, int at_once = 1);
// The plan of these measures, for tests and experiments.
PersistentPlan persistent_plan(const CellInfo& cell, int size, bool backward, int H, int64_t batch, bool tf32,
                               const Machine& machine, int at_once, Exchange exchange, int blocks, int columns);

// False where the driver refuses such a launch (see is_refusal); no array of args is touched then. Throws Error where
// it fails otherwise. workspace: plan.workspace_bytes(), zeroed here, on the stream.
template <class T>
[[nodiscard]] bool persistent_forward(int cell, const PersistentPlan& plan, const ForwardArgs<T>& args, void* workspace,
                                      CUstream_st* stream);
template <class T>
[[nodiscard]] bool persistent_backward(int cell, const PersistentPlan& plan, const BackwardArgs<T>& args, void* workspace,
                                       CUstream_st* stream);

}  // namespace fusedrnn::cuda
