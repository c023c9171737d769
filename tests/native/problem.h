// One call of a stack with all of its arrays, how to run it through the core, and what must hold for any call: inputs
// stay as they were, outputs are written only inside of their bounds. reference.h solves the same problem in plain
// loops.
#pragma once

#include <string.h>
#include <cmath>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/stack.h"
#include "cpu/stream.h"

namespace fusedrnn::tests {

struct Shape {
  int cell;
  int64_t T, B, I, H, L = 1;
  int D = 1;
  bool bias = true, reverse = false, lengths = false, state = true;
  double dropout = 0;
  Spec spec() const { return {cell, I, H, L, D, bias, reverse}; }
  // Of the longest sum behind a result.
  double terms() const { return double(std::max<int64_t>(T * (H + std::max(I, D * H)) * L, T * B)); }
  std::string name() const {
    char text[160];
    snprintf(text, sizeof text, "%s T=%d B=%d I=%d H=%d L=%d D=%d%s%s%s%s%s", cells[cell].name, int(T), int(B), int(I), int(H),
             int(L), D, bias ? "" : " no bias", reverse ? " reverse" : "", lengths ? " lengths" : "", state ? "" : " no state",
             dropout > 0 ? " dropout" : "");
    return text;
  }
};

// All inputs of a forward and a backward pass. The padding of x and dy holds NaN.
template <class T>
struct Problem {
  Shape shape;
  std::vector<int64_t> lengths;                          // (B)
  std::vector<std::vector<T>> weights;                   // w_ih, w_hh[, b_ih, b_hh] of each layer and direction
  std::vector<T> x, dy;                                  // (T, B, I), (T, B, D*H)
  std::vector<T> state[max_states], dstate[max_states];  // (L*D, B, H)
  uint64_t seed = 1234;

  int states() const { return cells[shape.cell].states; }
  int arrays() const { return shape.bias ? 4 : 2; }
  int64_t width() const { return shape.D * shape.H; }
  int64_t length(int64_t b) const { return shape.lengths ? lengths[b] : shape.T; }

  explicit Problem(const Shape& s) : shape(s) {
    Random random(uint64_t(s.cell) * 1000 + uint64_t(s.T * 7 + s.B * 5 + s.I * 3 + s.H));
    const auto draw = [&](int64_t n, double scale) {
      std::vector<T> v(n);
      for (T& e : v) e = T(scale * random.normal());
      return v;
    };
    const Spec spec = s.spec();
    const double weight = 0.6 / sqrt(double(s.H));
    const int64_t rows = spec.info().gates * s.H;
    for (int64_t i = 0; i < spec.count(); ++i) {
      weights.push_back(draw(rows * spec.input_size(i / s.D), weight));
      weights.push_back(draw(rows * s.H, weight));
      if (s.bias) weights.push_back(draw(rows, weight)), weights.push_back(draw(rows, weight));
    }
    x = draw(s.T * s.B * s.I, 1), dy = draw(s.T * s.B * width(), 1);
    for (int i = 0; i < states(); ++i)
      state[i] = draw(spec.count() * s.B * s.H, 0.5), dstate[i] = draw(spec.count() * s.B * s.H, 1);
    if (!s.lengths) return;
    for (int64_t b = 0; b < s.B; ++b) {  // unsorted, with 0 and T among them
      lengths.push_back(b == 1 ? 0 : b == 2 ? s.T : int64_t(random.bits() % uint64_t(s.T + 1)));
      for (int64_t t = lengths[b]; t < s.T; ++t) {
        for (int64_t n = 0; n < s.I; ++n) x[(t * s.B + b) * s.I + n] = std::numeric_limits<T>::quiet_NaN();
        for (int64_t n = 0; n < width(); ++n) dy[(t * s.B + b) * width() + n] = std::numeric_limits<T>::quiet_NaN();
      }
    }
  }

  template <class U>
  explicit Problem(const Problem<U>& p) : shape(p.shape), lengths(p.lengths), seed(p.seed) {
    const auto cast = [](const std::vector<U>& v) { return std::vector<T>(v.begin(), v.end()); };
    for (const auto& w : p.weights) weights.push_back(cast(w));
    x = cast(p.x), dy = cast(p.dy);
    for (int i = 0; i < max_states; ++i) state[i] = cast(p.state[i]), dstate[i] = cast(p.dstate[i]);
  }

