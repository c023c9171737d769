// How a layer's work is cut over threads, time and rows. A plan is a pure function of the sizes and the machine; it
// changes how long a call takes and never what it returns.
#pragma once

#include "args.h"
#include "cells/all.h"

namespace fusedrnn {

struct Machine {
  int64_t l2_bytes;  // of one core
};
Machine this_machine();

struct LayerSize {
  int64_t T, B, I, H;
  const CellInfo* cell;
  int lanes;           // of the ISA's vector
  int element_bytes;
};

Plan forward_plan(const LayerSize& size, const Machine& machine, int threads);
Plan backward_plan(const LayerSize& size, const Machine& machine, int threads);

// For tests, while no call runs: fields above 0 replace the plan's own (as far as the shape allows).
struct PlanOverride {
  int row_threads = 0, unit_threads = 0;
  int64_t chunk_steps = 0, chunk_rows = 0;
};
void set_plan_override(const PlanOverride& values);

}  // namespace fusedrnn
