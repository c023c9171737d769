// The forward pass of a stack on a GPU: inputs projected, recurrences from the bottom layer up.
#include <algorithm>

#include "cuda/panels.h"
#include "cuda/projection.h"
#include "cuda/stack_work.h"
#include "cuda/tape.h"

namespace fusedrnn::cuda {
namespace {

// One forward pass of a stack: its workspace and what it launches.
template <class T>
class ForwardPass {
  using S = Accumulate<T>;

 public:
  ForwardPass(const StackForward& call, Tape* tape)
      : call_(call), tape_(tape), own_order_(tape ? nullptr : new Order(call.T_, call.B, call.lengths)),
        w_(call.spec, call.options, call.device, call.stream, call.T_, order_, device_order_), y_(call.spec.L),
        saved_(call.spec.count()), operand_(call.spec.count()) {
    if (call_.panels) panels_ = Panels<T>(spec_, call_.panels).of;
    allocate();
  }

  void run() {
    device_order_.fill(order_, w_.packed, call_.T_, done_, counts_, call_.stream);
    if (tape_) fill_tape();
    if (w_.B == 0) return;
    for (int64_t i = 0; i < spec_.count(); ++i)  // those of sequences that never run
      for (int s = 0; s < cell_.states; ++s)
        pass_states<T>(at<T>(call_.final_state[s], i * w_.B * w_.H), at<T>(call_.state[s], i * w_.B * w_.H), w_.H,
                       order_.active[0], w_.packing(), call_.stream);
    if (w_.steps > 0) layers();
    if (tape_ || !direct_)
      scatter<T>(Work<T>::template strided<T>(call_.y), y_[spec_.L - 1], w_.width, w_.width, false, w_.packing(), call_.stream);
  }

 private:
  void allocate() {
    const int64_t B = w_.B, N = w_.N, H = w_.H, L = spec_.L;
    Arena& kept = tape_ ? tape_->arena : arena_;
    device_order_.want(kept, order_);
    if (tape_) {
      for (int64_t i = 0; i < spec_.count(); ++i) {
        kept.want(&saved_[i], {N, H, cell_.saved});
        if (cell_.phases > 1) kept.want(&operand_[i], {N, H});
      }
      for (T*& l : y_) kept.want(&l, {N, w_.width});
      if (call_.state[0]) kept.want(&h0_, {spec_.count(), B, H});
      kept.want(&tape_->sums, {2});
    } else {
      for (int n = 0; n < 2; ++n)  // layers in turns, the last one's where it cannot go to its place
        if (L - direct_ > n) arena_.want(&between_[n], {N, w_.width});
    }
    for (int d = 0; d < spec_.D; ++d) {
      // In packed order the rows of a range of steps lie side by side, unless they end at different times and go
      // backward.
      PerDirection& own = own_[d];
      own.chunk =
          spec_.backward_in_time(d) && !w_.packed ? w_.steps : chunk_steps(w_.steps, B * cell_.input.count * H * sizeof(S));
      arena_.want(&own.input, {std::min(N, own.chunk * B), H, cell_.input.count});
      if (panels_.empty()) {
        if (cell_.input.count > 1)
          arena_.want(&own.panel.w_ih, {H, cell_.input.count, std::max(spec_.I, spec_.input_size(L - 1))});
        arena_.want(&own.panel.bias, {cell_.slots, H});
      }
      if (cell_.states > 1) arena_.want(&own.carry, {B, H});
      if (cell_.phases > 1) arena_.want(&own.slots, {B, cell_.slots, H});
      if (cell_.phases > 1 && !tape_) arena_.want(&own.operand, {B, H});
    }
    if (!w_.is_packed(call_.x, spec_.I)) arena_.want(&x_room_, {N, spec_.I});
    if (drops_) arena_.want(&masked_, {N, w_.width});
    if (counts_ > 0) arena_.want(&done_, {counts_});
    if (tape_) kept.allocate(call_.device, call_.stream);
    arena_.allocate(call_.device, call_.stream);
  }

