// One time step of a stream from C++, on one thread: the median and the least of many, in nanoseconds.
//
//     cmake --preset release -B build -DFUSEDRNN_BENCH=ON && cmake --build build --target step && build/step
//
// Arguments: hidden sizes (default: 8 16 32 64 128 256); the input size is the hidden size. float32.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/threads.h"
#include "drawn_layer.h"

using namespace fusedrnn;
using namespace fusedrnn::bench;

namespace {

void measure(int cell, int64_t H) {
  const DrawnLayer layer(cell, H);
  Stream<float> stream = layer.stream();
  const std::vector<float> x = draw(H, 1);
  std::vector<float> h(H);
  const int steps = layer.steps();
  std::vector<double> samples;
  for (int i = 0; i < 400; ++i) {
    const auto start = std::chrono::steady_clock::now();
    for (int s = 0; s < steps; ++s) stream.step(x.data(), h.data());
    samples.push_back(std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count() / steps);
  }
  std::sort(samples.begin(), samples.end());
  std::printf(" %.0f (%.0f) |", samples[samples.size() / 2], samples[0]);
}

}  // namespace

int main(int argc, char** argv) {
  set_default_threads(1);
  std::vector<int> sizes;
  for (int i = 1; i < argc; ++i) {
    sizes.push_back(std::atoi(argv[i]));
    if (sizes.back() < 1) return std::fprintf(stderr, "step: a hidden size must be positive, got %s\n", argv[i]), 2;
  }
  if (sizes.empty()) sizes = {8, 16, 32, 64, 128, 256};
  std::printf("ISA %s; ns a step: median (least)\n\n| cell |", isa().c_str());
  for (int H : sizes) std::printf(" H = %d |", H);
  std::printf("\n|---|");
  for (size_t i = 0; i < sizes.size(); ++i) std::printf("---|");
  for (int cell = 0; cell < cell_count; ++cell) {
    std::printf("\n| %s |", cells[cell].name);
    for (int H : sizes) measure(cell, H);
  }
  std::printf("\n");
}
