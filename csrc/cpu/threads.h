// A small persistent pool of threads, and the barrier that its members meet at inside a time step.
//
// Workers spin for a short while after a call, because waking a parked thread costs more than a small layer does, then
// park. No thread exists before the first call that wants one. A caller that finds the pool busy runs alone. After a
// fork the child abandons the pool, whose threads it does not have, and starts its own.
#pragma once

#include <stdint.h>
#include <string.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <type_traits>

namespace fusedrnn {

// A rank's part of n.
struct Part {
  int64_t begin, end;
  Part(int64_t n, int rank, int threads) : begin(n * rank / threads), end(n * (rank + 1) / threads) {}
};

// What the threads of a lease are to do: a function of the rank, by value with what it captures, so that a job and the flag
// that it is there share a cache line. It must be small: capture by reference.
class Job {
 public:
  template <class Work>
  explicit Job(const Work& work) : call_([](const void* words, int rank) { (*static_cast<const Work*>(words))(rank); }) {
    static_assert(std::is_trivially_copyable_v<Work> && sizeof(Work) <= sizeof words_ && alignof(Work) <= alignof(void*));
    memcpy(words_, static_cast<const void*>(&work), sizeof work);
  }
  Job() = default;
  void operator()(int rank) const { call_(words_, rank); }

 private:
  void (*call_)(const void* words, int rank) = nullptr;
  alignas(void*) unsigned char words_[5 * sizeof(void*)] = {};
};

constexpr std::chrono::microseconds spin_window{200};  // how long a worker waits awake for the next call

// Meeting point of `members` threads with the ranks 0, 1, .., used again and again: a dissemination barrier (Hensgen,
// Finkel and Manber, 1988). In round k a member tells the one 2^k ranks on that it has come, and waits for word from the
// one 2^k ranks before, so that a line passes between two cores once a round, and two members need one round.
class alignas(64) Barrier {
 public:
  static int rounds(int members) {
    int n = 0;
    while ((1 << n) < members) ++n;
    return n;
  }

  void reset(int members, bool yields);
  void wait(int rank);

 private:
  static constexpr int most_rounds = 15;  // 32768 members
  struct alignas(64) Member {
    std::atomic<uint32_t> told[most_rounds] = {};  // by others
    alignas(64) uint32_t waits = 0;                // its own count, on a line that nobody else writes
  };
  std::unique_ptr<Member[]> member_;
  int members_ = 1, room_ = 0;
  bool yields_ = false;
};

// How far some threads have come, for others to wait on.
class alignas(64) Progress {
 public:
  void reset(bool yields) { count_.store(0, std::memory_order_relaxed), yields_ = yields; }
  void advance() { count_.fetch_add(1, std::memory_order_release); }
  void wait_for(int64_t count);

 private:
  std::atomic<int64_t> count_{0};
  bool yields_ = false;
};

void wait(Barrier* barrier, int rank);  // a null barrier has one member
Barrier* barrier_at(Barrier* barriers, int i);

// Threads that this process may use at once: affinity and cgroup limits, as they were when first asked for, at least 1.
int available_threads();

// The least CPU quota of this process's cgroup and of those around it, rounded up; 0 when there is none. `root`: of the file
// system, another one in tests.
int cgroup_limit(const std::string& root);

int default_threads();             // as set, else FUSEDRNN_NUM_THREADS (std::invalid_argument if wrong), else all available
void set_default_threads(int n);   // n >= 1
void set_local_threads(int n);     // of this thread; 0: the default holds
int wanted_threads();              // what the next call on this thread may use

// The right to use up to `wanted` threads at once; size() is what there is, and 1 when another caller has the pool.
class Lease {
 public:
  explicit Lease(int wanted);
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  int size() const { return size_; }
  bool woke() const { return woke_; }  // threads that were parked
  bool crowded() const { return size_ > available_threads(); }  // more threads than cores: waiting must yield
  // Calls work(rank) on each thread; returns when every rank has. Denormals are flushed in `work`, which must not throw.
  template <class Work>
  void run(int threads, const Work& work) {
    run_job(threads, Job(work));
  }

 private:
  void run_job(int threads, const Job& job);

  int size_;
  int64_t took_us_ = 0;  // by all runs of several threads
  bool woke_ = false;
};

}  // namespace fusedrnn