  void fill_tape() {
    tape_->active = device_order_.active, tape_->length = device_order_.length, tape_->from = device_order_.from;
    tape_->offset = device_order_.offset, tape_->h0 = h0_;
    std::copy(y_.begin(), y_.end(), tape_->y.begin());
    std::copy(saved_.begin(), saved_.end(), tape_->saved.begin());
    std::copy(operand_.begin(), operand_.end(), tape_->operand.begin());
    if (h0_)
      FUSEDRNN_CUDA(cudaMemcpyAsync(h0_, call_.state[0], spec_.count() * w_.B * w_.H * sizeof(T), cudaMemcpyDeviceToDevice,
                                    call_.stream));
    w_.checksums(tape_->sums, call_.x, call_.weights);
  }

  void layers() {
    Fork fork(call_.device, call_.stream, spec_.D);
    const T* x = w_.rows_of(call_.x, spec_.I, x_room_);
    for (int64_t l = 0; l < spec_.L; ++l) {
      const bool top = l == spec_.L - 1;
      if (!tape_) y_[l] = top && direct_ ? static_cast<T*>(call_.y.data) : between_[l % 2];
      fork.begin();
      for (int d = 0; d < spec_.D; ++d) direction(l, d, x, fork.of(d));
      fork.join();
      x = y_[l];
      if (!top && drops_) {
        dropout<T>(y_[l], masked_, w_.width, l + 1, call_.dropout, call_.seed, w_.packing(), call_.stream);
        x = masked_;
      }
    }
  }

  // One layer in one direction, from packed rows x (N, I).
  void direction(int64_t l, int d, const T* x, cudaStream_t on, bool may_project_within = true) {
    const int64_t i = l * spec_.D + d, I = spec_.input_size(l), H = w_.H, steps = w_.steps;
    const Weights& weights = call_.weights[i];
    const PerDirection& own = own_[d];
    const bool aligned = (uintptr_t(x) | uintptr_t(weights.w_ih)) % 16 == 0;
    const InputPlan input = own.chunk == steps ? w_.plan_input(I, may_project_within && aligned) : InputPlan{};
    w_.trace(input, I);
    Panel<T> panel = panels_.empty() ? own.panel : panels_[i];
    if (input.when == Projected::within) panel.w_ih = nullptr;  // of no use there
    if (panels_.empty()) pack(panel, cell_, weights, H, I, on);
    ForwardArgs<T> a{};
    a.schedule = w_.schedule(spec_.backward_in_time(d));
    a.H = int(H);
    a.bias = panel.bias, a.carry = own.carry, a.slots = own.slots;
    a.w_hh = static_cast<const T*>(weights.w_hh);
    for (int s = 0; s < cell_.states; ++s) {
      a.state[s] = at<T>(call_.state[s], i * w_.B * H);
      a.final_state[s] = at<T>(call_.final_state[s], i * w_.B * H);
    }
    a.y = y_[l] + d * H, a.y_row = w_.width;
    a.saved = tape_ ? saved_[i] : nullptr;
    a.operand = tape_ ? operand_[i] : own.operand;
    const T* const w_ih = panel.w_ih ? panel.w_ih : static_cast<const T*>(weights.w_ih);
    if (input.when == Projected::within) {
      a.begin = 0, a.end = int(steps), a.input = own.input;
      a.projection = {input.blocks, int(I), x, w_ih, done_ + i * projection_tiles(w_.N)};
      if (!w_.run_projecting(input.layer, a, on)) direction(l, d, x, on, false);
      return;
    }
    const int64_t width = cell_.input.count * H;
    // Projects the input of steps [begin, end) to where it belongs when own.input has row `base` first.
    const auto project = [&](int64_t begin, int64_t end, int64_t base, cudaStream_t stream) {
      const Rows rows = rows_of_steps(a.schedule, begin, end);
      w_.project_input(own.input + (rows.first - base) * width, x + rows.first * I, rows.count, w_ih, I, stream);
      a.input = own.input - base * width;  // it is indexed by the row
    };
    const auto recur = [&](int64_t begin, int64_t end, typename Work<T>::Workspace room = {}) {
      a.begin = int(begin), a.end = int(end);
      w_.run_layer(a, false, on, room);
    };
    if (input.when == Projected::beside) {
      const int64_t head = steps / 4;
      project(0, head, 0, on);
      typename Work<T>::Workspace room;
      w_.prepare(room, head, on);
      Fork beside(call_.device, on, 2);
      recur(0, head, std::move(room));  // launched first: as a rule it then finds its multiprocessors free
      project(head, steps, 0, beside.of(1));
      beside.join();
      recur(head, steps);
    } else {
      for (int64_t begin = 0; begin < steps; begin += own.chunk) {
        const int64_t end = std::min(begin + own.chunk, steps);
        project(begin, end, rows_of_steps(a.schedule, begin, end).first, on);
        recur(begin, end);
      }
    }
  }
  // Rows of the steps [begin, end) in the order of processing. They are contiguous if these are all steps, or if the ranges
  // were chosen so (own.chunk).
  struct Rows {
    int64_t first, count;
  };
  Rows rows_of_steps(const Schedule& schedule, int64_t begin, int64_t end) const {
    if (end - begin == w_.steps) return {0, w_.N};
    const bool back = schedule.backward_in_time;
    const int64_t first = order_.offset[back ? w_.steps - end : begin];
    return {first, order_.offset[back ? w_.steps - begin : end] - first};
  }

