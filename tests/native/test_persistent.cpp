// The persistent kernels alone, in the emulator: values against reference.h, gradients against the CPU's in double
// (which test_core holds to finite differences), for every cell, type, exchange and size of group, sequences of unequal
// length, tails, and threads in shuffled order, in which nothing may change a bit.
#include <math.h>

#include <algorithm>
#include <numeric>

#include "cuda/device.cuh"
#include "cuda/persistent.h"
#include "cuda/projection.h"
#include "hopper.h"
#include "order.h"
#include "reference.h"
#include "within.h"

namespace fusedrnn::tests {
namespace {

using cuda::Exchange;
using cuda::PersistentPlan;

template <class T>
struct Type;
template <>
struct Type<float> {
  static constexpr const char* name = "float32";
  static constexpr double epsilon = 0x1p-23;
};
template <>
struct Type<__half> {
  static constexpr const char* name = "float16";
  static constexpr double epsilon = 0x1p-10;
};
template <>
struct Type<__nv_bfloat16> {
  static constexpr const char* name = "bfloat16";
  static constexpr double epsilon = 0x1p-7;
};

struct Case {
  Shape shape;
  Exchange exchange;
  int blocks, columns;
  bool tf32 = false;
  int projecting = 0;  // blocks of the launch that project its input
  std::string name() const {
    return shape.name() + (exchange == Exchange::cluster ? " cluster of " : " grid of ") + std::to_string(blocks) + " x " +
           std::to_string(columns) + (tf32 ? " tf32" : "") +
           (projecting > 0 ? " projecting by " + std::to_string(projecting) : "");
  }
};

// Numbers that T can hold.
template <class T>
void round(std::vector<double>& v) {
  for (double& e : v) e = cuda::widen(cuda::narrow<T>(cuda::Accumulate<T>(e)));
}
template <class T>
std::vector<T> narrow(const std::vector<double>& v) {
  std::vector<T> to(v.size());
  for (size_t i = 0; i < v.size(); ++i) to[i] = cuda::narrow<T>(cuda::Accumulate<T>(v[i]));
  return to;
}
template <class T>
std::vector<double> widen(const std::vector<T>& v) {
  std::vector<double> to(v.size());
  for (size_t i = 0; i < v.size(); ++i) to[i] = cuda::widen(v[i]);
  return to;
}

// One layer in one direction through the kernels, with the products that are not theirs in plain loops.
template <class T>
class Layer {
 public:
  static constexpr double unwritten = -8191.25;

  Layer(const Case& c, const Problem<double>& p) : c_(c), p_(p), info_(cells[c.shape.cell]), H_(c.shape.H) {
    const Shape& s = p.shape;
    std::vector<int> order(s.B);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return p.length(a) > p.length(b); });
    from_ = order;
    for (int j : order) length_.push_back(int(p.length(j)));
    steps_ = length_.empty() ? 0 : length_[0];
    offset_.push_back(0);
    for (int t = 0; t <= steps_; ++t) {
      active_.push_back(int(std::count_if(length_.begin(), length_.end(), [&](int n) { return n > t; })));
      if (t < steps_) offset_.push_back(offset_[t] + active_[t]);
    }
    schedule_ = {steps_, int(s.B), s.reverse, active_.data(), length_.data(), offset_.data(), from_.data(), !s.lengths};
    rows_ = offset_[steps_];
    w_hh_ = narrow<T>(p.weights[0 + 1]);
    // The input's product, without bias, and the biases as the slots take them.
    input_.resize(rows_ * info_.input.count * H_);
    for (int t = 0; t < steps_; ++t)
      for (int j = 0; j < active_[t]; ++j) {
        const double* x = &p.x[(int64_t(t) * s.B + from_[j]) * s.I];
        x_.insert(x_.end(), x, x + s.I);
        for (int i = 0; i < info_.input.count; ++i) {
          const std::vector<double> rows = affine(part(p.weights[0], gate(info_.input.first + i), s.I), nullptr, x, H_, s.I);
          for (int64_t u = 0; u < H_; ++u) input_[((offset_[t] + j) * H_ + u) * info_.input.count + i] = float(rows[u]);
        }
      }
    if (c.projecting > 0) std::fill(input_.begin(), input_.end(), NAN);
    packed_x_ = narrow<T>(x_), w_ih_ = narrow<T>(p.weights[0]);
    bias_.resize(info_.slots * H_);
    for (int i = 0; i < info_.slots && s.bias; ++i)
      for (int64_t u = 0; u < H_; ++u) {
        double sum = inside(info_.input, i) ? p.weights[2][gate(i) * H_ + u] : 0;
        for (int q = 0; q < info_.phases; ++q)
          if (inside(info_.recurrent[q], i)) sum += p.weights[3][gate(i) * H_ + u];
        bias_[i * H_ + u] = float(sum);
      }
    for (int i = 0; i < info_.states; ++i) state_[i] = narrow<T>(p.state[i]);
    y_row_ = H_ + 3;
    const T mark = cuda::narrow<T>(float(unwritten));
    y_.assign(rows_ * y_row_, mark);
    carry_.assign(s.B * H_, float(unwritten));
    operand_.assign(rows_ * H_, mark), saved_.assign(rows_ * info_.saved * H_, mark);
    for (int i = 0; i < info_.states; ++i) final_[i].assign(s.B * H_, mark);
  }

