// What a stack is apart from its weights: its cell, sizes and directions. The same for every device.
#pragma once

#include <stdint.h>

#include "cells/all.h"

namespace fusedrnn {

struct Spec {
  int cell;              // index into cells[]
  int64_t I, H, L;
  int D;                 // directions
  bool bias, reverse;    // reverse: the only direction runs backward in time
  const CellInfo& info() const { return cells[cell]; }
  int64_t input_size(int64_t layer) const { return layer == 0 ? I : D * H; }
  int64_t count() const { return L * D; }
  bool backward_in_time(int d) const { return reverse || d == 1; }
};

}  // namespace fusedrnn
