// When the machine is shared, a barrier per step waits for the scheduler's time slices, and two threads are slower than
// one. After a stall, calls run on one thread for a while, twice as long if the next stall follows soon.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <atomic>

namespace fusedrnn {

// Times in microseconds of one clock, which is read only where it matters. Any thread may ask; who has the pool judges.
class Retreat {
 public:
  template <class Clock>
  bool on(Clock clock) {
    if (!active_.load(std::memory_order_relaxed)) return false;
    const bool on = clock() < until_.load(std::memory_order_relaxed);
    if (!on) active_.store(false, std::memory_order_relaxed);
    return on;
  }

  // The work under a lease took so long, of which each of its threads waited so long for threads that had lost their
  // core; `woke`: some of them had to be woken first, which is no fault of theirs.
  template <class Clock>
  void judge(Clock clock, int64_t took, int64_t waited, bool woke) {
    if (waited <= (woke ? late : stall) || double(waited) <= stalled_share * double(took)) return;
    const int64_t now = clock(), since = now - until_.load(std::memory_order_relaxed),
                  last = length_.load(std::memory_order_relaxed);
    const int64_t length = since < last ? std::min(2 * last, longest) : shortest;
    length_.store(length, std::memory_order_relaxed);
    until_.store(now + length, std::memory_order_relaxed);
    active_.store(true, std::memory_order_relaxed);
  }

  static constexpr int64_t stall = 100;           // waiting for less is never held against it
  static constexpr int64_t late = 500;            // likewise where threads were woken
  static constexpr double stalled_share = 0.25;   // of the time it took
  static constexpr int64_t shortest = 5000, longest = 320000;

 private:
  std::atomic<bool> active_{false};
  std::atomic<int64_t> until_{INT64_MIN / 2}, length_{0};
};

}  // namespace fusedrnn
