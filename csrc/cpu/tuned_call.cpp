#include "cpu/tuned_call.h"

#include <atomic>

namespace fusedrnn {

struct alignas(64) TunedCall::Kind {
  std::atomic<bool> busy{false};
  uint64_t kind = 0;
  CallTuner tuner;
};

// A kind's place among those known, by its number; it takes the place of another that had it.
TunedCall::Kind* TunedCall::take(uint64_t kind, int model) {
  static Kind kinds[256];
  Kind& k = kinds[kind % 256];
  if (k.busy.exchange(true, std::memory_order_acquire)) return nullptr;
  if (k.kind != kind) k.kind = kind, k.tuner = CallTuner(model);
  return &k;
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