  cuda::ForwardArgs<T> forward_args(bool training) {
    cuda::ForwardArgs<T> a{};
    a.schedule = schedule_, a.H = int(H_), a.input = input_.data(), a.w_hh = w_hh_.data(), a.bias = bias_.data();
    for (int i = 0; i < info_.states; ++i)
      a.state[i] = p_.shape.state ? state_[i].data() : nullptr, a.final_state[i] = final_[i].data();
    a.y = y_.data(), a.y_row = y_row_;
    a.begin = 0, a.end = steps_, a.carry = carry_.data();
    a.saved = training ? saved_.data() : nullptr;
    a.operand = info_.phases > 1 ? operand_.data() : nullptr;
    done_.assign(cuda::projection_tiles(rows_), 0);
    a.projection = {c_.projecting, int(p_.shape.I), packed_x_.data(), w_ih_.data(), done_.data()};
    return a;
  }
  PersistentPlan plan(bool backward) const {
    return persistent_plan(info_, sizeof(T), backward, int(H_), p_.shape.B, c_.tf32, hopper, 1, c_.exchange, c_.blocks,
                           c_.columns);
  }

  // y (T, B, H) and the final states. False where there is no plan.
  Arrays<double> forward(bool training, int cut = 0) {
    const PersistentPlan how = plan(false);
    std::vector<unsigned char> workspace(how.workspace_bytes(steps_));
    cuda::ForwardArgs<T> a = forward_args(training);
    for (a.begin = 0; a.begin < steps_; a.begin = a.end) {
      a.end = a.begin < cut ? cut : steps_;
      std::fill(workspace.begin(), workspace.end(), cuda::workspace_fill);
      check(cuda::persistent_forward<T>(c_.shape.cell, how, a, workspace.data(), nullptr), c_.name() + ": is launched");
    }
    const Shape& s = p_.shape;
    Arrays<double> out{std::vector<double>(s.T * s.B * H_)};
    bool inside = true;
    for (int t = 0; t < steps_; ++t)
      for (int j = 0; j < active_[t]; ++j)
        for (int64_t u = 0; u < y_row_; ++u) {
          const double v = cuda::widen(y_[(offset_[t] + j) * y_row_ + u]);
          if (u < H_)
            out[0][(t * s.B + from_[j]) * H_ + u] = v;
          else
            inside = inside && v == cuda::widen(cuda::narrow<T>(float(unwritten)));
        }
    check(inside, c_.name() + ": y is written within its rows");
    for (int i = 0; i < info_.states; ++i) {
      out.push_back(widen(final_[i]));
      for (int64_t b = 0; b < s.B; ++b)  // not the kernel's
        if (p_.length(b) == 0)
          for (int64_t u = 0; u < H_; ++u) out.back()[b * H_ + u] = s.state ? p_.state[i][b * H_ + u] : 0;
    }
    return out;
  }

