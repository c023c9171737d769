// The backward pass of a stack: the tape is checked, transposed panels are packed, then layer after layer or as a wavefront.
#include <stdexcept>

#include "cpu/checksums.h"
#include "cpu/crew.h"
#include "cpu/dropout.h"
#include "cpu/stack.h"
#include "cpu/trace.h"

namespace fusedrnn {
namespace {

// One backward pass of a stack: its threads, workspace and arguments.
template <class T>
class BackwardPass {
  // In order of initialisation: each uses those above it.
  const StackBackward<T>& call_;
  const Spec& spec_ = call_.spec;
  const CellInfo& cell_ = spec_.info();
  const Tape<T>& tape_ = *call_.tape;
  const Order& order_ = tape_.order;
  const int64_t B_ = tape_.B, H_ = spec_.H, width_ = spec_.D * H_, lanes_ = kernels<T>().lanes;
  const bool wants_weights_ = !call_.dweights.empty(), drops_ = tape_.dropout > 0 && spec_.L > 1;
  const std::vector<LayerSize> sizes_ = layer_sizes<T>(spec_, int64_t(order_.active.size()) - 1, B_);
  Crew crew_;
  TransposedPanels<T> transposed_;

  struct Work {  // see BackwardArgs
    T *slot_grads, *dcarry[max_states], *x_panel, *h_panel[max_phases], *sum_w_ih, *sum_w_hh, *sum_b;
  };
  Arena arena_;
  std::vector<Work> work_;  // of each direction or layer of those that run at the same time
  int64_t slot_grads_block_ = 0;
  T *zeros_, *between_[2] = {}, *masked_ = nullptr;  // (max(H, lanes)), and a vector more; the rest (T, B, D*H)
  T* second_ = nullptr;                              // (T, B, the widest input)
  RowTables tables_;
  std::vector<BackwardArgs<T>> args_;
  std::vector<Sequence<T>> dx_;  // of every layer

 public:
  explicit BackwardPass(const StackBackward<T>& call)
      : call_(call), crew_(make_crew()), transposed_(spec_, call.dx.data != nullptr), args_(spec_.count()), dx_(spec_.L) {
    allocate();
  }

  void run() {
    check_and_pack();
    if (tape_.order.rows() == 0) clear_weights();
    if (B_ == 0) return;
    std::fill_n(zeros_, std::max(H_, lanes_) + lanes_, T(0));
    if (call_.dx.data && !call_.adds) clear_padding(call_.dx, spec_.I, order_, tape_.T_);
    set_args();
    crew_.run([&](int rank) { layers(rank); });
    crew_.finish();
  }

 private:
  Crew make_crew() const {
    const int wants = 2 * wants_weights_ + (call_.dx.data != nullptr);
    const auto make_plan = [&](int64_t l, int threads, bool several) {
      return backward_plan(sizes_[l], this_machine(), threads, several);
    };
    const auto make_wave = [&](int threads) { return drops_ ? Wave{} : backward_wave(sizes_, this_machine(), threads); };
    return Crew(spec_, kind_of(spec_, sizes_[0], order_.rows(), Pass::backward, drops_, wants), make_plan, make_wave);
  }

  void allocate() {
    const int64_t T_ = tape_.T_, blocks = ceil_div(H_, lanes_), padded = blocks * lanes_;
    int64_t chunk_rows = 0;
    for (int64_t l = 0; l < spec_.L; ++l) chunk_rows = std::max(chunk_rows, crew_.plan(l).chunk_rows);
    const int64_t widest = spec_.L > 1 ? std::max(spec_.I, width_) : spec_.I;
    const bool sums = wants_weights_ && (call_.adds || order_.rows() > reduction_rows);
    slot_grads_block_ = (B_ + chunk_rows) * cell_.slots * lanes_ + lanes_;
    work_.resize(crew_.concurrent());
    arena_.want(&zeros_, {std::max(H_, lanes_) + lanes_});
    for (Work& w : work_) {
      arena_.want(&w.slot_grads, {blocks, slot_grads_block_});
      for (int s = 0; s < cell_.states; ++s) arena_.want(&w.dcarry[s], {B_, padded});
      if (wants_weights_) {
        const int64_t stride = operand_panel_stride(chunk_rows, lanes_);
        arena_.want(&w.x_panel, {ceil_div(widest, lanes_), stride});
        for (int p = 0; p < cell_.phases; ++p) arena_.want(&w.h_panel[p], {blocks, stride});
        arena_.want(&w.sum_b, {blocks, cell_.slots, lanes_});
      }
      if (sums) {
        arena_.want(&w.sum_w_ih, {cell_.gates, H_, widest});
        arena_.want(&w.sum_w_hh, {cell_.gates, H_, H_});
      }
    }
    for (int n = 0; n < 2; ++n)
      if (spec_.L > n + 1) arena_.want(&between_[n], {T_, B_, width_});
    if (drops_) arena_.want(&masked_, {T_, B_, width_});
    if (crew_.split()) arena_.want(&second_, {T_, B_, widest});
    arena_.allocate();
  }

