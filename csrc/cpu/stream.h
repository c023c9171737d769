// A stack's time steps one by one, as their inputs come.
#pragma once

#include <chrono>
#include <memory>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/stack.h"
#include "cpu/threads.h"
#include "cpu/tuner.h"

namespace fusedrnn {

// One step after another with the state kept: a stream. A step allocates nothing, but for threads that it is the first to start.
template <class T>
class Stream {
 public:
  Stream(const Spec& spec, std::shared_ptr<const Panels<T>> panels, int64_t B);
  void step(const T* x, T* h);  // (B, I) -> (B, H), both contiguous
  void reset();
  void get_state(int i, T* out) const;       // (L, B, H)
  void set_state(int i, const T* values);

 private:
  Spec spec_;
  std::shared_ptr<const Panels<T>> panels_;
  decltype(CellKernels<T>::forward) forward_;
  int64_t B_;
  Order order_;
  std::vector<ptrdiff_t> input_row_, state_row_;
  Plan plan_of(int64_t layer, int threads) const;
  void plan_for(int threads);
  void trace() const;  // see Trace
  void run_alone();
  void run_on_several();
  using Clock = std::chrono::steady_clock;
  struct Level {
    ForwardArgs<T> args[2];               // of a step that starts from h[0], and from h[1]
    Plan plan;
    std::unique_ptr<Barrier[]> barriers;  // of the team, then of each part of the batch
    T* h[2];                              // (B, H): the last state and the next one, in turns
    T* states[max_states];
  };
  std::vector<Level> levels_;
  int most_threads_ = 1;  // that a step can use
  int planned_ = 0;       // threads that the plans are for
  std::unique_ptr<Barrier> all_;
  Arena arena_;
  // Written at each step: apart from what the other threads read, of which their cores keep copies.
  alignas(64) int now_ = 0;       // levels_[l].h[now_] is the state
  Clock::time_point last_end_{};  // of the last step
  StepTuner tuner_;
};

}  // namespace fusedrnn
