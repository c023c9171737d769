// The threads of one call of a stack: how many, and in which teams.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/plan.h"
#include "cpu/threads.h"
#include "cpu/tuned_call.h"
#include "spec.h"

namespace fusedrnn {

// What a plan must know of a layer that T_ steps of B rows pass through.
template <class T>
LayerSize layer_size(const Spec& spec, int64_t layer, int64_t T_, int64_t B) {
  const Kernels<T>& k = kernels<T>();
  return {T_, B, spec.input_size(layer), spec.H, &spec.info(), k.lanes, int(sizeof(T)), k.cell[spec.cell].fuses};
}

template <class T>
std::vector<LayerSize> layer_sizes(const Spec& spec, int64_t T_, int64_t B) {
  std::vector<LayerSize> sizes;
  for (int64_t l = 0; l < spec.L; ++l) sizes.push_back(layer_size<T>(spec, l, T_, B));
  return sizes;
}

// Passes whose times differ. (What lies between layers counts too: `drops` below.)
enum class Pass { training, packed_before, packed_now, backward };

inline uint64_t mixed(uint64_t sum, uint64_t part) { return (sum ^ part) * 0x9e3779b97f4a7c15u; }

// Hash of all that a call's duration depends on, but for the threads; calls with equal hashes share a tuner. `wants`: which
// results.
inline uint64_t kind_of(const Spec& spec, const LayerSize& bottom, int64_t rows, Pass pass, bool drops, int wants) {
  uint64_t kind = 0;
  for (int64_t part : {int64_t(spec.cell), spec.L, bottom.T, bottom.B, bottom.I, bottom.H, int64_t(bottom.element_bytes),
                       int64_t(bottom.lanes), rows, int64_t(pass), int64_t(drops), int64_t(wants)})
    kind = mixed(kind ^ kind >> 32, uint64_t(part));
  return kind;
}

// The threads of a call in teams: one team for all, one for each direction, or one for some neighbouring layers each.
class Crew {
 public:
  // `make_plan` makes the plan of a layer, and `make_wave` that of the stack, for a number of threads. `kind`: see kind_of.
  template <class MakePlan, class MakeWave>
  Crew(const Spec& spec, uint64_t kind, MakePlan make_plan, MakeWave make_wave)
      : L_(int(spec.L)), D_(spec.D), wanted_(choose_threads(spec, kind, make_plan, make_wave)), lease_(wanted_),
        threads_(lease_.size()) {
    if (D_ == 1 && L_ > 1 && threads_ > 1) wave_ = make_wave(threads_);
    teams_ = D_ == 2 && threads_ >= 2 ? 2 : wave_.teams;
    for (int l = 0; l < L_; ++l) plans_.push_back(make_plan(l, threads_ / teams_, several_by_measurement_));
    all_.reset(threads_, lease_.crowded());
    for (int i = 0; i < L_ * D_; ++i) {
      const Plan& plan = plans_[i / D_];
      barriers_.push_back(std::make_unique<Barrier[]>(1 + plan.row_threads));
      barriers_.back()[0].reset(plan.threads(), lease_.crowded());
      for (int r = 0; r < plan.row_threads; ++r) barriers_.back()[1 + r].reset(plan.unit_threads, lease_.crowded());
    }
    progress_ = std::make_unique<Progress[]>(L_);
    for (int l = 0; l < L_; ++l) progress_[l].reset(lease_.crowded());
  }
  // All is done, and nothing failed. What took long because threads were parked says nothing of calls in a row.
  void finish() { tuned_.end(threads_ == wanted_ && !lease_.woke()); }
  int threads() const { return threads_; }
  bool split() const { return D_ == 2 && teams_ == 2; }  // the two directions run at the same time
  const Wave& wave() const { return wave_; }
  bool flows() const { return wave_.teams > 1; }
  bool tuned() const { return tuned_.active(); }  // one thread or several by measurement, not by the model
  // How many layers and directions run at the same time, and the number of one's among them: what each needs of its own.
  int concurrent() const { return flows() ? L_ : teams_; }
  int concurrent_index(int64_t layer, int d) const { return flows() ? int(layer) : split() ? d : 0; }
  int first_rank(int64_t layer, int d) const { return team_of(layer, d) * (threads_ / teams_); }
  const Plan& plan(int64_t layer) const { return plans_[layer]; }
  void wait(int rank) { all_.wait(rank); }
  template <class Work>
  void run(const Work& work) {
    lease_.run(threads_, work);
  }

