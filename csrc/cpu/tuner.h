// Chooses by measurement between one thread and several, for work that is done over and over: a stream's step, or calls of one
// kind. Which is faster depends on how far apart the cores are just now and on who else runs on them, which no model knows.
#pragma once

#include <stdint.h>

#include <algorithm>

namespace fusedrnn {

// In a trial, times are summed over `group` steps; from trial to trial it is `shortest` steps and more.
template <int group_, int shortest_>
class Tuner {
 public:
  constexpr explicit Tuner(int best = 0) : best_(best) {}

  // 1 where the next step shall use several threads, else 0.
  int choice() const { return trial_ < 0 ? best_ : trial_ / arm; }

  bool trying() const { return trial_ >= 0; }

  // A step used choice() and took so long.
  void took(int64_t ns) {
    if (trial_ < 0) {
      if (--left_ == 0) trial_ = 0, least_[0] = least_[1] = spent_ = INT64_MAX;
      return;
    }
    const int with = trial_ / arm, step = trial_ % arm;
    if (step % group == 0) sum_ = 0;
    if (step == 0) spent_ = 0;
    sum_ += ns, spent_ += ns;
    if (step >= warm_up && step % group == group - 1) least_[with] = std::min(least_[with], sum_);
    ++trial_;
    // Several threads that wait for one without a core take time slices where one thread takes microseconds.
    const bool hopeless = with == 1 && spent_ > 2 * (arm / group) * least_[0];
    if (hopeless || trial_ == 2 * arm) decide(!hopeless && least_[1] < least_[0]);
  }

  static constexpr int group = group_, warm_up = 2 * group, arm = 6 * group;  // steps: of a sum, not judged, of a choice
  static constexpr int shortest = shortest_, longest = 16 * shortest;         // steps from trial to trial

 private:
  void decide(int best) {
    period_ = best == best_ ? std::min(2 * period_, longest) : shortest;
    best_ = best, left_ = period_, trial_ = -1;
  }

  int best_, trial_ = -1;                 // step of the trial that is on, or -1
  int left_ = 8, period_ = shortest / 2;  // steps until the next trial, which the first steps are not worth
  int64_t sum_ = 0, spent_ = 0, least_[2] = {};
};

using StepTuner = Tuner<8, 2048>;
using CallTuner = Tuner<2, 256>;

}  // namespace fusedrnn