  const StackForward& call_;
  Tape* const tape_;  // null: inference
  const Spec& spec_ = call_.spec;
  const CellInfo& cell_ = spec_.info();
  const std::unique_ptr<Order> own_order_;
  const Order& order_ = tape_ ? tape_->order : *own_order_;
  DeviceOrder device_order_;
  const Work<T> w_;
  const bool direct_ = w_.is_packed(call_.y, w_.width);  // inference writes the last layer's y where it is wanted
  const bool drops_ = tape_ && call_.dropout > 0 && spec_.L > 1;
  const int64_t counts_ = sizeof(T) == 2 && w_.packed ? spec_.count() * projection_tiles(w_.N) : 0;  // of done_

  Arena arena_;
  std::vector<Panel<T>> panels_;         // the call's, if it brings any
  std::vector<T*> y_, saved_, operand_;  // see Tape
  T *between_[2] = {}, *masked_ = nullptr, *x_room_ = nullptr, *h0_ = nullptr;
  unsigned* done_ = nullptr;             // (L*D, tiles): see Projection
  struct PerDirection {
    S *input, *carry, *slots;
    T* operand;
    Panel<T> panel;  // where the call brings none
    int64_t chunk;  // steps
  } own_[2] = {};
};

}  // namespace

std::shared_ptr<Tape> run_forward(const StackForward& call, bool training) {
  const OnDevice here(call.device);
  expect_no_capture(call.stream);
  note_pass({"forward", call.spec.info().name, name_of(call.dtype), call.device, call.T_, call.B, call.spec.H, call.spec.L});
  std::shared_ptr<Tape> tape;
  if (training) tape = std::make_shared<Tape>(call);
  with_type(call.dtype, [&](auto t) { ForwardPass<decltype(t)>(call, tape.get()).run(); });
  if (tape) {
    FUSEDRNN_CUDA(cudaEventCreateWithFlags(&tape->ready, cudaEventDisableTiming));
    FUSEDRNN_CUDA(cudaEventRecord(tape->ready, call.stream));
  }
  return tape;
}

int64_t tape_bytes(const Tape& tape) { return int64_t(tape.arena.bytes()); }

}  // namespace fusedrnn::cuda