  // Calls work(d, team) for the directions of the layer that this rank takes part in.
  template <class Work>
  void directions(int64_t layer, int rank, Work work) {
    for (int d = 0; d < D_; ++d) {
      const int r = rank - first_rank(layer, d);
      Barrier* barriers = barriers_[layer * D_ + d].get();
      if (r >= 0 && r < plans_[layer].threads()) work(d, Team{plans_[layer], barriers, barriers + 1, r});
    }
  }

  // The wavefront: calls work(layer, team, begin, end) for this rank's layers, range by range; a layer waits for the one
  // before it, which is the one above it in backward.
  template <class Work>
  void flow(int rank, int64_t steps, bool forward, Work work) {
    for (int64_t i = 0; i < wave_.ranges; ++i) {
      const int64_t range = forward ? i : wave_.ranges - 1 - i;
      const Part part(steps, int(range), int(wave_.ranges));
      for (int k = 0; k < L_; ++k) {
        const int l = forward ? k : L_ - 1 - k, before = forward ? l - 1 : l + 1;
        if (rank / (threads_ / teams_) != team_of(l, 0)) continue;
        if (k > 0) progress_[before].wait_for((i + 1) * plans_[before].threads());
        directions(l, rank, [&](int, const Team& team) {
          work(l, team, part.begin, part.end);
          progress_[l].advance();
        });
      }
    }
  }

 private:
  int team_of(int64_t layer, int d) const { return D_ == 2 ? (teams_ == 2 ? d : 0) : int(layer * teams_ / L_); }

  // How many threads to ask for, in three steps:
  //
  //   1. the model's choice, one thread or several, and how long it expects the call to take
  //   2. that is the answer if there are two directions, if the call is too short or too long to measure, or if tests say so
  //   3. so it is if the model expects the other, several or one, to take much longer; else the answer is what was faster in
  //      calls before
  template <class MakePlan, class MakeWave>
  int choose_threads(const Spec& spec, uint64_t kind, MakePlan make_plan, MakeWave make_wave) {
    const int wanted = wanted_threads();
    if (wanted == 1) return 1;
    int most = 1;
    double us = 0;
    for (int64_t l = 0; l < spec.L; ++l) {
      const Plan plan = make_plan(l, wanted, false);
      most = std::max(most, plan.threads()), us += plan.estimated_us;
    }
    if (spec.D == 2) return most > 1 ? wanted : 1;
    const Wave wave = spec.L > 1 ? make_wave(wanted) : Wave{};
    if (wave.teams > 1) most = wanted, us = wave.estimated_us;
    if (us < least_tuned_us || us > most_tuned_us || are_threads_overridden()) return most;
    const bool one_by_model = most == 1;
    double other_us = 0;
    int several = most;
    for (int64_t l = 0; l < spec.L; ++l) {
      const Plan plan = one_by_model ? make_plan(l, wanted, true) : make_plan(l, 1, false);
      several = std::max(several, plan.threads()), other_us += plan.estimated_us;
    }
    if (several == 1 || other_us > near_equal * us) return most;
    const bool chosen = tuned_.begin(mixed(kind, uint64_t(wanted)), !one_by_model) == 1;
    several_by_measurement_ = chosen && one_by_model;
    return chosen ? several : 1;
  }

  // Shorter calls are over before another thread has seen them; for longer ones the model is right.
  static constexpr double least_tuned_us = 20, most_tuned_us = 1000;
  static constexpr double near_equal = 1.6;  // what the model was seen to miss by: docs/performance.md

  int L_, D_;
  TunedCall tuned_;
  bool several_by_measurement_ = false;  // more than one thread, where the model would take one
  const int wanted_;
  Lease lease_;
  int threads_, teams_;
  Wave wave_;
  std::vector<Plan> plans_;
  Barrier all_;
  std::vector<std::unique_ptr<Barrier[]>> barriers_;
  std::unique_ptr<Progress[]> progress_;  // per layer, in threads times ranges
};

}  // namespace fusedrnn
