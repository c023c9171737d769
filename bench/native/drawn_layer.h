// One layer of the stream benchmarks: weights from U(-1/sqrt(H), 1/sqrt(H)), the input size being the hidden size.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/stream.h"

namespace fusedrnn::bench {

inline std::vector<float> draw(int64_t n, double scale) {
  static std::mt19937 generator(1);
  std::uniform_real_distribution<float> uniform(float(-scale), float(scale));
  std::vector<float> values(n);
  for (float& v : values) v = uniform(generator);
  return values;
}

struct DrawnLayer {
  const Spec spec;
  const int64_t rows;  // gates * H
  const std::vector<float> w_ih, w_hh, b_ih, b_hh;
  DrawnLayer(int cell, int64_t H)
      : spec{cell, H, H, 1, 1, true, false}, rows(spec.info().gates * H), w_ih(draw(rows * H, 1 / std::sqrt(double(H)))),
        w_hh(draw(rows * H, 1 / std::sqrt(double(H)))), b_ih(draw(rows, 1 / std::sqrt(double(H)))),
        b_hh(draw(rows, 1 / std::sqrt(double(H)))) {}
  Stream<float> stream() const {
    const StackWeights<const float> weights{{w_ih.data(), w_hh.data(), b_ih.data(), b_hh.data()}};
    return Stream<float>(spec, std::make_shared<const Panels<float>>(spec, weights), 1);
  }
  int steps() const { return int(std::max<int64_t>(50, 4000000 / (rows * spec.H))); }  // of a sample: 0.2 to 1 ms
};

}  // namespace fusedrnn::bench
