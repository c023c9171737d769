// A stream's steps on one thread or on several, as they were measured to be faster.
#include "cpu/stream.h"

#include <algorithm>

#include "cpu/crew.h"
#include "cpu/denormals.h"
#include "cpu/dispatch.h"
#include "cpu/trace.h"

namespace fusedrnn {

namespace {

// A step of less work than this many bytes of weights is done before a second thread has seen it.
constexpr int64_t least_weights = 192 << 10;

bool worth_several(const LayerSize& size) {
  return size.B * size.cell->gates * size.H * (size.I + size.H) * size.element_bytes >= least_weights;
}

}  // namespace

template <class T>
Plan Stream<T>::plan_of(int64_t layer, int threads) const {
  const LayerSize size = layer_size<T>(spec_, layer, 1, B_);
  return forward_plan(size, this_machine(), threads, threads > 1 && worth_several(size));
}

template <class T>
Stream<T>::Stream(const Spec& spec, std::shared_ptr<const Panels<T>> panels, int64_t B)
    : spec_(spec), panels_(std::move(panels)), forward_(kernels<T>().cell[spec.cell].forward), B_(B), order_(1, B, nullptr),
      levels_(spec.L) {
  const CellInfo& cell = spec.info();
  const int64_t H = spec.H, lanes = kernels<T>().lanes;
  Place<T>* place;
  T *pre, *zeros, *operand = nullptr;
  for (int64_t l = 0; l < spec.L; ++l)
    if (worth_several(layer_size<T>(spec, l, 1, B)))
      most_threads_ = std::max(most_threads_, plan_of(l, available_threads()).threads());
  const int64_t pre_thread = B * ceil_div(H, lanes) * cell.slots * lanes;
  arena_.want(&pre, {most_threads_, pre_thread});
  arena_.want(&place, {most_threads_, B});
  arena_.want(&zeros, {H + lanes});
  if (cell.phases > 1) arena_.want(&operand, {B, H});
  for (Level& level : levels_) {
    for (T*& h : level.h) arena_.want(&h, {B, H});
    for (int s = 1; s < cell.states; ++s) arena_.want(&level.states[s], {B, H});
  }
  arena_.allocate();
  std::fill_n(zeros, H + lanes, T(0));
  for (int64_t j = 0; j < B; ++j) state_row_.push_back(j * H), input_row_.push_back(j * spec.I);
  for (int64_t l = 0; l < spec.L; ++l) {
    const auto& p = (*panels_)[l];
    for (int now : {0, 1}) {
      ForwardArgs<T>& a = levels_[l].args[now];
      a = {};
      a.I = spec.input_size(l), a.H = H;
      a.schedule = order_.schedule(B);
      a.x = {l == 0 ? nullptr : levels_[l - 1].h[1 - now], 0, l == 0 ? input_row_.data() : state_row_.data()};
      a.y = {levels_[l].h[1 - now], 0, state_row_.data()};
      a.state_row = state_row_.data();
      a.state[0] = levels_[l].h[now], a.final_state[0] = levels_[l].h[1 - now];
      for (int s = 1; s < cell.states; ++s) a.state[s] = a.final_state[s] = levels_[l].states[s];
      a.turn = now;
      a.w_ih = p.w_ih, a.ih_block = p.ih_block, a.bias = p.bias;
      for (int q = 0; q < cell.phases; ++q) a.w_hh[q] = p.w_hh[q], a.hh_block[q] = p.hh_block[q];
      a.operand = operand;
      a.pre = pre, a.pre_thread = pre_thread;
      a.place = place, a.place_thread = B;
      a.zeros = zeros;
    }
  }
  all_ = std::make_unique<Barrier>();
  for (Level& level : levels_) level.barriers = std::make_unique<Barrier[]>(1 + most_threads_);
  for (int n = most_threads_; n >= 1; --n) plan_for(n);  // room in the barriers for every number
  trace();
  reset();
}

template <class T>
void Stream<T>::plan_for(int threads) {
  all_->reset(threads, false);
  for (int64_t l = 0; l < spec_.L; ++l) {
    Level& level = levels_[l];
    level.plan = plan_of(l, threads);
    level.barriers[0].reset(level.plan.threads(), false);
    for (int r = 0; r < level.plan.row_threads; ++r) level.barriers[1 + r].reset(level.plan.unit_threads, false);
  }
  planned_ = threads;
}

template <class T>
void Stream<T>::trace() const {
  for (int64_t l = 0; l < spec_.L; ++l) Trace::stream_layer<T>(spec_, l, B_, levels_[l].plan, tuner_.trying());
}

template <class T>
void Stream<T>::step(const T* x, T* h) {
  if (B_ == 0) return;
  // Not written where they are what they were two steps ago, since the other threads' cores keep copies of the lines.
  const T*& from = levels_.front().args[now_].x.base;
  T*& to = levels_.back().args[now_].y.base;
  if (from != x) from = x;
  if (to != h) to = h;
  if (most_threads_ == 1)
    run_alone();
  else
    run_on_several();
  now_ = 1 - now_;
}

template <class T>
void Stream<T>::run_alone() {
  const FlushDenormals flush;
  for (Level& level : levels_) forward_(level.args[now_], Team{level.plan, &level.barriers[0], &level.barriers[1], 0}, 0, 1);
}

template <class T>
void Stream<T>::run_on_several() {
  const int wanted = std::min(most_threads_, wanted_threads());
  // After a pause the other threads are parked, and waking them costs more than a step: a slow stream stays on one.
  const Clock::time_point start = wanted > 1 ? Clock::now() : last_end_;
  const bool awake = wanted > 1 && start - last_end_ < spin_window;
  const int asked = awake && tuner_.choice() == 1 ? wanted : 1;
  Lease lease(asked);
  if (lease.size() != planned_) {
    plan_for(lease.size());
    trace();
  }
  lease.run(planned_, [this, now = now_](int rank) {
    for (Level& level : levels_) {
      if (rank < level.plan.threads())
        forward_(level.args[now], Team{level.plan, &level.barriers[0], &level.barriers[1], rank}, 0, 1);
      if (planned_ > 1 && levels_.size() > 1) all_->wait(rank);
    }
  });
  if (wanted > 1) {
    last_end_ = Clock::now();
    if (awake && lease.size() == asked) tuner_.took(std::chrono::nanoseconds(last_end_ - start).count());
  }
}

template <class T>
void Stream<T>::reset() {
  for (int i = 0; i < spec_.info().states; ++i) set_state(i, nullptr);
}

template <class T>
void Stream<T>::get_state(int i, T* out) const {
  const int64_t n = B_ * spec_.H;
  for (int64_t l = 0; l < spec_.L; ++l) std::copy_n(i == 0 ? levels_[l].h[now_] : levels_[l].states[i], n, out + l * n);
}

template <class T>
void Stream<T>::set_state(int i, const T* values) {
  const int64_t n = B_ * spec_.H;
  for (int64_t l = 0; l < spec_.L; ++l) {
    T* to = i == 0 ? levels_[l].h[now_] : levels_[l].states[i];
    if (values)
      std::copy_n(values + l * n, n, to);
    else
      std::fill_n(to, n, T(0));
  }
}

template class Stream<float>;
template class Stream<double>;

}  // namespace fusedrnn
