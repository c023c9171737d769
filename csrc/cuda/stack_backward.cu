// The backward pass of a stack on a GPU: recurrences from the top layer down, large products, the check of the tape.
#include <optional>
#include <stdexcept>

#include "cuda/stack_work.h"
#include "cuda/tape.h"

namespace fusedrnn::cuda {
namespace {

// One backward pass of a stack: its workspace and what it launches.
template <class T>
class BackwardPass {
  using S = Accumulate<T>;

 public:
  explicit BackwardPass(const StackBackward& call)
      : call_(call), w_(call.spec, call.options, call.device, call.stream, call.tape->T_, call.tape->order, device_order_) {}

  void run() {
    begin_check();
    if (w_.B == 0 || w_.steps == 0) check();
    if (wants_weights_ && !call_.adds && w_.N == 0) clear_weights();
    if (w_.B == 0) return;
    allocate();
    for (int s = 0; s < cell_.states; ++s) {
      if (!call_.dstate[s]) continue;
      for (int64_t i = 0; i < spec_.count(); ++i)
        pass_states<T>(dstate_[s] + i * w_.B * w_.H, at<T>(call_.dfinal_state[s], i * w_.B * w_.H), w_.H, order_.active[0],
                       w_.packing(), call_.stream);
    }
    if (w_.steps > 0) layers();
    has_added_ = call_.adds;
    if (call_.dx.data && (!dx_packed_ || w_.steps == 0))
      scatter<T>(Work<T>::template strided<T>(call_.dx), dx_room_, spec_.I, spec_.I, call_.adds, w_.packing(), call_.stream);
    for (int s = 0; s < cell_.states; ++s) {
      const int64_t n = spec_.count() * w_.B * w_.H;
      if (!call_.dstate[s]) continue;
      if (call_.adds)
        add_to<T>(static_cast<T*>(call_.dstate[s]), dstate_[s], n, call_.stream);
      else
        FUSEDRNN_CUDA(
            cudaMemcpyAsync(call_.dstate[s], dstate_[s], size_t(n) * sizeof(T), cudaMemcpyDeviceToDevice, call_.stream));
    }
  }

  // Whether some of the gradients may have been added to the caller's already.
  bool has_added() const { return has_added_; }

 private:
  struct PerDirection {
    T *gates, *previous, *w_hh_t[max_phases];
    S *carry[max_states], *sums;
  };

  // Whether x or the parameters changed since forward is computed first, and the host waits for it while the recurrence
  // runs, which writes to nothing of the caller's.
  void begin_check() {
    unsigned long long* now;
    sums_.want(&now, {2});
    sums_.allocate(call_.device, call_.stream);
    w_.checksums(now, call_.x, call_.weights);
    found_.emplace(now, call_.stream);
    expected_.emplace(tape_.sums, call_.stream);
  }
  // Throws if they did. Nothing of the caller's is written before.
  void check() {
    if (!found_) return;
    const auto &found = found_->wait(), &expected = expected_->wait();
    if (found[0] != expected[0])
      throw std::runtime_error("x was changed after the forward pass, so its gradients would be wrong");
    if (found[1] != expected[1])
      throw std::runtime_error("the parameters were changed after the forward pass, so their gradients would be wrong");
    found_.reset(), expected_.reset();
  }

  void clear_weights() const {
    const int64_t rows = cell_.gates * w_.H;
    const auto clear = [&](void* p, int64_t n) {
      if (p) FUSEDRNN_CUDA(cudaMemsetAsync(p, 0, size_t(n) * sizeof(T), call_.stream));
    };
    for (int64_t i = 0; i < spec_.count(); ++i) {
      const Weights& g = call_.dweights[i];
      clear(g.w_ih, rows * spec_.input_size(i / spec_.D)), clear(g.w_hh, rows * w_.H), clear(g.b_ih, rows), clear(g.b_hh, rows);
    }
  }