  // Everything that a pass reads, in a fixed order, with names for messages.
  std::vector<std::pair<std::string, std::vector<T>*>> inputs() {
    std::vector<std::pair<std::string, std::vector<T>*>> all{{"x", &x}};
    if (shape.state)
      for (int i = 0; i < states(); ++i) all.push_back({i == 0 ? "h0" : "c0", &state[i]});
    static const char* const names[] = {"w_ih", "w_hh", "b_ih", "b_hh"};
    for (size_t i = 0; i < weights.size(); ++i)
      all.push_back({names[i % arrays()] + std::string("[") + std::to_string(i / arrays()) + "]", &weights[i]});
    return all;
  }
};

// rows x width elements, each row followed by `gap` more and the whole fenced, all of which must stay as they are.
template <class T>
class Guarded {
 public:
  Guarded(int64_t rows, int64_t width, int64_t gap = 0) : rows_(rows), width_(width), stride_(width + gap) {
    data_.assign(fence + rows * stride_ + fence, guard());
  }
  T* data() { return data_.data() + fence; }
  int64_t stride() const { return stride_; }
  bool intact() const {
    bool ok = true;
    for (int64_t i = 0; i < int64_t(data_.size()); ++i) {
      const int64_t at = i - fence;
      const bool inside = at >= 0 && at < rows_ * stride_ && at % stride_ < width_;
      const T expected = guard();
      ok = ok && (inside || memcmp(&data_[i], &expected, sizeof(T)) == 0);
    }
    return ok;
  }
  std::vector<T> values() const {
    std::vector<T> v;
    for (int64_t r = 0; r < rows_; ++r)
      v.insert(v.end(), data_.begin() + fence + r * stride_, data_.begin() + fence + r * stride_ + width_);
    return v;
  }
  void fill(const std::vector<T>& v) {
    for (int64_t i = 0; i < int64_t(v.size()); ++i) data()[i / width_ * stride_ + i % width_] = v[i];
  }

