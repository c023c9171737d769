// The core in a program of one's own: an LSTM and a linear readout learn to tell where a sine wave goes next; then the
// layer runs step by step, as its inputs come, and gives the very bits that the whole sequence gave.
//
// Arrays are contiguous here; any strides of T and B would do. fusedrnn.h says what the core expects.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "fusedrnn.h"

namespace fr = fusedrnn;
using Floats = std::vector<float>;

namespace {

constexpr int64_t T = 40, B = 8, I = 1, H = 32;  // steps, waves side by side, inputs, hidden units
const fr::Spec spec{fr::cell_named("lstm"), I, H, 1, 1, true, false};  // one layer in one direction, with biases
const int64_t rows = spec.info().gates * H;

// What is learned, or its gradients: PyTorch's layout, gates in the order i, f, g, o.
struct Parameters {
  Floats w_ih = Floats(rows * I), w_hh = Floats(rows * H), b_ih = Floats(rows), b_hh = Floats(rows), readout = Floats(H);
  fr::StackWeights<float> layer() { return {{w_ih.data(), w_hh.data(), b_ih.data(), b_hh.data()}}; }
  fr::StackWeights<const float> layer() const { return {{w_ih.data(), w_hh.data(), b_ih.data(), b_hh.data()}}; }
  std::vector<Floats*> all() { return {&w_ih, &w_hh, &b_ih, &b_hh, &readout}; }
};

struct Model {
  Parameters values, gradients;
  Floats y = Floats(T * B * H), dy = Floats(T * B * H);  // (T, B, H)
  Floats h = Floats(B * H), c = Floats(B * H);           // final states (1, B, H)

  Model() {
    std::mt19937 generator(0);
    std::uniform_real_distribution<float> uniform(-1 / std::sqrt(float(H)), 1 / std::sqrt(float(H)));
    for (Floats* parameter : values.all())
      for (float& value : *parameter) value = uniform(generator);
  }

  // A forward pass over x (T, B, I) from zero states; `tape` keeps what a backward pass needs, null keeps nothing.
  void run(const Floats& x, fr::Tape<float>* tape) {
    fr::StackForward<float> call;
    call.spec = spec, call.T_ = T, call.B = B;
    call.weights = std::as_const(values).layer();
    call.x = fr::time_major(x.data(), B, I);
    call.y = fr::time_major(y.data(), B, H);
    call.final_state[0] = h.data(), call.final_state[1] = c.data();
    fr::run_forward(call, tape);
  }

  // One step of gradient descent; returns the mean square of readout * h_t - x_{t+1}.
  double learn(const Floats& x, float rate) {
    fr::Tape<float> tape(spec, T, B, /*lengths=*/nullptr, /*has_state=*/false, /*dropout=*/0, /*seed=*/0);
    run(x, &tape);
    const int64_t told = (T - 1) * B;
    double loss = 0;
    dy.assign(dy.size(), 0), gradients.readout.assign(H, 0);
    for (int64_t r = 0; r < told; ++r) {
      const float* const h_t = &y[r * H];
      float error = -x[r + B];  // of the step after, in a row of B further
      for (int64_t u = 0; u < H; ++u) error += values.readout[u] * h_t[u];
      loss += double(error) * error / told;
      for (int64_t u = 0; u < H; ++u) {
        gradients.readout[u] += 2 * error / told * h_t[u];
        dy[r * H + u] = 2 * error / told * values.readout[u];
      }
    }
    fr::StackBackward<float> call;
    call.spec = spec, call.tape = &tape;
    call.weights = std::as_const(values).layer(), call.dweights = gradients.layer();
    call.x = fr::time_major(x.data(), B, I);
    call.dy = fr::time_major<const float>(dy.data(), B, H);
    fr::run_backward(call);  // dx and dstate stay null: not wanted
    for (size_t p = 0; p < values.all().size(); ++p)
      for (size_t i = 0; i < values.all()[p]->size(); ++i) (*values.all()[p])[i] -= rate * (*gradients.all()[p])[i];
    return loss;
  }
};

}  // namespace

int main() {
  std::printf("kernels for %s, up to %d threads\n", fr::isa().c_str(), fr::wanted_threads());
  Floats x(T * B * I);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t b = 0; b < B; ++b) x[t * B + b] = std::sin(0.2f * t + 0.7f * b);

  Model model;
  const double before = model.learn(x, 0.3f);
  double after = before;
  for (int i = 0; i < 600; ++i) after = model.learn(x, 0.3f);
  std::printf("mean square error %.4f, %.5f after 600 steps\n", before, after);

  model.run(x, nullptr);
  const auto panels = std::make_shared<const fr::Panels<float>>(spec, std::as_const(model.values).layer());  // packed once
  fr::Stream<float> stream(spec, panels, B);
  Floats h(B * H);
  int64_t same = 0;
  for (int64_t t = 0; t < T; ++t) {
    stream.step(&x[t * B], h.data());  // (B, I) -> (B, H); allocates nothing
    for (int64_t i = 0; i < B * H; ++i) same += h[i] == model.y[t * B * H + i];
  }
  std::printf("step by step: %lld of %lld values have the same bits\n", (long long)same, (long long)(T * B * H));
  return after < before / 20 && same == T * B * H ? 0 : 1;
}
