// What calls of a kind were measured to take on one thread and on several, process-wide.
#include "cpu/tuned_call.h"

#include <atomic>

namespace fusedrnn {

struct alignas(64) TunedCall::Kind {
  std::atomic<bool> busy{false};
  uint64_t kind = 0;
  CallTuner tuner;
};

// A table in which each kind has two places, by its number: it takes an empty first one, or else the second from whichever
// kind had it. Not while its first place is in use, perhaps by its own kind. (A place that a thread held when the process
// forked stays held in the child.)
TunedCall::Kind* TunedCall::take(uint64_t kind, int model) {
  static Kind kinds[256];
  Kind *const first = &kinds[kind % 256], *const second = &kinds[(kind >> 8) % 256];
  bool may_take = true;
  for (Kind* k : {first, second}) {
    if (k->busy.exchange(true, std::memory_order_acquire)) {
      may_take = false;
      continue;
    }
    if (k->kind == kind) return k;
    if (may_take && (k->kind == 0 || k == second)) {
      k->kind = kind, k->tuner = CallTuner(model);
      return k;
    }
    k->busy.store(false, std::memory_order_release);
  }
  return nullptr;
}

int TunedCall::begin(uint64_t kind, int model) {
  kind_ = take(kind, model);
  if (!kind_) return model;
  start_ = Clock::now();
  return kind_->tuner.choice();
}

void TunedCall::end(bool counts) {
  if (!kind_) return;
  if (counts) kind_->tuner.took(std::chrono::nanoseconds(Clock::now() - start_).count());
  kind_->busy.store(false, std::memory_order_release);
  kind_ = nullptr;
}

TunedCall::~TunedCall() { end(false); }

}  // namespace fusedrnn
