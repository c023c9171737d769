// When the machine is shared, a barrier per step waits for the scheduler's time slices, and two threads are slower than
// one. So a call that stalled makes those of the next while run on one thread. The while doubles where calls stall again
// soon after it; a stall that comes later is a new trouble.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <atomic>

namespace fusedrnn {

// Times in microseconds of one clock. Any thread may ask and judge at any time.
class Retreat {
 public:
  // `clock` tells the time, which is asked only where a retreat was not yet seen to be over.
  template <class Clock>
  bool on(Clock clock) {
    if (!active_.load(std::memory_order_relaxed)) return false;
    const bool on = clock() < until_.load(std::memory_order_relaxed);
    if (!on) active_.store(false, std::memory_order_relaxed);
    return on;
  }

  // A call took so long until now, of which each of its threads waited so long for threads that had lost their core;
  // `woke`: some of them had to be woken first, which is no fault of theirs.
  void judge(int64_t now, int64_t took, int64_t waited, bool woke) {
    if (waited <= (woke ? late : stall) || double(waited) <= stalled_share * double(took)) return;
    const int64_t since = now - until_.load(std::memory_order_relaxed), last = length_.load(std::memory_order_relaxed);
    if (since < 0) return;  // the call was under way, or its lease, before the retreat
    const int64_t length = since < last ? std::min(2 * last, longest) : shortest;
    length_.store(length, std::memory_order_relaxed);
    until_.store(now + length, std::memory_order_relaxed);
    active_.store(true, std::memory_order_relaxed);
  }

  static constexpr int64_t stall = 100;           // waiting for less in a call is never held against it
  static constexpr int64_t late = 500;            // likewise where threads were woken
  static constexpr double stalled_share = 0.25;   // of a call's time
  static constexpr int64_t shortest = 5000, longest = 320000;

 private:
  std::atomic<bool> active_{false};
  std::atomic<int64_t> until_{INT64_MIN / 2}, length_{0};
};

}  // namespace fusedrnn
