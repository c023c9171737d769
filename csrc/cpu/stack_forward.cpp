// The forward pass of a stack: panels are packed, a tape filled where one is given, layer after layer or as a wavefront.
#include <memory>

#include "cpu/checksums.h"
#include "cpu/crew.h"
#include "cpu/dropout.h"
#include "cpu/stack.h"
#include "cpu/trace.h"

namespace fusedrnn {
namespace {

// This rank's part of the weights: hashed where there are checksums, and packed where there are panels to fill.
template <class T>
void read_weights(const Spec& spec, const StackWeights<const T>& weights, Checksums<T>* sums, Panels<T>* panels, int rank,
                  int threads) {
  if (!sums && !panels) return;
  uint64_t sum = 0;
  each_block(spec, kernels<T>().lanes, rank, threads, [&](int64_t i, int64_t b) {
    const Weights<const T>& w = weights[i];
    if (sums) sum += sums->rows(w.w_ih, i, false, b, 0, spec.input_size(i / spec.D));
    if (panels) panels->pack_input(w, i, b);
    if (sums) sum += sums->rows(w.w_hh, i, true, b, 0, spec.H);
    if (panels) panels->pack_recurrent(w, i, b);
  });
  if (!sums) return;
  sums->add_weights(sum);
  if (rank == 0) sums->add_biases(weights);
}

// One forward pass of a stack: its threads, workspace and arguments.
template <class T>
class ForwardPass {
  // In order of initialisation: each uses those above it.
  const StackForward<T>& call_;
  Tape<T>* const tape_;  // null: inference
  const Spec& spec_ = call_.spec;
  const CellInfo& cell_ = spec_.info();
  const int64_t width_ = spec_.D * spec_.H;  // of a layer's y
  const std::unique_ptr<Order> own_order_;
  const Order& order_ = tape_ ? tape_->order : *own_order_;
  const int64_t steps_ = order_.active.size() - 1;
  const bool drops_ = tape_ && tape_->dropout > 0 && spec_.L > 1;
  const std::vector<LayerSize> sizes_ = layer_sizes<T>(spec_, steps_, call_.B);
  Crew crew_;
  const std::unique_ptr<Panels<T>> own_panels_;

  Arena arena_;
  Place<T>* place_;                                // a thread's: (rows)
  T *pre_, *zeros_;                                // a thread's pre-activations of a chunk of steps; (H), and a vector more
  T *between_ = nullptr, *range_h_ = nullptr;      // (T, B, D*H); of a wavefront (L, B, H)
  std::vector<T*> operand_;                        // of each that run at the same time, (B, H)
  int64_t pre_thread_ = 0, place_thread_ = 0;      // a thread's share of both
  RowTables tables_;
  std::vector<ForwardArgs<T>> args_;

 public:
  ForwardPass(const StackForward<T>& call, Tape<T>* tape)
      : call_(call), tape_(tape), own_order_(tape ? nullptr : new Order(call.T_, call.B, call.lengths)), crew_(make_crew()),
        own_panels_(call.panels ? nullptr : new Panels<T>(call.spec)), args_(call.spec.count()) {
    allocate();
    if (tape_ && tape_->h0) std::copy_n(call_.state[0], spec_.count() * call_.B * spec_.H, tape_->h0);
    set_args();
  }

  void run() {
    Checksums<T> sums(spec_);
    crew_.run([&](int rank) {
      read_weights<T>(spec_, call_.weights, tape_ ? &sums : nullptr, own_panels_.get(), rank, crew_.threads());
      if (tape_) sums.add_x(call_.x, order_, rank, crew_.threads());
      crew_.wait(rank);
      layers(rank);
    });
    if (tape_) tape_->x_sum = sums.x(), tape_->weights_sum = sums.weights();
    if (call_.lengths) clear_padding(call_.y, width_, order_, call_.T_);
    crew_.finish();
  }

 private:
  Crew make_crew() const {
    const Pass pass = tape_ ? Pass::training : call_.panels ? Pass::packed_before : Pass::packed_now;
    const auto make_plan = [&](int64_t l, int threads, bool several) {
      return forward_plan(sizes_[l], this_machine(), threads, several);
    };
    const auto make_wave = [&](int threads) { return drops_ ? Wave{} : forward_wave(sizes_, this_machine(), threads); };
    return Crew(spec_, kind_of(spec_, sizes_[0], order_.rows(), pass, drops_, 0), make_plan, make_wave);
  }