  void spoil(int64_t column) { w_hh_[column] = cuda::narrow<T>(NAN); }  // of the first gate's first unit

  // The gradients of p.inputs(), from those of the slots.
  Arrays<double> backward() {
    const PersistentPlan how = plan(true);
    std::vector<unsigned char> workspace(how.workspace_bytes(steps_));
    const Shape& s = p_.shape;
    const T mark = cuda::narrow<T>(float(unwritten));
    cuda::BackwardArgs<T> a{};
    a.forward = forward_args(true);
    a.dy_row = H_ + 5;
    std::vector<T> dy(rows_ * a.dy_row, mark), w_t[max_phases], dfinal[max_states], dstate[max_states];
    for (int t = 0; t < steps_; ++t)
      for (int j = 0; j < active_[t]; ++j)
        for (int64_t u = 0; u < H_; ++u)
          dy[(offset_[t] + j) * a.dy_row + u] = cuda::narrow<T>(float(p_.dy[(t * s.B + from_[j]) * H_ + u]));
    a.dy = dy.data();
    for (int q = 0; q < info_.phases; ++q) {
      const Span span = info_.recurrent[q];
      w_t[q].resize(H_ * span.count * H_);
      for (int i = 0; i < span.count; ++i)
        for (int64_t u = 0; u < H_; ++u)
          for (int64_t v = 0; v < H_; ++v)
            w_t[q][(v * span.count + i) * H_ + u] = w_hh_[(gate(span.first + i) * H_ + u) * H_ + v];
      a.w_hh_t[q] = w_t[q].data();
    }
    for (int i = 0; i < info_.states; ++i) {
      dfinal[i] = narrow<T>(p_.dstate[i]), dstate[i].assign(s.B * H_, mark);
      a.dfinal_state[i] = dfinal[i].data(), a.dstate[i] = s.state ? dstate[i].data() : nullptr;
    }
    gates_.assign(rows_ * info_.slots * H_, mark);
    a.gates = gates_.data();
    std::fill(workspace.begin(), workspace.end(), cuda::workspace_fill);
    check(cuda::persistent_backward<T>(c_.shape.cell, how, a, workspace.data(), nullptr), c_.name() + ": is launched");
    return gradients(dstate);
  }

 private:
  int gate(int slot) const { return info_.slot_gate[slot]; }
  static bool inside(Span span, int i) { return i >= span.first && i < span.first + span.count; }
  std::vector<double> part(const std::vector<double>& w, int g, int64_t n) const {
    return std::vector<double>(w.begin() + g * H_ * n, w.begin() + (g + 1) * H_ * n);
  }

  Arrays<double> gradients(const std::vector<T> (&dstate)[max_states]) const {
    const Shape& s = p_.shape;
    const int64_t I = s.I;
    std::vector<double> dx(s.T * s.B * I), w_ih(p_.weights[0].size()), w_hh(p_.weights[1].size()), b_ih(info_.gates * H_),
        b_hh(b_ih);
    for (int step = 0; step < steps_; ++step)
      for (int j = 0; j < active_[step]; ++j) {
        const int64_t row = schedule_.row(step, j), b = from_[j], t = s.reverse ? length_[j] - 1 - step : step;
        for (int i = 0; i < info_.slots; ++i)
          for (int64_t u = 0; u < H_; ++u) {
            const double d = cuda::widen(gates_[(row * info_.slots + i) * H_ + u]);
            const int64_t to = gate(i) * H_ + u;
            if (inside(info_.input, i)) {
              b_ih[to] += d;
              for (int64_t n = 0; n < I; ++n) {
                w_ih[to * I + n] += d * p_.x[(t * s.B + b) * I + n];
                dx[(t * s.B + b) * I + n] += d * p_.weights[0][to * I + n];
              }
            }
            for (int q = 0; q < info_.phases; ++q)
              if (inside(info_.recurrent[q], i)) {
                b_hh[to] += d;
                for (int64_t n = 0; n < H_; ++n) {
                  double h = s.state ? p_.state[0][b * H_ + n] : 0;
                  if (q > 0)
                    h = cuda::widen(operand_[row * H_ + n]);
                  else if (step > 0)
                    h = cuda::widen(y_[schedule_.row(step - 1, j) * y_row_ + n]);
                  w_hh[to * H_ + n] += d * h;
                }
              }
          }
      }
    Arrays<double> all{dx};
    for (int i = 0; i < info_.states && s.state; ++i) {
      all.push_back(widen(dstate[i]));
      for (int64_t b = 0; b < s.B; ++b)
        if (p_.length(b) == 0)
          for (int64_t u = 0; u < H_; ++u) all.back()[b * H_ + u] = p_.dstate[i][b * H_ + u];
    }
    all.push_back(w_ih), all.push_back(w_hh);
    if (s.bias) all.push_back(b_ih), all.push_back(b_hh);
    return all;
  }

