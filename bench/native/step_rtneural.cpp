// One time step from C++, ours beside RTNeural's, a template library whose sizes are fixed when it is compiled: timed in turns
// on one thread, after the results were compared. Medians in nanoseconds; float32; the input size is the hidden size.
//
//     cmake --preset release -B build -DFUSEDRNN_BENCH=ON -DFUSEDRNN_RTNEURAL=/path/to/RTNeural && cmake --build build
//     build/step_rtneural_eigen; build/step_rtneural_xsimd
#include <RTNeural/RTNeural.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "cpu/threads.h"
#include "drawn_layer.h"

using namespace fusedrnn;
using namespace fusedrnn::bench;

namespace {

int cell_named(const char* name) {
  int cell = 0;
  while (std::string(cells[cell].name) != name) ++cell;
  return cell;
}

// (gates * H, K) row by row as [K][gates * H], whose gate g is our gate order[g].
template <int H>
std::vector<std::vector<float>> columns(const std::vector<float>& w, int64_t K, const std::vector<int>& order) {
  std::vector<std::vector<float>> out(K, std::vector<float>(order.size() * H));
  for (int64_t k = 0; k < K; ++k)
    for (size_t g = 0; g < order.size(); ++g)
      for (int u = 0; u < H; ++u) out[k][g * H + u] = w[(order[g] * H + u) * K + k];
  return out;
}

template <class Work>
double sample(int steps, Work work) {
  const auto start = std::chrono::steady_clock::now();
  for (int s = 0; s < steps; ++s) work();
  return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count() / steps;
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

// `Layer` is RTNeural's; set_bias(layer, b_ih, b_hh) has the two biases in its order of gates.
template <class Layer, int H, class SetBias>
bool measure(const char* name, const std::vector<int>& order, SetBias set_bias) {
  const DrawnLayer drawn(cell_named(name), H);
  Stream<float> ours = drawn.stream();

  const auto theirs = std::make_unique<RTNeural::ModelT<float, H, H, Layer>>();
  auto& layer = theirs->template get<0>();
  layer.setWVals(columns<H>(drawn.w_ih, H, order));
  layer.setUVals(columns<H>(drawn.w_hh, H, order));
  set_bias(layer, columns<H>(drawn.b_ih, 1, order)[0], columns<H>(drawn.b_hh, 1, order)[0]);
  theirs->reset();

  alignas(64) float x[H], h[H];
  float error = 0;
  for (int t = 0; t < 20; ++t) {
    const std::vector<float> input = draw(H, 1);
    std::copy(input.begin(), input.end(), x);
    ours.step(x, h);
    theirs->forward(x);
    for (int u = 0; u < H; ++u) error = std::max(error, std::abs(h[u] - theirs->getOutputs()[u]));
  }
  if (!(error < 1e-3f)) return std::fprintf(stderr, "%s, H = %d: results differ by %g\n", name, H, double(error)), false;

  const int steps = drawn.steps();
  std::vector<double> us, them, ratio;
  for (int i = 0; i < 300; ++i) {
    us.push_back(sample(steps, [&] { ours.step(x, h); }));
    them.push_back(sample(steps, [&] { theirs->forward(x); }));
    ratio.push_back(them.back() / us.back());
  }
  std::printf("| %s | %d | %.0f | %.0f | %.2f |\n", name, H, median(us), median(them), median(ratio));
  std::fflush(stdout);
  return true;
}

template <int H>
bool measure_both() {
  const auto lstm = [](auto& layer, std::vector<float> b_ih, const std::vector<float>& b_hh) {
    for (size_t i = 0; i < b_ih.size(); ++i) b_ih[i] += b_hh[i];
    layer.setBVals(b_ih);
  };
  const auto gru = [](auto& layer, const std::vector<float>& b_ih, const std::vector<float>& b_hh) {
    layer.setBVals({b_ih, b_hh});
  };
  return measure<RTNeural::LSTMLayerT<float, H, H>, H>("lstm", {0, 1, 2, 3}, lstm) &&
         measure<RTNeural::GRULayerT<float, H, H>, H>("gru", {1, 0, 2}, gru);
}

}  // namespace

int main() {
  set_default_threads(1);
  std::printf("| cell | H | ours | RTNeural | times |\n|---|---|---|---|---|\n");
  return measure_both<16>() && measure_both<32>() && measure_both<64>() && measure_both<128>() && measure_both<256>() ? 0 : 1;
}
