// Arrays of sequences, and their rows in the order in which the kernels meet them.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "args.h"
#include "order.h"

namespace fusedrnn {

// A (T, B, width) array whose rows are contiguous; null where there is none.
template <class T>
struct Sequence {
  T* data = nullptr;
  ptrdiff_t step = 0, row = 0;  // strides of T and B
};

template <class T>
Sequence<T> time_major(T* data, int64_t B, int64_t width) {
  return {data, ptrdiff_t(B * width), ptrdiff_t(width)};
}

// Zeros where a sequence has ended.
template <class T>
void clear_padding(const Sequence<T>& a, int64_t width, const Order& order, int64_t T_) {
  for (size_t j = 0; j < order.from.size(); ++j)
    for (int64_t t = order.length[j]; t < T_; ++t) std::fill_n(a.data + t * a.step + order.from[j] * a.row, width, T(0));
}

// The row tables of one call, which Rows point into.
class RowTables {
 public:
  // Rows of a sequence in the order of processing; `column` is where the direction's part of a row starts.
  template <class T>
  Rows<T> rows(const Sequence<T>& a, const Order& order, bool backward_in_time, int64_t column) {
    if (!a.data) return {nullptr, 0, nullptr};
    std::vector<ptrdiff_t> table(order.from.size());
    for (size_t j = 0; j < table.size(); ++j)
      table[j] = order.from[j] * a.row + (backward_in_time ? (order.length[j] - 1) * a.step : 0) + column;
    return {a.data, backward_in_time ? -a.step : a.step, keep(std::move(table))};
  }
  const ptrdiff_t* states(const Order& order, int64_t H) {
    std::vector<ptrdiff_t> table(order.from.size());
    for (size_t j = 0; j < table.size(); ++j) table[j] = order.from[j] * H;
    return keep(std::move(table));
  }

 private:
  const ptrdiff_t* keep(std::vector<ptrdiff_t>&& table) {
    tables_.push_back(std::move(table));
    return tables_.back().data();
  }
  std::vector<std::vector<ptrdiff_t>> tables_;
};

}  // namespace fusedrnn