  const Case c_;
  const Problem<double>& p_;
  const CellInfo& info_;
  const int64_t H_;
  std::vector<int> from_, length_, active_;
  std::vector<int64_t> offset_;
  int steps_;
  cuda::Schedule schedule_;
  int64_t rows_, y_row_;
  std::vector<float> input_, bias_, carry_;
  std::vector<double> x_;  // packed
  std::vector<unsigned> done_;
  std::vector<T> packed_x_, w_ih_, w_hh_, state_[max_states], final_[max_states], y_, operand_, saved_, gates_;
};

bool once = false;  // each case, where races are looked for: these show in whatever order threads run, and it takes long

template <class T>
void check_case(const Case& c) {
  const std::string name = c.name() + " " + Type<T>::name;
  Problem<double> p(c.shape);
  for (auto& w : p.weights) round<T>(w);
  for (int i = 0; i < max_states; ++i) round<T>(p.state[i]), round<T>(p.dstate[i]);
  round<T>(p.dy);
  if (c.projecting > 0) round<T>(p.x);
  emulated::set_seed(0);
  Layer<T> layer(c, p);
  const PersistentPlan plan = layer.plan(false);
  if (!check(!plan.reason && !layer.plan(true).reason, name + ": there is a plan")) return;
  const double epsilon = c.tf32 ? 0x1p-10 : Type<T>::epsilon, terms = double(c.shape.H * c.shape.T);
  const Arrays<double> want = reference_forward(p, false), got = layer.forward(true);
  for (size_t i = 0; i < want.size(); ++i)
    close(got[i], want[i], rounding(epsilon, terms, false), name + ": forward output " + std::to_string(i));
  if (!once) check(same_bits(got, Layer<T>(c, p).forward(false)), name + ": training changes no bit");
  if (!once && c.projecting == 0)
    check(same_bits(got, Layer<T>(c, p).forward(true, 2)), name + ": pieces of time change no bit");
  const auto tape = make_tape(p);
  tests::forward(p, tape.get());
  const Arrays<double> exact = tests::backward(p, *tape), grads = layer.backward();
  const auto inputs = p.inputs();
  check(exact.size() == grads.size(), name + ": a gradient for every input");
  for (size_t i = 0; i < exact.size() && i < grads.size(); ++i)
    close(grads[i], exact[i], rounding(epsilon, terms, true), name + ": gradient of " + inputs[i].first);
  for (uint64_t seed = 1; seed <= 2 && !once; ++seed) {
    emulated::set_seed(seed * 7919);
    Layer<T> again(c, p);
    check(same_bits(again.forward(true), got) && same_bits(again.backward(), grads),
          name + ": the order of threads changes no bit");
  }
  emulated::set_seed(0);
}

void check_kernels() {
  for (int cell = 0; cell < cell_count; ++cell)
    for (const Exchange exchange : {Exchange::cluster, Exchange::grid}) {
      // Tails: H not a multiple of 8, groups with a block of padding, slices not full, lengths with 0 among them.
      Case c{{cell, 5, 3, 4, 37}, exchange, 2, 8};
      c.shape.lengths = true;
      check_case<float>(c);
      check_case<__half>(c);
      check_case<__nv_bfloat16>(c);
      c.shape = {cell, 3, 11, 3, 24}, c.blocks = 3 - (exchange == Exchange::cluster), c.shape.reverse = true;
      check_case<__nv_bfloat16>(c);
      c.columns = 16, c.shape.lengths = true;
      check_case<float>(c);
      c.tf32 = true, c.shape.state = false, c.shape.bias = false;
      check_case<float>(c);
    }
}

