// A stack on the GPU as the tests call it: its arrays there, a forward pass, the gradients of every input.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda/check.h"
#include "cuda/device.cuh"
#include "cuda/memory.h"
#include "cuda/stack.h"
#include "problem.h"

namespace fusedrnn::tests {

// An array on the device.
template <class T>
class OnCard {
 public:
  explicit OnCard(const std::vector<double>& v) : n_(v.size()) {
    std::vector<T> narrow(n_);
    for (size_t i = 0; i < n_; ++i) narrow[i] = cuda::narrow<T>(cuda::Accumulate<T>(v[i]));
    allocate();
    const cuda::OnDevice here(0);  // while a stream is captured, too
    FUSEDRNN_CUDA(cudaMemcpy(data_, narrow.data(), n_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  explicit OnCard(size_t n) : n_(n) { allocate(); }
  OnCard(OnCard&& other) noexcept : n_(other.n_), data_(other.data_) { other.data_ = nullptr; }
  ~OnCard() {
    try {
      const cuda::OnDevice here(0);
      cudaFree(data_);
    } catch (const cuda::Error&) {  // of a device that has failed
    }
  }
  T* data() const { return data_; }
  std::vector<double> values() const {
    const cuda::OnDevice here(0);
    std::vector<T> narrow(n_);
    FUSEDRNN_CUDA(cudaMemcpy(narrow.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost));
    std::vector<double> wide(n_);
    for (size_t i = 0; i < n_; ++i) wide[i] = double(cuda::widen(narrow[i]));
    return wide;
  }

 private:
  void allocate() {
    const cuda::OnDevice here(0);
    FUSEDRNN_CUDA(cudaMalloc(&data_, std::max<size_t>(n_, 1) * sizeof(T)));
  }
  size_t n_;
  T* data_ = nullptr;
};

// A (T, B, width) array that lies as (B, T, width + gap) where `apart`: strides that need a copy.
template <class T>
struct Placed {
  OnCard<T> memory;
  int64_t T_, B, width, gap;
  bool apart;
  static constexpr double filler = -1.5;
  int64_t place(int64_t t, int64_t b, int64_t c) const {
    return apart ? (b * T_ + t) * (width + gap) + c : (t * B + b) * width + c;
  }
  static std::vector<double> arrange(const std::vector<double>* v, int64_t T_, int64_t B, int64_t width, bool apart) {
    if (!apart && v) return *v;
    const int64_t gap = apart ? 3 : 0;
    std::vector<double> out(T_ * B * (width + gap), filler);
    for (int64_t t = 0; t < T_ && v; ++t)
      for (int64_t b = 0; b < B; ++b)
        for (int64_t c = 0; c < width; ++c) out[(b * T_ + t) * (width + gap) + c] = (*v)[(t * B + b) * width + c];
    return out;
  }
  Placed(const std::vector<double>* v, int64_t T_, int64_t B, int64_t width, bool apart)
      : memory(arrange(v, T_, B, width, apart)), T_(T_), B(B), width(width), gap(apart ? 3 : 0), apart(apart) {}
  cuda::Sequence sequence() const {
    if (!apart) return {memory.data(), B * width, width, 1};
    return {memory.data(), width + gap, T_ * (width + gap), 1};
  }
  std::vector<double> values(bool* intact) const {
    const std::vector<double> all = memory.values();
    std::vector<double> out(T_ * B * width);
    for (int64_t t = 0; t < T_; ++t)
      for (int64_t b = 0; b < B; ++b)
        for (int64_t c = 0; c < width; ++c) out[(t * B + b) * width + c] = all[place(t, b, c)];
    for (int64_t r = 0; apart && r < T_ * B; ++r)
      for (int64_t c = width; c < width + gap; ++c) *intact = *intact && all[r * (width + gap) + c] == filler;
    return out;
  }
};

template <class T>
struct Session {
  const Problem<double>& p;
  const Shape& s;
  bool apart;
  std::vector<std::pair<std::string, OnCard<T>>> arrays;  // in the order of Problem::inputs(), x aside
  Placed<T> x, dy;
  std::vector<OnCard<T>> dfinal;
  std::shared_ptr<cuda::Tape> tape;
  cuda::Stream stream = nullptr;
  const bool tf32;
  bool intact = true;

  Session(Problem<double>& p, bool apart, bool tf32 = false)
      : p(p), s(p.shape), apart(apart), x(&p.x, s.T, s.B, s.I, apart), dy(&p.dy, s.T, s.B, p.width(), apart), tf32(tf32) {
    for (auto& [name, array] : p.inputs())
      if (name != "x") arrays.emplace_back(name, OnCard<T>(*array));
    for (int i = 0; i < p.states(); ++i) dfinal.emplace_back(p.dstate[i]);
  }
  int states() const { return s.state ? p.states() : 0; }
  std::vector<cuda::Weights> weights() const {
    std::vector<cuda::Weights> w;
    for (size_t n = states(); n < arrays.size(); n += p.arrays())
      w.push_back({arrays[n].second.data(), arrays[n + 1].second.data(), s.bias ? arrays[n + 2].second.data() : nullptr,
                   s.bias ? arrays[n + 3].second.data() : nullptr});
    return w;
  }
  Arrays<double> forward(bool training) {
    const Spec spec = s.spec();
    cuda::StackForward call{};
    call.spec = spec, call.dtype = cuda::dtype_of<T>, call.stream = stream, call.T_ = s.T, call.B = s.B;
    call.weights = weights();
    const bool frozen = !training && !apart;
    OnCard<T> panels(frozen ? size_t(cuda::panel_bytes(spec, call.dtype)) / sizeof(T) : 0);
    if (frozen) {
      cuda::pack(spec, call.dtype, call.device, stream, call.weights, panels.data());
      call.panels = panels.data();
    }
    call.x = x.sequence();
    Placed<T> y(nullptr, s.T, s.B, p.width(), apart);
    call.y = y.sequence();
    std::vector<OnCard<T>> states;
    for (int i = 0; i < p.states(); ++i) {
      states.emplace_back(size_t(spec.count() * s.B * s.H));
      call.final_state[i] = states.back().data();
      call.state[i] = s.state ? arrays[i].second.data() : nullptr;
    }
    call.lengths = s.lengths ? data_of(p.lengths) : nullptr;
    call.options.tf32 = tf32;
    call.dropout = s.dropout, call.seed = p.seed;
    auto made = cuda::run_forward(call, training);
    FUSEDRNN_CUDA(cudaStreamSynchronize(stream));
    check(training == bool(made), s.name() + ": only training leaves a tape");
    if (training) tape = made;
    Arrays<double> out{y.values(&intact)};
    for (auto& state : states) out.push_back(state.values());
    return out;
  }
  // The gradients of every input; added to `into` where given.
  Arrays<double> backward(const Arrays<double>* into = nullptr) {
    cuda::StackBackward call{};
    call.spec = s.spec(), call.dtype = cuda::dtype_of<T>, call.stream = stream;
    call.weights = weights();
    call.tape = tape.get();
    call.options.tf32 = tf32;
    call.x = x.sequence(), call.dy = dy.sequence();
    Placed<T> dx(into ? &(*into)[0] : nullptr, s.T, s.B, s.I, apart);
    call.dx = dx.sequence();
    std::vector<OnCard<T>> out;
    for (size_t n = 0; n < arrays.size(); ++n)
      if (into)
        out.emplace_back((*into)[n + 1]);
      else
        out.emplace_back(arrays[n].second.values().size());
    for (int i = 0; i < p.states(); ++i) {
      call.dfinal_state[i] = dfinal[i].data();
      if (s.state) call.dstate[i] = out[i].data();
    }
    for (size_t n = states(); n < out.size(); n += p.arrays())
      call.dweights.push_back(
          {out[n].data(), out[n + 1].data(), s.bias ? out[n + 2].data() : nullptr, s.bias ? out[n + 3].data() : nullptr});
    call.adds = into != nullptr;
    cuda::run_backward(call);
    FUSEDRNN_CUDA(cudaStreamSynchronize(stream));
    Arrays<double> values{dx.values(&intact)};
    for (auto& a : out) values.push_back(a.values());
    return values;
  }
};

// The problem as T holds it.
template <class T>
Problem<double> rounded(const Shape& shape) {
  Problem<double> p(shape);
  for (auto& [name, array] : p.inputs())
    for (double& e : *array) e = double(cuda::widen(cuda::narrow<T>(cuda::Accumulate<T>(e))));
  for (double& e : p.dy) e = double(cuda::widen(cuda::narrow<T>(cuda::Accumulate<T>(e))));
  for (int i = 0; i < p.states(); ++i)
    for (double& e : p.dstate[i]) e = double(cuda::widen(cuda::narrow<T>(cuda::Accumulate<T>(e))));
  return p;
}

}  // namespace fusedrnn::tests
