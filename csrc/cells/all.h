// THE list of cells. Instantiation, dispatch, bindings and native programs iterate it; the order is the cell's number.
#pragma once

#include <string.h>

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"

#define FUSEDRNN_FOR_EACH_CELL(F) \
  F(Lstm)                         \
  F(Gru)                          \
  F(GruResetBefore)               \
  F(RnnTanh)                      \
  F(RnnRelu)

namespace fusedrnn {

// The constants of a cell, for code that meets it at run time.
struct CellInfo {
  static constexpr int max_slots = 4;
  const char* name;
  int gates, states, slots, saved, phases;
  int slot_gate[max_slots];
  Span input;
  Span recurrent[max_phases];
};

template <class Cell>
constexpr CellInfo cell_info() {
  static_assert(Cell::states <= max_states && Cell::phases <= max_phases && Cell::slots <= CellInfo::max_slots,
                "raise the limits, here and in cell.h");
  CellInfo info{Cell::name, Cell::gates, Cell::states, Cell::slots, Cell::saved, Cell::phases, {}, Cell::input, {}};
  for (int s = 0; s < Cell::slots; ++s) info.slot_gate[s] = Cell::slot_gate[s];
  for (int p = 0; p < Cell::phases; ++p) info.recurrent[p] = Cell::recurrent[p];
  return info;
}

#define FUSEDRNN_CELL_INFO(Cell) cell_info<Cell>(),
inline constexpr CellInfo cells[] = {FUSEDRNN_FOR_EACH_CELL(FUSEDRNN_CELL_INFO)};
#undef FUSEDRNN_CELL_INFO
inline constexpr int cell_count = sizeof(cells) / sizeof(cells[0]);

// The number of the cell with this name, or -1.
inline int cell_named(const char* name) {
  for (int i = 0; i < cell_count; ++i)
    if (strcmp(cells[i].name, name) == 0) return i;
  return -1;
}

}  // namespace fusedrnn