void check_groups() {
  for (const int blocks : {2, 4, 8, 16}) {
    check_case<__nv_bfloat16>({{0, 3, 2, 3, int64_t(blocks) * 8}, Exchange::cluster, blocks, 8});
    check_case<__half>({{2, 3, 2, 3, int64_t(blocks) * 8 - 3}, Exchange::grid, blocks, 8});
  }
  // More chunks of k than the registers hold: the rest is in shared memory. Blocks of nothing but padding.
  check_case<float>({{0, 3, 2, 3, 248}, Exchange::cluster, 8, 8});
  for (const int cell : {1, 2}) check_case<float>({{cell, 2, 2, 3, 128}, Exchange::cluster, 2, 8});
  check_case<__nv_bfloat16>({{1, 2, 2, 3, 600}, Exchange::cluster, 16, 8});
  check_case<__half>({{2, 2, 2, 3, 520}, Exchange::cluster, 16, 8});
  check_case<__nv_bfloat16>({{1, 2, 2, 3, 181}, Exchange::cluster, 2, 4});  // rows that are not aligned
  check_case<__half>({{2, 2, 2, 3, 181}, Exchange::cluster, 2, 4});
  check_case<float>({{0, 2, 2, 3, 97}, Exchange::grid, 2, 4});
  check_case<float>({{0, 2, 2, 3, 96}, Exchange::cluster, 2, 4, true});
  check_case<float>({{0, 2, 2, 3, 97}, Exchange::cluster, 2, 4, true});
  check_case<__nv_bfloat16>({{0, 2, 40, 3, 32}, Exchange::grid, 2, 24});
  // Slices narrower than the products.
  for (const Exchange exchange : {Exchange::cluster, Exchange::grid}) {
    check_case<float>({{0, 3, 5, 3, 40}, exchange, 2, 1});
    check_case<float>({{1, 3, 5, 3, 40}, exchange, 2, 3});
    check_case<__half>({{1, 3, 5, 3, 72}, exchange, 2, 3});
    check_case<__nv_bfloat16>({{0, 3, 7, 3, 128}, exchange, 4, 4});
    check_case<__nv_bfloat16>({{2, 4, 6, 3, 64}, exchange, 2, 4});
    check_case<float>({{0, 3, 4, 3, 40}, exchange, 2, 4, true});
    check_case<__nv_bfloat16>({{1, 3, 4, 3, 136}, exchange, 2, 4});  // two pairs a thread
    check_case<__nv_bfloat16>({{1, 1, 4, 3, 40}, exchange, 2, 4});
    check_case<__half>({{0, 1, 9, 3, 24}, exchange, 2, 8});
    check_case<__half>({{2, 3, 5, 3, 40}, exchange, 2, 1});
    check_case<float>({{3, 3, 13, 3, 32}, exchange, 2, 11, true});
  }
}

// A few blocks project the input while the others run: these wait for each tile of rows, units in two parts, k in several chunks;
// where it is wide, for each step.
void check_projecting() {
  for (const Exchange exchange : {Exchange::cluster, Exchange::grid}) {
    for (int cell = 0; cell < cell_count; ++cell)
      check_case<__nv_bfloat16>({{cell, 11, 16, 136, 40, 1, 1, true, cell % 2 == 1}, exchange, 2, 4, false, 2});
    check_case<__half>({{0, 3, 5, 40, 16}, exchange, 2, 4, false, 2});
  }
  check_case<__nv_bfloat16>({{3, 9, 64, 512, 16}, Exchange::grid, 2, 16, false, 2});
}

