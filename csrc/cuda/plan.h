// Which path a layer takes on a GPU, and why: a pure, printable value of the shape and the machine.
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

// The input of a layer's later steps is projected beside its first ones where that product, of `operations`, takes long enough
// to be worth a second launch, and the recurrence leaves multiprocessors idle.
bool worth_a_launch(DType dtype, bool tf32, int64_t steps, double operations);
bool leaves_room(const LayerPlan& plan, const Machine& machine);

// For tests: the path that layers take where they can, or -1 for the plan's own choice. Process-wide.
void set_path_override(int path);
int path_override();
void set_chunk_override(int64_t steps);  // 0: as chunk_steps finds
void set_beside_override(bool on);       // inputs are projected beside the recurrence however small

}  // namespace fusedrnn::cuda