 private:
  static constexpr int64_t fence = 24;
  static T guard() { return T(-8191.25); }
  int64_t rows_, width_, stride_;
  std::vector<T> data_;
};

// What a pass gives, in the order of the outputs of forward and of Problem::inputs() for backward.
template <class T>
using Arrays = std::vector<std::vector<T>>;

template <class T>
StackWeights<const T> weights_of(const Problem<T>& p) {
  StackWeights<const T> w;
  for (size_t i = 0; i < p.weights.size(); i += p.arrays())
    w.push_back({p.weights[i].data(), p.weights[i + 1].data(), p.shape.bias ? p.weights[i + 2].data() : nullptr,
                 p.shape.bias ? p.weights[i + 3].data() : nullptr});
  return w;
}

// Hides an empty vector's null pointer, which would mean "none": with B = 0 there are states, of no elements.
template <class T>
const T* data_of(const std::vector<T>& v) {
  static const T none{};
  return v.empty() ? &none : v.data();
}

// Calls into the core, apart from what the tests do around them: count_instructions.py counts in here alone. Weak: one
// that the linker may replace is neither inlined nor cloned under another name.
extern "C" __attribute__((weak)) void fusedrnn_counted(const std::function<void()>& work) { work(); }

// Runs work, and checks that it leaves every input as it was.
template <class T, class Work>
void keeping_inputs(const Problem<T>& p, Work work) {
  const auto same = [](const std::vector<T>& a, const std::vector<T>& b) {  // bit by bit, since padding is NaN
    return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
  };
  const Problem<T> before = p;
  fusedrnn_counted(work);
  bool ok = same(p.x, before.x) && same(p.dy, before.dy) && p.lengths == before.lengths;
  for (int i = 0; i < max_states; ++i) ok = ok && same(p.state[i], before.state[i]) && same(p.dstate[i], before.dstate[i]);
  for (size_t i = 0; i < p.weights.size(); ++i) ok = ok && same(p.weights[i], before.weights[i]);
  check(ok, p.shape.name() + ": inputs are not written");
}

template <class T>
std::unique_ptr<Tape<T>> make_tape(const Problem<T>& p) {
  const Shape& s = p.shape;
  return std::make_unique<Tape<T>>(s.spec(), s.T, s.B, s.lengths ? data_of(p.lengths) : nullptr, s.state, s.dropout, p.seed);
}

// y, h_n[, c_n]. A tape makes it a training pass; gap is the space between the rows of y.
template <class T>
Arrays<T> forward(const Problem<T>& p, Tape<T>* tape = nullptr, const Panels<T>* panels = nullptr, int64_t gap = 0) {
  const Shape& s = p.shape;
  const Spec spec = s.spec();
  Guarded<T> y(s.T * s.B, p.width(), gap);
  std::vector<Guarded<T>> states(p.states(), Guarded<T>(spec.count() * s.B, s.H));
  StackForward<T> call{};
  call.spec = spec, call.T_ = s.T, call.B = s.B;
  call.weights = weights_of(p);
  call.x = {data_of(p.x), ptrdiff_t(s.B * s.I), ptrdiff_t(s.I)};
  call.y = {y.data(), ptrdiff_t(s.B * y.stride()), ptrdiff_t(y.stride())};
  for (int i = 0; i < p.states(); ++i) {
    call.state[i] = s.state ? data_of(p.state[i]) : nullptr;
    call.final_state[i] = states[i].data();
  }
  call.lengths = s.lengths ? data_of(p.lengths) : nullptr;
  call.panels = panels;
  keeping_inputs(p, [&] { run_forward(call, tape); });
  bool intact = y.intact();
  Arrays<T> out{y.values()};
  for (const auto& a : states) intact = intact && a.intact(), out.push_back(a.values());
  check(intact, s.name() + ": forward stays within its outputs");
  return out;
}

// The gradients, of every input. `into`, where given, is added to.
template <class T>
Arrays<T> backward(Problem<T>& p, const Tape<T>& tape, const Arrays<T>* into = nullptr) {
  const Shape& s = p.shape;
  std::vector<Guarded<T>> out;
  for (const auto& [name, array] : p.inputs()) {
    const bool is_x = out.empty();
    out.emplace_back(is_x ? s.T * s.B : 1, is_x ? s.I : int64_t(array->size()));
    if (into) out.back().fill((*into)[out.size() - 1]);
  }
  StackBackward<T> call{};
  call.spec = s.spec();
  call.weights = weights_of(p);
  call.tape = &tape;
  call.x = {data_of(p.x), ptrdiff_t(s.B * s.I), ptrdiff_t(s.I)};
  call.dy = {data_of(p.dy), ptrdiff_t(s.B * p.width()), ptrdiff_t(p.width())};
  call.dx = {out[0].data(), ptrdiff_t(s.B * s.I), ptrdiff_t(s.I)};
  size_t n = 1;
  for (int i = 0; i < p.states(); ++i) {
    call.dfinal_state[i] = data_of(p.dstate[i]);
    if (s.state) call.dstate[i] = out[n++].data();
  }
  for (; n < out.size(); n += p.arrays())
    call.dweights.push_back(
        {out[n].data(), out[n + 1].data(), s.bias ? out[n + 2].data() : nullptr, s.bias ? out[n + 3].data() : nullptr});
  call.adds = into != nullptr;
  keeping_inputs(p, [&] { run_backward(call); });
  Arrays<T> values;
  bool intact = true;
  for (const auto& a : out) intact = intact && a.intact(), values.push_back(a.values());
  check(intact, s.name() + ": backward stays within its outputs");
  return values;
}

template <class T>
Arrays<T> train(Problem<T>& p) {
  auto tape = make_tape(p);
  Arrays<T> out = forward(p, tape.get()), grads = backward(p, *tape);
  out.insert(out.end(), grads.begin(), grads.end());
  return out;
}

template <class T>
bool same_bits(const Arrays<T>& a, const Arrays<T>& b) {
  bool same = a.size() == b.size();
  for (size_t i = 0; same && i < a.size(); ++i)
    same = a[i].size() == b[i].size() && (a[i].empty() || memcmp(a[i].data(), b[i].data(), a[i].size() * sizeof(T)) == 0);
  return same;
}

}  // namespace fusedrnn::tests
