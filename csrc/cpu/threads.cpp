// The pool, its leases and its barriers; how many threads there may be. Knows nothing of layers.
#include "cpu/threads.h"

#include "cpu/denormals.h"
#include "cpu/retreat.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fusedrnn {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

constexpr int spins_before_yield = 4000;    // some 50 us
constexpr int most_threads = 1024;          // that may be asked for

std::atomic<int64_t> stalled_us{0};  // what the threads of this lease waited after their spins, added up
Retreat retreat;

int64_t now_us() { return std::chrono::duration_cast<microseconds>(Clock::now().time_since_epoch()).count(); }

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until done() holds; yields the core at once when `yields`, else only after a while.
template <class Done>
void spin_until(bool yields, Done done) {
  for (int i = yields ? spins_before_yield : 0; i < spins_before_yield; ++i) {
    if (done()) return;
    relax();
  }
  const int64_t start = now_us();
  while (!done()) sched_yield();
  if (!yields) stalled_us.fetch_add(now_us() - start, std::memory_order_relaxed);
}

// Two threads of a team on one core wait for each other's time slices, and the scheduler may leave them there for long.
// So every rank says where it runs, and one that finds itself on the core of a lower rank leaves it.
class Seats {
 public:
#if defined(__linux__)
  void take(int rank) {
    const int place = sched_getcpu() + 1;
    if (rank >= seats || place == 0) return;
    if (rank == 0 && caller_ != pthread_self()) caller_ = pthread_self();
    // Seldom written, so that every core keeps a copy of the line.
    if (place_[rank].load(std::memory_order_relaxed) != place) place_[rank].store(place, std::memory_order_relaxed);
    for (int r = 0; r < rank; ++r)
      if (place_[r].load(std::memory_order_relaxed) == place) return leave(rank);
  }

 private:
  void leave(int rank) {
    // Moves to a core, none of a lower rank's, that the caller may use or that others gave this thread, also one that it
    // left before. Asked for each time, since somebody may have changed either.
    static thread_local cpu_set_t given, taken;  // its affinity as others set it; as set here last
    cpu_set_t own, set;
    if (sched_getaffinity(0, sizeof own, &own) != 0 || pthread_getaffinity_np(caller_, sizeof set, &set) != 0) return;
    if (!CPU_EQUAL(&own, &taken)) given = own;
    CPU_OR(&set, &set, &given);
    for (int r = 0; r < rank; ++r) {
      const int cpu = place_[r].load(std::memory_order_relaxed) - 1;
      if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_CLR(cpu, &set);
    }
    if (CPU_COUNT(&set) > 0 && sched_setaffinity(0, sizeof set, &set) == 0) taken = set;
  }

  static constexpr int seats = 256;
  alignas(64) std::atomic<int> place_[seats] = {};  // the rank's CPU + 1; 0 before it first ran
  pthread_t caller_{};                              // rank 0, who waits for the others
#else
  void take(int) {}
#endif
};

// Lines that pass between a worker and who calls it: far cores take 200 ns for each, so there is one each way.
struct alignas(64) Worker {
  Job job;                               // written by the caller
  std::atomic<uint64_t> ticket{0};       // likewise: raised by one for each job
  alignas(64) std::atomic<uint64_t> done{0};  // the ticket of the last job that it has finished
  std::atomic<bool> parked{false};
  std::mutex mutex;
  std::condition_variable wake;
  std::thread thread;
};

class Pool {
 public:
  bool try_lock() { return !busy_.exchange(true, std::memory_order_acquire); }
  void unlock() { busy_.store(false, std::memory_order_release); }

  // Starts workers until there are `threads` with the caller; returns how many there are.
  int grow(int threads) {
    try {
      while (int(workers_.size()) < threads - 1) {
        workers_.push_back(std::make_unique<Worker>());
        int rank = int(workers_.size());
        Worker& w = *workers_.back();  // workers_ itself may move while the thread starts
        w.thread = std::thread([this, &w, rank] { serve(w, rank); });
      }
    } catch (const std::exception&) {  // no more threads or memory to be had: the threads that there are will do
      if (!workers_.empty() && !workers_.back()->thread.joinable()) workers_.pop_back();
    }
    return int(workers_.size()) + 1;
  }

  // True where some of the threads had to be woken.
  bool run(int threads, bool yields, const Job& job) {
    bool woke = false;
    seats_.take(0);
    for (int i = 0; i < threads - 1; ++i) {
      Worker& w = *workers_[i];
      w.job = job;
      w.ticket.fetch_add(1);  // sequentially consistent, against the worker's parked-then-look
      if (w.parked.load()) {
        std::lock_guard<std::mutex> lock(w.mutex);
        w.wake.notify_one();
        woke = true;
      }
    }
    job(0);
    for (int i = 0; i < threads - 1; ++i) {
      const Worker& w = *workers_[i];
      const uint64_t ticket = w.ticket.load(std::memory_order_relaxed);
      spin_until(yields, [&] { return w.done.load(std::memory_order_acquire) == ticket; });
    }
    return woke;
  }

 private:
  void serve(Worker& w, int rank) {
    const FlushDenormals flush;
    for (uint64_t seen = 0;;) {
      auto until = Clock::now() + spin_window;
      bool fresh = false;
      do {
        for (int i = 0; i < 64 && !fresh; ++i) {
          fresh = w.ticket.load(std::memory_order_acquire) != seen;
          if (!fresh) relax();
        }
      } while (!fresh && Clock::now() < until);
      if (!fresh) {
        std::unique_lock<std::mutex> lock(w.mutex);
        w.parked.store(true);
        w.wake.wait(lock, [&] { return w.ticket.load() != seen; });
        w.parked.store(false);
      }
      ++seen;
      seats_.take(rank);
      w.job(rank);
      w.done.store(seen, std::memory_order_release);
    }
  }