  void check_and_pack() {
    Checksums<T> now(spec_);
    crew_.run([&](int rank) {
      uint64_t sum = 0;
      for (int64_t i = 0; i < spec_.count(); ++i) sum += pack(i, now, rank);
      now.add_weights(sum);
      if (rank == 0) now.add_biases(call_.weights);
      now.add_x(call_.x, order_, rank, crew_.threads());
    });
    if (now.x() != tape_.x_sum)
      throw std::runtime_error("x was changed after the forward pass, so its gradients would be wrong");
    if (now.weights() != tape_.weights_sum)
      throw std::runtime_error("the parameters were changed after the forward pass, so their gradients would be wrong");
  }

  // Each thread packs some columns, which it is the one to read where units are split; or, where no cache would keep its
  // part, it reads whole rows.
  uint64_t pack(int64_t i, const Checksums<T>& now, int rank) {
    const int threads = crew_.threads();
    const int64_t I = spec_.input_size(i / spec_.D);
    const bool by_rows = cell_.gates * H_ * (I + H_) * int64_t(sizeof(T)) > threads * this_machine().l2_bytes;
    const auto columns = [&](int64_t n) { return Part(ceil_div(n, lanes_), by_rows ? 0 : rank, by_rows ? 1 : threads); };
    const Part rows(ceil_div(H_, lanes_), by_rows ? rank : 0, by_rows ? threads : 1), inputs = columns(I), units = columns(H_);
    const Weights<const T>& w = call_.weights[i];
    uint64_t sum = 0;
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      sum += now.rows(w.w_ih, i, false, b, inputs.begin * lanes_, inputs.end * lanes_);
      transposed_.pack_input(w, i, b, inputs.begin, inputs.end);
      sum += now.rows(w.w_hh, i, true, b, units.begin * lanes_, units.end * lanes_);
      transposed_.pack_recurrent(w, i, b, units.begin, units.end);
    }
    return sum;
  }

  // What no step will write.
  void clear_weights() {
    if (call_.adds) return;
    for (size_t i = 0; i < call_.dweights.size(); ++i) {
      const Weights<T>& g = call_.dweights[i];
      std::fill_n(g.w_ih, cell_.gates * H_ * spec_.input_size(i / spec_.D), T(0));
      std::fill_n(g.w_hh, cell_.gates * H_ * H_, T(0));
      if (spec_.bias) std::fill_n(g.b_ih, cell_.gates * H_, T(0)), std::fill_n(g.b_hh, cell_.gates * H_, T(0));
    }
  }

  void set_args() {
    const ptrdiff_t* state_row = tables_.states(order_, H_);
    for (int64_t l = 0; l < spec_.L; ++l) {
      dx_[l] = l == 0 ? call_.dx : time_major(between_[(l - 1) % 2], B_, width_);
      const auto x = l == 0 ? call_.x : time_major<const T>(drops_ ? masked_ : tape_.y[l - 1], B_, width_);
      const auto dy = l == spec_.L - 1 ? call_.dy : time_major<const T>(between_[l % 2], B_, width_);
      for (int d = 0; d < spec_.D; ++d) {
        set_forward(l, d, x, state_row);
        set_args(l, d, dy);
      }
    }
  }

  // What backward needs of its forward pass.
  void set_forward(int64_t l, int d, const Sequence<const T>& x, const ptrdiff_t* state_row) {
    const int64_t i = l * spec_.D + d;
    const bool back = spec_.backward_in_time(d);
    ForwardArgs<T>& f = args_[i].forward;
    f = {};
    f.I = spec_.input_size(l), f.H = H_;
    f.schedule = order_.schedule(B_);
    f.x = tables_.rows(x, order_, back, 0);
    f.y = tables_.rows(time_major(tape_.y[l], B_, width_), order_, back, d * H_);
    f.state[0] = tape_.h0 ? tape_.h0 + i * B_ * H_ : nullptr;
    f.state_row = state_row;
    f.saved = tape_.saved[i], f.operand = tape_.operand[i];
    f.zeros = zeros_;
  }

