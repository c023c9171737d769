// Checksums by which a backward pass knows the arrays of its forward pass again.
#pragma once

#include <algorithm>
#include <atomic>

#include "cpu/dispatch.h"
#include "cpu/panels.h"
#include "cpu/sequence.h"
#include "cpu/threads.h"
#include "spec.h"

namespace fusedrnn {

// What a tape remembers of x and of the parameters: sums over their words, which any threads may take in any order.
// Weights are hashed piece by piece just before a piece is packed, so that they come from memory once.
template <class T>
class Checksums {
 public:
  explicit Checksums(const Spec& spec) : spec_(spec) {}

  // This rank's part; the padding of x is left out.
  void add_x(const Sequence<const T>& a, const Order& order, int rank, int threads) {
    const int64_t B = order.from.size(), steps = order.active.size() - 1, row = words(spec_.I);
    const bool whole_steps = a.row == spec_.I && (steps == 0 || order.active[steps - 1] == B);
    uint64_t sum = 0;
    const Part part(steps, rank, threads);
    for (int64_t s = part.begin; s < part.end; ++s) {
      if (whole_steps) {
        sum += hash_(a.data + s * a.step, 1, 0, B * spec_.I, s * B * row);
      } else {
        for (int64_t j = 0; j < order.active[s]; ++j)
          sum += hash_(a.data + s * a.step + order.from[j] * a.row, 1, 0, spec_.I, (s * B + order.from[j]) * row);
      }
    }
    x_.fetch_add(sum, std::memory_order_relaxed);
  }
  // Of columns [begin, end) of a matrix's rows of block b, in all gates: layer and direction i, w_ih or w_hh. A thread
  // adds up what it has, and then adds that.
  uint64_t rows(const T* w, int64_t i, bool recurrent, int64_t b, int64_t begin, int64_t end) const {
    const int64_t lanes = kernels<T>().lanes, H = spec_.H, columns = recurrent ? H : spec_.input_size(i / spec_.D);
    end = std::min(end, columns);
    uint64_t sum = 0;
    if (begin >= end) return sum;
    for (int gate = 0; gate < spec_.info().gates; ++gate) {
      const int64_t r = gate * H + b * lanes;
      sum += hash_(w + r * columns + begin, std::min(lanes, H - b * lanes), columns, end - begin,
                   place(i, recurrent ? 1 : 0) + r * words(columns) + begin * sizeof(T) / 8);
    }
    return sum;
  }
  void add_weights(uint64_t sum) { weights_.fetch_add(sum, std::memory_order_relaxed); }
  void add_biases(const StackWeights<const T>& weights) {
    if (!spec_.bias) return;
    const int64_t n = spec_.info().gates * spec_.H;
    uint64_t sum = 0;
    for (int64_t i = 0; i < spec_.count(); ++i)
      sum += hash_(weights[i].b_ih, 1, 0, n, place(i, 2)) + hash_(weights[i].b_hh, 1, 0, n, place(i, 3));
    add_weights(sum);
  }
  uint64_t x() const { return x_; }
  uint64_t weights() const { return weights_; }

 private:
  static int64_t words(int64_t n) { return ceil_div(n * int64_t(sizeof(T)), 8); }
  // Where an array's words start: far apart, and in no step with the keys.
  static uint64_t place(int64_t i, int array) { return uint64_t(4 * i + array + 1) * 0xd1342543de82ef95u; }
  const Spec spec_;
  const decltype(Kernels<T>::hash) hash_ = kernels<T>().hash;
  std::atomic<uint64_t> x_{0}, weights_{0};
};

}  // namespace fusedrnn