  void allocate() {
    const int64_t H = spec_.H, lanes = kernels<T>().lanes;
    for (int64_t l = 0; l < spec_.L; ++l) {
      const Plan& plan = crew_.plan(l);
      const int64_t rows = ceil_div(call_.B, plan.row_threads);
      const int64_t units = ceil_div(ceil_div(H, lanes), plan.unit_threads) * lanes;
      pre_thread_ = std::max(pre_thread_, plan.chunk_steps * rows * units * cell_.slots);
      place_thread_ = std::max(place_thread_, rows);
    }
    operand_.resize(crew_.concurrent());
    arena_.want(&pre_, {crew_.threads(), pre_thread_});
    arena_.want(&place_, {crew_.threads(), place_thread_});
    arena_.want(&zeros_, {H + lanes});
    if (crew_.flows()) arena_.want(&range_h_, {spec_.L, call_.B, H});
    if (spec_.L > 1 && (!tape_ || drops_)) arena_.want(&between_, {call_.T_, call_.B, width_});
    if (!tape_ && cell_.phases > 1)
      for (T*& o : operand_) arena_.want(&o, {call_.B, H});
    arena_.allocate();
    std::fill_n(zeros_, H + lanes, T(0));
  }

  void set_args() {
    const ptrdiff_t* state_row = tables_.states(order_, spec_.H);
    Sequence<const T> x = call_.x;
    for (int64_t l = 0; l < spec_.L; ++l) {
      // Inference writes inner layers in turns to one buffer and to the caller's y, which the last layer then overwrites.
      Sequence<T> y = tape_                        ? time_major(tape_->y[l], call_.B, width_)
                      : (spec_.L - 1 - l) % 2 == 0 ? call_.y
                                                   : time_major(between_, call_.B, width_);
      for (int d = 0; d < spec_.D; ++d) set_args(l, d, x, y, state_row);
      x = drops_ ? Sequence<const T>(time_major<const T>(between_, call_.B, width_)) : Sequence<const T>{y.data, y.step, y.row};
    }
  }

  void set_args(int64_t l, int d, const Sequence<const T>& x, const Sequence<T>& y, const ptrdiff_t* state_row) {
    const int64_t i = l * spec_.D + d, H = spec_.H, state = call_.B * H;
    const bool back = spec_.backward_in_time(d), top = l == spec_.L - 1;
    const auto& p = (call_.panels ? *call_.panels : *own_panels_)[i];
    ForwardArgs<T>& a = args_[i];
    a.I = spec_.input_size(l), a.H = H;
    a.schedule = order_.schedule(call_.B);
    a.x = tables_.rows(x, order_, back, 0);
    a.y = tables_.rows(y, order_, back, d * H);
    a.copy = tables_.rows(tape_ && top ? call_.y : Sequence<T>{}, order_, back, d * H);
    for (int s = 0; s < cell_.states; ++s) {
      a.state[s] = call_.state[s] ? call_.state[s] + i * state : nullptr;
      a.final_state[s] = call_.final_state[s] + i * state;
    }
    a.state_row = state_row;
    a.w_ih = p.w_ih, a.ih_block = p.ih_block, a.bias = p.bias;
    for (int q = 0; q < cell_.phases; ++q) a.w_hh[q] = p.w_hh[q], a.hh_block[q] = p.hh_block[q];
    a.turn = 0;
    a.saved = tape_ ? tape_->saved[i] : nullptr;
    a.operand = tape_ ? tape_->operand[i] : operand_[crew_.concurrent_index(l, d)];
    a.pre = pre_ + crew_.first_rank(l, d) * pre_thread_, a.pre_thread = pre_thread_;
    a.place = place_ + crew_.first_rank(l, d) * place_thread_, a.place_thread = place_thread_;
    a.range_h = range_h_ ? range_h_ + i * state : nullptr;
    a.zeros = zeros_;
  }

  void layers(int rank) {
    const auto kernel = kernels<T>().cell[spec_.cell].forward;
    Trace trace("forward", rank);
    if (crew_.flows()) {
      crew_.flow(rank, steps_, true,
                 [&](int l, const Team& team, int64_t begin, int64_t end) { kernel(args_[l], team, begin, end); });
      trace.stack<T>(spec_, call_.T_, call_.B, crew_);
      return;
    }
    for (int64_t l = 0; l < spec_.L; ++l) {
      if (l > 0 && drops_) {
        Dropout{tape_->dropout, tape_->seed}.apply<T>(tape_->y[l - 1], between_, call_.T_ * call_.B * width_, l, rank,
                                                      crew_.threads());
        crew_.wait(rank);
      }
      crew_.directions(l, rank, [&](int d, const Team& team) { kernel(args_[l * spec_.D + d], team, 0, steps_); });
      crew_.wait(rank);
      trace.layer<T>(spec_, l, call_.T_, call_.B, crew_);
    }
  }
};

}  // namespace

template <class T>
void run_forward(const StackForward<T>& call, Tape<T>* tape) {
  if (call.B > 0) return ForwardPass<T>(call, tape).run();
  if (!tape) return;
  Checksums<T> sums(call.spec);
  read_weights<T>(call.spec, call.weights, &sums, nullptr, 0, 1);
  tape->x_sum = sums.x(), tape->weights_sum = sums.weights();
}

template void run_forward(const StackForward<float>&, Tape<float>*);
template void run_forward(const StackForward<double>&, Tape<double>*);

}  // namespace fusedrnn