  void allocate() {
    const int64_t B = w_.B, N = w_.N, H = w_.H;
    for (int d = 0; d < spec_.D; ++d) {
      PerDirection& own = own_[d];
      arena_.want(&own.gates, {N, cell_.slots, H});
      for (int p = 0; p < cell_.phases; ++p) arena_.want(&own.w_hh_t[p], {H, cell_.recurrent[p].count, H});
      for (int s = 0; s < cell_.states; ++s) arena_.want(&own.carry[s], {B, H});
      if (wants_weights_) arena_.want(&own.previous, {N, H});
      if (wants_weights_ && spec_.bias) arena_.want(&own.sums, {bias_gradients_rows(N), cell_.slots, H});
    }
    if (call_.dy.data && !w_.is_packed(call_.dy, w_.width)) arena_.want(&dy_room_, {N, w_.width});
    if (wants_weights_ && !w_.is_packed(call_.x, spec_.I)) arena_.want(&x_room_, {N, spec_.I});
    if (call_.dx.data && !dx_packed_) arena_.want(&dx_room_, {N, spec_.I});
    for (int n = 0; n < 2; ++n)
      if (spec_.L > n + 1) arena_.want(&between_[n], {N, w_.width});
    if (drops_ && wants_weights_) arena_.want(&masked_, {N, w_.width});
    for (int s = 0; s < cell_.states; ++s)
      if (call_.dstate[s]) arena_.want(&dstate_[s], {spec_.count(), B, H});
    arena_.allocate(call_.device, call_.stream);
  }

  void layers() {
    Fork fork(call_.device, call_.stream, spec_.D);
    const T* dy = w_.rows_of(call_.dy, w_.width, dy_room_);
    const T* bottom = wants_weights_ ? w_.rows_of(call_.x, spec_.I, x_room_) : nullptr;
    for (int64_t l = spec_.L - 1; l >= 0; --l) {
      const T* x = l == 0 ? bottom : static_cast<const T*>(tape_.y[l - 1]);
      if (l > 0 && drops_ && wants_weights_) {
        dropout<T>(x, masked_, w_.width, l, tape_.dropout, tape_.seed, w_.packing(), call_.stream);
        x = masked_;
      }
      fork.begin();
      BackwardArgs<T> args[2];
      for (int d = 0; d < spec_.D; ++d) args[d] = recur(l, d, dy, fork.of(d));
      check();
      has_added_ = call_.adds;
      for (int d = 0; d < spec_.D && wants_weights_; ++d)
        weight_gradients(args[d], call_.dweights[l * spec_.D + d], own_[d], x, spec_.input_size(l), fork.of(d));
      fork.join();
      if (l == 0 && !call_.dx.data) break;
      T* dx = l > 0 ? between_[(l - 1) % 2] : dx_packed_ ? static_cast<T*>(call_.dx.data) : dx_room_;
      for (int d = 0; d < spec_.D; ++d)
        w_.input_gradient(dx, own_[d].gates, static_cast<const T*>(call_.weights[l * spec_.D + d].w_ih), spec_.input_size(l),
                          d > 0 || (l == 0 && dx_packed_ && call_.adds));
      if (l > 0 && drops_) dropout<T>(dx, dx, w_.width, l, tape_.dropout, tape_.seed, w_.packing(), call_.stream);
      dy = dx;
    }
  }

  // One layer in one direction: the gradients of its slots, from dy (N, D*H) in packed rows.
  BackwardArgs<T> recur(int64_t l, int d, const T* dy, cudaStream_t on) const {
    const int64_t i = l * spec_.D + d, H = w_.H;
    const PerDirection& own = own_[d];
    BackwardArgs<T> a{};
    ForwardArgs<T>& f = a.forward;
    f.schedule = w_.schedule(spec_.backward_in_time(d));
    f.begin = 0, f.end = int(w_.steps);
    f.H = int(H);
    f.w_hh = static_cast<const T*>(call_.weights[i].w_hh);
    f.state[0] = at<T>(tape_.h0, i * w_.B * H);
    f.y = static_cast<T*>(tape_.y[l]) + d * H, f.y_row = w_.width;
    f.saved = static_cast<T*>(tape_.saved[i]), f.operand = static_cast<T*>(tape_.operand[i]);
    a.dy = dy ? dy + d * H : nullptr, a.dy_row = w_.width;
    for (int s = 0; s < cell_.states; ++s) {
      a.dfinal_state[s] = at<T>(call_.dfinal_state[s], i * w_.B * H);
      a.dstate[s] = dstate_[s] ? dstate_[s] + i * w_.B * H : nullptr;
      a.carry[s] = own.carry[s];
    }
    for (int p = 0; p < cell_.phases; ++p) {
      transpose_weights<T>(own.w_hh_t[p], f.w_hh, cell_, cell_.recurrent[p], H, on);
      a.w_hh_t[p] = own.w_hh_t[p];
    }
    a.gates = own.gates;
    w_.run_layer(a, true, on);
    return a;
  }