  void set_args(int64_t l, int d, const Sequence<const T>& dy) {
    const int64_t i = l * spec_.D + d;
    const bool back = spec_.backward_in_time(d);
    const Work& w = work_[crew_.concurrent_index(l, d)];
    const auto& t = transposed_[i];
    BackwardArgs<T>& a = args_[i];
    a.dy = tables_.rows(dy, order_, back, d * H_);
    const bool aside = crew_.split() && d == 1;  // the second direction's dx, added when both are done
    a.dx = tables_.rows(dx_[l].data && aside ? time_major(second_, B_, a.forward.I) : dx_[l], order_, back, 0);
    a.dx_adds = !aside && (d == 1 || (l == 0 && call_.adds));
    for (int s = 0; s < cell_.states; ++s) {
      a.dfinal_state[s] = call_.dfinal_state[s] ? call_.dfinal_state[s] + i * B_ * H_ : nullptr;
      a.dstate[s] = call_.dstate[s] ? call_.dstate[s] + i * B_ * H_ : nullptr;
      a.dcarry[s] = w.dcarry[s];
    }
    a.adds = call_.adds;
    const Weights<T> g = wants_weights_ ? call_.dweights[i] : Weights<T>{};
    a.dw_ih = g.w_ih, a.dw_hh = g.w_hh, a.db_ih = g.b_ih, a.db_hh = g.b_hh;
    a.w_ih_t = t.w_ih, a.ih_block = t.ih_block;
    a.x_panel = w.x_panel;
    for (int p = 0; p < cell_.phases; ++p) a.w_hh_t[p] = t.w_hh[p], a.hh_block[p] = t.hh_block[p], a.h_panel[p] = w.h_panel[p];
    a.slot_grads = w.slot_grads, a.slot_grads_block = slot_grads_block_;
    a.sum_w_ih = w.sum_w_ih, a.sum_w_hh = w.sum_w_hh, a.sum_b = w.sum_b;
  }

  void layers(int rank) {
    const auto kernel = kernels<T>().cell[spec_.cell].backward;
    const Dropout dropout{tape_.dropout, tape_.seed};
    const int64_t steps = sizes_[0].T, n = tape_.T_ * B_ * width_;
    const int threads = crew_.threads();
    Trace trace("backward", rank);
    if (crew_.flows()) {
      crew_.flow(rank, steps, false,
                 [&](int l, const Team& team, int64_t begin, int64_t end) { kernel(args_[l], team, begin, end); });
      trace.stack<T>(spec_, tape_.T_, B_, crew_);
      return;
    }
    for (int64_t l = spec_.L - 1; l >= 0; --l) {
      if (l > 0 && drops_) dropout.apply<T>(tape_.y[l - 1], masked_, n, l, rank, threads);
      crew_.wait(rank);
      crew_.directions(l, rank, [&](int d, const Team& team) { kernel(args_[l * spec_.D + d], team, 0, steps); });
      crew_.wait(rank);
      trace.layer<T>(spec_, l, tape_.T_, B_, crew_);
      if (crew_.split() && dx_[l].data) {
        add_second(dx_[l], spec_.input_size(l), rank);
        crew_.wait(rank);
      }
      if (l > 0 && drops_) {
        dropout.apply<T>(dx_[l].data, dx_[l].data, n, l, rank, threads);
        crew_.wait(rank);
      }
    }
  }

  // This rank's part of the second direction's dx, of rows of I.
  void add_second(const Sequence<T>& dx, int64_t I, int rank) const {
    const Part part(order_.from.size(), rank, crew_.threads());
    for (int64_t j = part.begin; j < part.end; ++j)
      for (int64_t t = 0; t < order_.length[j]; ++t) {
        T* to = dx.data + t * dx.step + order_.from[j] * dx.row;
        const T* from = second_ + (t * B_ + order_.from[j]) * I;
        for (int64_t n = 0; n < I; ++n) to[n] += from[n];
      }
  }
};

}  // namespace

template <class T>
void run_backward(const StackBackward<T>& call) {
  BackwardPass<T>(call).run();
}

template void run_backward(const StackBackward<float>&);
template void run_backward(const StackBackward<double>&);

}  // namespace fusedrnn
