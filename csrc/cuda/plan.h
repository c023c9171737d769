// Which path a layer takes on a GPU, and why: a printable value of the shape, the machine and, in tests, what overrides it.
#pragma once

#include <string>

#include "cuda/dtype.h"
#include "cuda/machine.h"
#include "cuda/persistent.h"

namespace fusedrnn::cuda {

enum class Path { per_step, persistent };

struct LayerPlan {
  Path path;
  PersistentPlan persistent;  // where that is the path
  std::string reason;
};

// at_once: how many such layers run side by side, in streams of their own.
LayerPlan layer_plan(const CellInfo& cell, DType dtype, bool backward, int64_t H, int64_t batch, int64_t rows, bool tf32,
                     int at_once, const Machine& machine);

std::string describe(const LayerPlan& plan);

// Steps whose input projection, of `bytes_per_step` each, is there at once.
int64_t chunk_steps(int64_t steps, int64_t bytes_per_step);

// When a layer's input is projected: before its recurrence; that of the later steps beside the first ones, where the product
// takes long enough to be worth a second launch and leaves multiprocessors idle; or within the recurrence's launch.
enum class Projected { before, beside, within };

struct InputPlan {
  Projected when;
  int blocks;       // of the launch, that project
  LayerPlan layer;  // for which this is planned
};
// Of a forward pass of `steps` steps at once. uniform: all sequences are as long; aligned: rows of x and of W_ih are, to 16 bytes.
InputPlan input_plan(const LayerPlan& layer, const CellInfo& cell, DType dtype, bool tf32, int64_t steps, int64_t batch,
                     int64_t H, int64_t I, bool uniform, bool aligned, int at_once, const Machine& machine);
std::string describe(const InputPlan& plan);

// For tests: the path that layers take where they can, or -1 for the plan's own choice; likewise when their inputs are projected,
// however small they are. Process-wide.
void set_path_override(int path);
int path_override();
void set_projected_override(int when);
void set_chunk_override(int64_t steps);  // 0: as chunk_steps finds

}  // namespace fusedrnn::cuda
