// A call for which the model sees little between one thread and several: calls of its kind measure, and do what was faster.
#pragma once

#include <stdint.h>

#include <chrono>

#include "cpu/tuner.h"

namespace fusedrnn {

class TunedCall {
 public:
  TunedCall() = default;
  ~TunedCall();
  TunedCall(const TunedCall&) = delete;
  TunedCall& operator=(const TunedCall&) = delete;

  // Begins a call; those with the same `kind`, which is not 0, take as long. Returns 1 for several threads, else 0: `model`,
  // where its kind has not been measured or is in use by another thread.
  int begin(uint64_t kind, int model);
  bool active() const { return kind_ != nullptr; }
  // The call is over. `counts`: it did as it was told, and its time tells something.
  void end(bool counts);

 private:
  using Clock = std::chrono::steady_clock;
  struct Kind;
  static Kind* take(uint64_t kind, int model);

  Kind* kind_ = nullptr;  // held until the end
  Clock::time_point start_;
};

}  // namespace fusedrnn
