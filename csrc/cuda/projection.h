// The projection of a layer's input within the recurrence's own launch: blocks that the recurrence has no use for multiply x and
// W_ih, a tile of rows after the other in the order of steps, and the others read what is there by then. No second launch, no
// product to wait for. They wait for nobody, and the launch is cooperative: the others wait for blocks that are resident.
// They come first in the grid all the same.
#pragma once

#include "cuda/persistent.h"

namespace fusedrnn::cuda {

constexpr int projected_rows = 64, projected_units = 32;  // of x, and of the hidden units: what a block computes at a time
constexpr int projection_stages = 4;  // of a chunk of k each, multiplied or on their way
constexpr int projection_sight = 32;  // tiles that a warp looks ahead for, a lane each

FUSEDRNN_HD_INLINE int64_t projection_tiles(int64_t rows) { return ceil_div(rows, projected_rows); }
FUSEDRNN_HD_INLINE int64_t projection_parts(int64_t H) { return ceil_div(H, projected_units); }  // of a tile
// Rows of a stage: of x, then of W_ih for each of `count` slots.
FUSEDRNN_HD constexpr int projection_lines(int count) { return projected_rows + count * projected_units; }
FUSEDRNN_HD constexpr int projection_shared_bytes(int count) {
  return projection_stages * projection_lines(count) * chunk_bytes;
}

// How many blocks of the launch of this forward plan project its input of width I, for sequences of `steps` steps each; 0
// where they cannot, or would be waited for. size: of an element of the arrays, in bytes.
int projecting_blocks(const PersistentPlan& plan, const CellInfo& cell, int size, int64_t steps, int64_t batch, int64_t H,
                      int64_t I, const Machine& machine, int at_once);

}  // namespace fusedrnn::cuda