// What is not a number stays with its sequence, whatever a block's padding held before: forward from x, backward from dy.
template <class T>
void check_foreign_values(const Case& c) {
  const int64_t ill = 2, B = c.shape.B;
  const auto stays = [&](const std::vector<double>& v, int64_t width, const char* what) {
    bool finite = true, found = false;
    for (size_t i = 0; i < v.size(); ++i)
      if (int64_t(i) / width % B == ill)
        found = found || isnan(v[i]);
      else
        finite = finite && isfinite(v[i]);
    check(found && finite, c.name() + " " + Type<T>::name + ": NaN stays with its sequence, " + what);
  };
  Problem<double> p(c.shape);
  for (int64_t t = 0; t < c.shape.T; ++t)
    for (int64_t u = 0; u < c.shape.H; ++u) p.dy[(t * B + ill) * c.shape.H + u] = NAN;
  Layer<T> layer(c, p);
  layer.forward(true);
  stays(layer.backward()[0], c.shape.I, "backward");
  for (int64_t u = 0; u < c.shape.I; ++u) p.x[ill * c.shape.I + u] = NAN;
  stays(Layer<T>(c, p).forward(false)[0], c.shape.H, "forward");
}
void check_foreign_values() {
  for (int cell = 0; cell < cell_count; ++cell)
    for (const Exchange exchange : {Exchange::cluster, Exchange::grid}) {
      const Shape shape{cell, 4, 8, 3, 12};
      check_foreign_values<float>({shape, exchange, 2, 8});
      check_foreign_values<float>({shape, exchange, 2, 4, true});
      for (const int columns : {1, 4, 8}) check_foreign_values<__nv_bfloat16>({shape, exchange, 2, columns});
    }
}

// A weight that is not a number spoils what is multiplied by it, whatever is loaded in place of weights that are not there.
template <class T>
void check_foreign_weights(const Case& c) {
  const int64_t H = c.shape.H;
  const auto only = [&](const std::vector<double>& v, int64_t ill, const char* what) {
    bool right = true;
    for (size_t i = 0; i < v.size(); ++i) right = right && isfinite(v[i]) == (int64_t(i) % H != ill);
    check(right, c.name() + " " + Type<T>::name + ": NaN from a weight of unit " + std::to_string(ill) + ", " + what);
  };
  const Problem<double> clean(c.shape);
  const bool before = cells[c.shape.cell].phases > 1;  // its first gates feed all units
  for (const int64_t ill : {int64_t(0), int64_t(1), H - 1}) {
    Problem<double> p = clean;
    p.weights[1][((before ? cells[c.shape.cell].gates - 1 : 0) * H + ill) * H] = NAN;
    only(Layer<T>(c, p).forward(false)[0], ill, "forward");
    Layer<T> layer(c, clean);
    layer.forward(true);
    layer.spoil(ill);
    only(layer.backward()[1], ill, "backward");
    p = clean;  // an infinite one saturates its gate, and is not read again where its row has ended
    for (int64_t v = 0; v < H; ++v) p.weights[1][ill * H + v] = v * 4 < H * 3 ? 0 : INFINITY;
    for (double& h : p.state[0]) h = fabs(h) + 1;
    const auto y = Layer<T>(c, p).forward(false)[0];
    check(std::none_of(y.begin(), y.end(), [](double v) { return isnan(v); }), c.name() + ": infinite weights saturate");
  }
}
void check_foreign_weights() {
  for (int cell = 0; cell < cell_count; ++cell)
    for (const int64_t H : {12, 40, 72}) {
      check_foreign_weights<float>({{cell, 1, 3, 3, H}, Exchange::cluster, 2, 1});
      check_foreign_weights<float>({{cell, 1, 3, 3, H}, Exchange::grid, 2, 8, true});
      check_foreign_weights<__nv_bfloat16>({{cell, 1, 3, 3, H}, Exchange::cluster, 2, 4});
    }
}

}  // namespace
}  // namespace fusedrnn::tests

int main(int argc, char**) {
  using namespace fusedrnn::tests;
  once = argc > 1;
  check_kernels();
  check_projecting();
  if (!once) check_groups(), check_foreign_values(), check_foreign_weights();
  printf("%d passed, %d failed\n", passed.load(), failed.load());
  return failed != 0;
}