  std::atomic<bool> busy_{false};
  std::vector<std::unique_ptr<Worker>> workers_;
  Seats seats_;
};

std::atomic<Pool*> the_pool{nullptr};  // never destroyed: its threads may outlive static destruction

Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    the_pool = new Pool;
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] {
      the_pool = new Pool;
      stalled_us = 0;
    });
#endif
  });
  return *the_pool.load();
}

int positive(const char* text) {
  char* end = nullptr;
  long n = strtol(text, &end, 10);
  return end != text && *end == 0 && n >= 1 && n <= most_threads ? int(n) : 0;
}

std::atomic<int> process_threads{0};
thread_local int thread_threads = 0;

}  // namespace

void Barrier::reset(int members, bool yields) {
  members_ = members, yields_ = yields;
  if (members > room_ && members > 1) member_ = std::make_unique<Member[]>(members), room_ = members;
  for (int i = 0; i < room_; ++i) {
    member_[i].waits = 0;
    for (auto& round : member_[i].told) round.store(0, std::memory_order_relaxed);
  }
}

void Barrier::wait(int rank) {
  if (members_ == 1) return;
  Member& own = member_[rank];
  const uint32_t now = ++own.waits;
  for (int k = 0, distance = 1; distance < members_; ++k, distance *= 2) {
    const int next = rank + distance < members_ ? rank + distance : rank + distance - members_;
    member_[next].told[k].store(now, std::memory_order_release);
    // Who told us may have gone on to the next barrier already, and told us of that.
    spin_until(yields_, [&] { return int32_t(own.told[k].load(std::memory_order_acquire) - now) >= 0; });
  }
}

void Progress::wait_for(int64_t count) {
  spin_until(yields_, [&] { return count_.load(std::memory_order_acquire) >= count; });
}

void wait(Barrier* barrier, int rank) {
  if (barrier) barrier->wait(rank);
}

Barrier* barrier_at(Barrier* barriers, int i) { return barriers + i; }

int cgroup_limit(const std::string& root) {
  const auto read = [](const std::string& path, const char* format, double* a, double* b) {
    FILE* file = fopen(path.c_str(), "r");
    if (!file) return 0;
    int n = fscanf(file, format, a, b);
    fclose(file);
    return n;
  };
  double quota = 0, period = 0, unused = 0;
  std::string group;
  if (FILE* file = fopen((root + "/proc/self/cgroup").c_str(), "r")) {
    char line[512];
    while (fgets(line, sizeof line, file))
      if (strncmp(line, "0::", 3) == 0) group.assign(line + 3, strcspn(line + 3, "\n"));
    fclose(file);
  }
  int limit = 0;
  const auto add = [&] {
    const int n = int((quota + period - 1) / period);
    if (limit == 0 || n < limit) limit = n;
  };
  for (;; group.resize(group.rfind('/'))) {  // its own group's, and those of the groups around it
    if (read(root + "/sys/fs/cgroup" + group + "/cpu.max", "%lf %lf", &quota, &period) == 2 && period > 0) add();
    if (group.find('/') == group.npos) break;
  }
  const std::string v1 = root + "/sys/fs/cgroup/cpu/cpu.cfs_";
  if (limit == 0 && read(v1 + "quota_us", "%lf", &quota, &unused) == 1 && quota > 0 &&
      read(v1 + "period_us", "%lf", &period, &unused) == 1 && period > 0)
    add();
  return limit;
}

int available_threads() {
  static const int n = [] {
    int cores = int(std::thread::hardware_concurrency());
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) cores = CPU_COUNT(&set);
#endif
    int limit = cgroup_limit("");
    if (limit > 0 && limit < cores) cores = limit;
    return std::clamp(cores, 1, most_threads);
  }();
  return n;
}

int default_threads() {
  int n = process_threads.load(std::memory_order_relaxed);
  if (n > 0) return n;
  const char* text = getenv("FUSEDRNN_NUM_THREADS");
  n = available_threads();
  if (text && *text && (n = positive(text)) == 0)
    throw std::invalid_argument(std::string("FUSEDRNN_NUM_THREADS must be a number of threads from 1 to 1024, got '") + text +
                                "'");
  process_threads.store(n, std::memory_order_relaxed);
  return n;
}

void set_default_threads(int n) { process_threads.store(n, std::memory_order_relaxed); }
void set_local_threads(int n) { thread_threads = n; }
int wanted_threads() { return thread_threads > 0 ? thread_threads : default_threads(); }

Lease::Lease(int wanted) : size_(1) {
  if (wanted > 1 && !retreat.on(now_us) && pool().try_lock()) {
    size_ = pool().grow(wanted);
    if (size_ > wanted) size_ = wanted;
    if (size_ == 1) pool().unlock();
  }
}

Lease::~Lease() {
  if (size_ == 1) return;
  const int64_t stalled = stalled_us.load(std::memory_order_relaxed);
  if (stalled > 0) stalled_us.store(0, std::memory_order_relaxed);  // the threads that add to it are done
  retreat.judge(now_us, took_us_, stalled / (size_ - 1), woke_);
  pool().unlock();
}

void Lease::run_job(int threads, const Job& job) {
  const FlushDenormals flush;
  if (threads == 1) return job(0);
  const int64_t start = now_us();
  woke_ |= pool().run(threads, crowded(), job);
  took_us_ += now_us() - start;
}

}  // namespace fusedrnn