  void weight_gradients(const BackwardArgs<T>& a, const Weights& g, const PerDirection& own, const T* x, int64_t I,
                        cudaStream_t on) const {
    const int64_t H = w_.H;
    previous_states<T>(own.previous, a.forward, w_.T_, on);
    for (int p = 0; p < cell_.phases; ++p)
      w_.weight_gradient(static_cast<T*>(g.w_hh), cell_.recurrent[p], a.gates, p == 0 ? own.previous : a.forward.operand, H,
                         call_.adds, on);
    w_.weight_gradient(static_cast<T*>(g.w_ih), cell_.input, a.gates, x, I, call_.adds, on);
    if (spec_.bias)
      bias_gradients<T>(static_cast<T*>(g.b_ih), static_cast<T*>(g.b_hh), a.gates, own.sums, w_.N, cell_, H, call_.adds, on);
  }

  const StackBackward& call_;
  const Tape& tape_ = *call_.tape;
  const Spec& spec_ = call_.spec;
  const CellInfo& cell_ = spec_.info();
  const Order& order_ = tape_.order;
  const DeviceOrder device_order_{tape_.active, tape_.length, tape_.from, tape_.offset};
  const Work<T> w_;
  const bool drops_ = tape_.dropout > 0 && spec_.L > 1, wants_weights_ = !call_.dweights.empty();
  const bool dx_packed_ = w_.is_packed(call_.dx, spec_.I);
  bool has_added_ = false;

  Arena arena_, sums_;
  std::optional<Arriving> found_, expected_;  // checksums
  T *dy_room_ = nullptr, *x_room_ = nullptr, *dx_room_ = nullptr, *between_[2] = {}, *masked_ = nullptr;
  T* dstate_[max_states] = {};
  PerDirection own_[2] = {};
};

// The tape is freed in its own stream, and not before what reads it in another is done.
struct TapeUse {
  const Tape& tape;
  const Stream stream;
  TapeUse(const Tape& tape, Stream stream) : tape(tape), stream(stream) {
    if (stream != tape.stream) FUSEDRNN_CUDA(cudaStreamWaitEvent(stream, tape.ready, 0));
  }
  ~TapeUse() {
    cudaEvent_t done;
    if (stream == tape.stream || cudaEventCreateWithFlags(&done, cudaEventDisableTiming) != cudaSuccess) return;
    cudaEventRecord(done, stream);
    cudaStreamWaitEvent(tape.stream, done, 0);
    cudaEventDestroy(done);
  }
};

}  // namespace

void run_backward(const StackBackward& call) {
  const OnDevice here(call.device);
  expect_no_capture(call.stream);
  const Tape& tape = *call.tape;
  note_pass({"backward", call.spec.info().name, name_of(call.dtype), call.device, tape.T_, int64_t(tape.order.from.size()),
             call.spec.H, call.spec.L});
  const TapeUse use(tape, call.stream);
  with_type(call.dtype, [&](auto t) {
    BackwardPass<decltype(t)> pass(call);
    try {
      pass.run();
    } catch (const std::exception& error) {
      if (!pass.has_added()) throw;
      throw AddedInPart(error);
    }
  });
}

}  // namespace fusedrnn::cuda
