// How a layer's work is cut over threads, time and rows. A plan is a function of the sizes, the machine and `several` below,
// and in tests of what overrides it; it changes how long a call takes and never what it returns.
#pragma once

#include <vector>

#include "args.h"
#include "cells/all.h"

namespace fusedrnn {

struct Machine {
  int64_t l2_bytes;  // of one core
  int64_t l3_bytes;  // as the system tells it: of the cores that share it, or of all
};
Machine this_machine();

struct LayerSize {
  int64_t T, B, I, H;
  const CellInfo* cell;
  int lanes;           // of the ISA's vector
  int element_bytes;
  bool fuses;          // the ISA's tiles can make both products of a step of this cell
};

// `several`: more than one thread where the shape has work for them, whatever the cost model says.
Plan forward_plan(const LayerSize& size, const Machine& machine, int threads, bool several = false);
Plan backward_plan(const LayerSize& size, const Machine& machine, int threads, bool several = false);

// A stack's layers as a wavefront: each team runs its layers (l * teams / L is the team of layer l) one range of steps
// after the other, as soon as the layers below, or above in backward, have done that range.
struct Wave {
  int teams = 1;       // 1: no wavefront; layer after layer, each with all threads
  int64_t ranges = 1;  // that the steps are cut into
  double estimated_us = 0;
};
Wave forward_wave(const std::vector<LayerSize>& layers, const Machine& machine, int threads);
Wave backward_wave(const std::vector<LayerSize>& layers, const Machine& machine, int threads);

// For tests, while no call runs: fields above 0 replace the plan's own (as far as the shape allows).
struct PlanOverride {
  int row_threads = 0, unit_threads = 0;
  int64_t chunk_steps = 0, chunk_rows = 0;
  int teams = 0;
  int64_t ranges = 0;
  int fused = 0;     // 1: as far as the cell's tiles can; 2: not
  int prefetch = 0;  // 1: yes; 2: no
};
void set_plan_override(const PlanOverride& values);
bool are_threads_overridden();  // in any way: then nothing else chooses between one and several

}  // namespace fusedrnn
