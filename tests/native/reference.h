// The equations in plain loops over double, one sequence and one element at a time. It shares nothing with the kernels
// but the order of parameters, and is what they are tested against.
#pragma once

#include "problem.h"

namespace fusedrnn::tests {

inline double reference_sigmoid(double x) { return 1 / (1 + exp(-x)); }

// w (rows, n) times v, plus b where given.
inline std::vector<double> affine(const std::vector<double>& w, const std::vector<double>* b, const double* v, int64_t rows,
                                  int64_t n) {
  std::vector<double> out(rows);
  for (int64_t r = 0; r < rows; ++r) {
    out[r] = b ? (*b)[r] : 0;
    for (int64_t k = 0; k < n; ++k) out[r] += w[r * n + k] * v[k];
  }
  return out;
}

// One step of one sequence: h and c become the next ones.
inline void reference_cell(const std::string& cell, const std::vector<double>* w, bool bias, const double* x, int64_t I,
                           int64_t H, double* h, double* c) {
  const int64_t rows = int64_t(w[0].size()) / I;
  const auto a = affine(w[0], bias ? &w[2] : nullptr, x, rows, I);
  auto b = affine(w[1], bias ? &w[3] : nullptr, h, rows, H);
  const auto gate = [&](int64_t k, int64_t u) { return reference_sigmoid(a[k * H + u] + b[k * H + u]); };
  if (cell == "gru_reset_before") {  // the candidate's product is of r h
    std::vector<double> rh(H);
    for (int64_t u = 0; u < H; ++u) rh[u] = gate(0, u) * h[u];
    const auto of_rh = affine(w[1], bias ? &w[3] : nullptr, rh.data(), rows, H);
    for (int64_t u = 0; u < H; ++u) b[2 * H + u] = of_rh[2 * H + u];
  }
  for (int64_t u = 0; u < H; ++u) {
    if (cell == "lstm") {
      c[u] = gate(1, u) * c[u] + gate(0, u) * std::tanh(a[2 * H + u] + b[2 * H + u]);
      h[u] = gate(3, u) * std::tanh(c[u]);
    } else if (cell == "rnn_tanh") {
      h[u] = std::tanh(a[u] + b[u]);
    } else if (cell == "rnn_relu") {
      h[u] = fmax(0, a[u] + b[u]);
    } else {
      const double r = cell == "gru" ? gate(0, u) : 1, z = gate(1, u);
      const double n = std::tanh(a[2 * H + u] + r * b[2 * H + u]);
      h[u] = z * h[u] + (1 - z) * n;
    }
  }
}

// Keep the element with probability 1 - p: the random word of its number is at least p of the way up.
inline double dropout_factor(double p, uint64_t seed, uint64_t element) {
  Random random(seed + (element - 1) * 0x9e3779b97f4a7c15u);
  return double(random.bits() >> 32) >= floor(p * 4294967296.0) ? 1 / (1 - p) : 0;
}

// y, h_n[, c_n].
inline Arrays<double> reference_forward(const Problem<double>& p, bool training) {
  const Shape& s = p.shape;
  const Spec spec = s.spec();
  const int64_t H = s.H, width = p.width(), states = spec.count() * s.B * H;
  std::vector<double> in = p.x, h(states), c(states);
  if (s.state) h = p.state[0];
  if (s.state && p.states() == 2) c = p.state[1];
  for (int64_t l = 0; l < s.L; ++l) {
    const int64_t I = spec.input_size(l);
    if (training && s.dropout > 0 && l > 0)
      for (size_t e = 0; e < in.size(); ++e) in[e] *= dropout_factor(s.dropout, p.seed, uint64_t(l) * in.size() + e);
    std::vector<double> out(s.T * s.B * width);
    for (int64_t d = 0; d < s.D; ++d)
      for (int64_t b = 0; b < s.B; ++b)
        for (int64_t k = 0; k < p.length(b); ++k) {
          const int64_t i = l * s.D + d, t = s.reverse || d == 1 ? p.length(b) - 1 - k : k;
          double* state = &h[(i * s.B + b) * H];
          reference_cell(cells[s.cell].name, &p.weights[i * p.arrays()], s.bias, &in[(t * s.B + b) * I], I, H, state,
                         &c[(i * s.B + b) * H]);
          for (int64_t u = 0; u < H; ++u) out[(t * s.B + b) * width + d * H + u] = state[u];
        }
    in = out;
  }
  Arrays<double> all{in, h};
  if (p.states() == 2) all.push_back(c);
  return all;
}

// The scalar whose gradients backward gives: dy . y + dh . h_n + dc . c_n, padding left out.
inline double reference_loss(const Problem<double>& p) {
  const Arrays<double> out = reference_forward(p, true);
  double loss = 0;
  for (size_t e = 0; e < out[0].size(); ++e)
    if (!isnan(p.dy[e])) loss += p.dy[e] * out[0][e];
  for (int i = 0; i < p.states(); ++i)
    for (size_t e = 0; e < out[1 + i].size(); ++e) loss += p.dstate[i][e] * out[1 + i][e];
  return loss;
}

// The loss's derivative by finite differences when `array`, one of p.inputs(), moves along `direction`.
inline double reference_slope(Problem<double>& p, std::vector<double>& array, const std::vector<double>& direction) {
  const double step = 1e-6;  // small, so that no corner of relu is crossed
  const std::vector<double> before = array;
  const auto at = [&](double distance) {
    for (size_t e = 0; e < array.size(); ++e) array[e] = before[e] + distance * step * direction[e];
    return reference_loss(p);
  };
  const double slope = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step);
  array = before;
  return slope;
}

}  // namespace fusedrnn::tests
