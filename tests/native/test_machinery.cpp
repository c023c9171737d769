// Memory, threads, barrier and fork: what the sequence loops stand on.
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <memory>
#include <new>
#include <stdexcept>
#include <thread>

#include "cpu/denormals.h"
#include "cpu/dispatch.h"
#include "cpu/retreat.h"
#include "cpu/threads.h"
#include "cpu/tuned_call.h"
#include "cpu/tuner.h"
#include "problem.h"

// fork() with threads alive is what is tested, and memory that cannot be had is an exception, not the end.
#define FUSEDRNN_SANITIZER_OPTIONS(function) extern "C" __attribute__((visibility("default"))) const char* function()
FUSEDRNN_SANITIZER_OPTIONS(__asan_default_options) { return "allocator_may_return_null=1"; }
FUSEDRNN_SANITIZER_OPTIONS(__tsan_default_options) { return "allocator_may_return_null=1:die_after_fork=0"; }

namespace fusedrnn::tests {
namespace {

template <class Error, class Work>
bool throws(Work work) {
  try {
    work();
  } catch (const Error&) {
    return true;
  }
  return false;
}

void test_memory() {
  const void* first;
  {
    const Buffer buffer(12345);
    first = buffer.data();
    check(buffer.bytes() == 12345 && uintptr_t(first) % 64 == 0, "a buffer is aligned to a line");
  }
  {
    Buffer again(12345), other(12345);
    check(again.data() == first && other.data() != first, "a freed buffer is taken again, once");
    Buffer moved(std::move(again));
    other = std::move(moved);
    check(other.data() == first, "moving keeps the memory");
  }
  {
    const Buffer large(size_t(5) << 20);
    check(uintptr_t(large.data()) % (size_t(2) << 20) == 0, "a large buffer is aligned to a huge page");
  }
  for (int i = 0; i < 40; ++i) Buffer(size_t(i + 1) << 12);  // more sizes than are kept
  check(throws<std::bad_alloc>([] { Buffer(SIZE_MAX - 8); }) && throws<std::bad_alloc>([] { Buffer(SIZE_MAX / 4); }),
        "memory that cannot be had is bad_alloc");
  check(checked_product({3, 0, 5}) == 0 && checked_product({int64_t(1) << 31, int64_t(1) << 31}) == size_t(1) << 62 &&
            throws<std::length_error>([] { checked_product({int64_t(1) << 32, int64_t(1) << 31}); }) &&
            throws<std::length_error>([] { checked_product({2, -1}); }),
        "checked_product");
  Arena arena;
  double *a = nullptr, *none = nullptr;
  float* b = nullptr;
  arena.want(&a, {5, 3});
  arena.want(&none, {0, 3});
  arena.want(&b, {9});
  arena.allocate();
  check(uintptr_t(a) % 64 == 0 && uintptr_t(b) % 64 == 0 && reinterpret_cast<double*>(b) >= a + 15 && none &&
            arena.bytes() >= 15 * 8 + 9 * 4,
        "an arena's arrays are aligned and apart");
  check(throws<std::length_error>([&] { arena.want(&a, {int64_t(1) << 62}); }), "an arena's size cannot overflow");
}

// Many short runs with barriers inside, by teams of changing size, some after the workers have parked. On a crowded
// machine the pool holds back for a while after a run that stalled, and a caller is alone.
void test_pool() {
  bool all_ran = true;
  std::atomic<bool> in_step{true};
  int teams[5] = {};
  for (int i = 0; i < 3000; ++i) {
    const int wanted = 4 - i % 4;  // the largest first: the pool then starts several workers at once
    if (i % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    Lease lease(wanted);
    const int size = lease.size();
    if (!check(size == wanted || size == 1, "a free pool gives what is asked for or nothing")) break;
    if (size != wanted) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    ++teams[size];
    Barrier barrier;
    barrier.reset(size, lease.crowded());
    std::vector<int> turns(size, 0);  // each written by its own rank, read by all
    std::vector<std::atomic<int>> runs(size);
    lease.run(size, [&](int rank) {
      ++runs[rank];
      for (int turn = 1; turn <= 3; ++turn) {
        turns[rank] = turn;
        barrier.wait(rank);
        for (int t : turns)
          if (t != turn) in_step = false;
        barrier.wait(rank);
      }
    });
    for (const auto& n : runs) all_ran = all_ran && n == 1;
  }
  check(all_ran, "every rank runs once");
  check(in_step, "nobody passes the barrier early");
  check(teams[2] > 0 && teams[3] > 0 && teams[4] > 0, "the pool serves teams of every size");
}

// Teams larger than this machine.
void test_large_barriers() {
  for (const int members : {5, 8, 9, 33, 64}) {
    Barrier barrier;
    barrier.reset(members, true);
    std::vector<std::atomic<int>> turns(members);
    std::atomic<bool> in_step{true};
    std::vector<std::thread> threads;
    for (int rank = 0; rank < members; ++rank)
      threads.emplace_back([&, rank] {
        for (int turn = 1; turn <= 5; ++turn) {
          turns[rank].store(turn, std::memory_order_relaxed);
          barrier.wait(rank);
          for (const auto& t : turns)
            if (t.load(std::memory_order_relaxed) != turn) in_step = false;
          barrier.wait(rank);
        }
      });
    for (std::thread& thread : threads) thread.join();
    check(in_step, "nobody passes a large barrier early");
  }
}

// A lease of two threads, as soon as the pool does not hold back.
std::unique_ptr<Lease> lease_two() {
  auto lease = std::make_unique<Lease>(2);
  for (int i = 0; i < 2000 && lease->size() != 2; ++i) {
    lease.reset();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    lease = std::make_unique<Lease>(2);
  }
  return lease;
}

#if defined(__linux__)
cpu_set_t affinity() {
  cpu_set_t set;
  CPU_ZERO(&set);
  sched_getaffinity(0, sizeof set, &set);
  return set;
}

cpu_set_t only(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  return set;
}

// As `taskset -apc` does to a process that runs.
void pin_all(const cpu_set_t& set) {
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task"))
    sched_setaffinity(std::stoi(task.path().filename().string()), sizeof set, &set);
}

void test_affinity() {
  const cpu_set_t all = affinity();
  if (CPU_COUNT(&all) < 2) return;
  cpu_set_t seen{};  // the second thread's, before `work`
  std::atomic<int> core{0};
  const auto run = [&](auto work) {
    const auto lease = lease_two();
    lease->run(lease->size(), [&](int rank) {
      if (rank == 0) return core.store(sched_getcpu());
      seen = affinity();
      work();
    });
    return lease->size() == 2;
  };
  bool both = true, left = false;
  for (int i = 0; i < 1000 && both && !left; ++i) {
    both = run([&] {  // goes where the caller is, free to go elsewhere
      const cpu_set_t one = only(core);
      sched_setaffinity(0, sizeof one, &one);
      sched_setaffinity(0, sizeof all, &all);
    });
    left = !CPU_EQUAL(&seen, &all);
  }
  check(both && left, "a thread leaves the core of another");
  const cpu_set_t one = only(sched_getcpu());
  pin_all(one);
  bool pinned = true;
  for (int i = 0; i < 2; ++i) pinned = run([] {}) && CPU_EQUAL(&seen, &one) && pinned;
  check(pinned, "but not the cores that the process was given since");
  pin_all(all);
}
#else
void test_affinity() {}
#endif

// The shape's work is worth several threads, so that callers do compete for the pool.
const Shape busy_shape{1, 6, 13, 11, 45, 2, 2};

void test_concurrent_callers() {
  const Problem<float> problem(busy_shape);
  const Arrays<float> want = forward(problem);
  {
    const auto lease = lease_two();
    const Lease second(2);
    check(lease->size() == 2 && second.size() == 1, "a caller that finds the pool busy is alone");
    set_local_threads(3);
    check(same_bits(want, forward(problem)), "a caller that finds the pool busy gets the same bits");
    set_local_threads(0);
  }
  std::vector<std::thread> callers;
  for (int n = 0; n < 4; ++n)
    callers.emplace_back([&] {
      Problem<float> own = problem;
      set_local_threads(3);
      const Arrays<float> trained = train(own);
      for (int i = 0; i < 8; ++i)
        check(same_bits(want, forward(own)) && same_bits(trained, train(own)), "concurrent callers get the same bits");
    });
  for (std::thread& t : callers) t.join();
}

void test_fork() {
  Problem<float> problem(busy_shape);
  set_local_threads(2);
  const Arrays<float> want = train(problem);  // the pool has threads now
  for (int i = 0; i < 3; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(60);
      _exit(same_bits(want, train(problem)) ? 0 : 1);
    }
    int status = -1;
    check(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0,
          "a forked child computes the same with threads of its own");
    check(same_bits(want, train(problem)), "the parent goes on after a fork");
  }
  set_local_threads(0);

  std::atomic<bool> done{false};
  std::thread other([&] {
    while (!done) Buffer(size_t(1) << 16);
  });
  bool ended = true;
  for (int i = 0; i < 50 && ended; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(10);
      Buffer(size_t(1) << 16);
      _exit(0);
    }
    int status = -1;
    ended = child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status);
  }
  done = true;
  other.join();
  check(ended, "a child forked while another thread allocates can allocate");
}

// What the tuner has settled on once steps with one thread and with several have taken so long for `steps` steps.
int settled(StepTuner& tuner, int64_t one, int64_t several, int steps) {
  for (int i = 0; i < steps; ++i) {
    const int64_t noise = i % 29 == 0 ? 50000 : i % 7;  // a time slice now and then
    tuner.took((tuner.choice() == 1 ? several : one) + noise);
  }
  while (tuner.trying()) tuner.took(tuner.choice() == 1 ? several : one);
  return tuner.choice();
}

void test_tuner() {
  StepTuner tuner;
  check(tuner.choice() == 0, "the first step is taken alone");
  check(settled(tuner, 3000, 2000, 500) == 1, "two threads that are faster are found");
  check(settled(tuner, 3000, 3200, 40000) == 0, "and left when they no longer are");
  check(settled(tuner, 3000, 2900, 80000) == 1, "and found again");
  StepTuner busy;
  int slow = 0;
  for (int i = 0; i < 10000; ++i) {
    slow += busy.choice();
    busy.took(busy.choice() == 1 ? 4000000 : 3000);
  }
  check(slow >= 1 && slow <= 3, "a trial of threads without a core ends after its first step");
}

void test_tuned_calls() {
  constexpr uint64_t kind = 1234567;
  const auto call = [&](uint64_t number, int model, std::chrono::microseconds several) {
    TunedCall tuned;
    const int choice = tuned.begin(number, model);
    const auto until = std::chrono::steady_clock::now() + (choice == 1 ? several : std::chrono::microseconds(0));
    while (std::chrono::steady_clock::now() < until) {}
    tuned.end(true);
    return choice;
  };
  const std::chrono::microseconds long_time(50), no_time(0);
  check(call(kind, 1, long_time) == 1, "the first call of a kind does as the model says");
  int last = 1;
  for (int i = 0; i < 100; ++i) last = call(kind, 1, long_time);
  check(last == 0, "and later ones what was faster");
  check(call(kind + 1, 1, no_time) == 1, "another kind is measured by itself");
  TunedCall outer;
  check(outer.begin(kind, 1) == 0, "a call holds its kind");
  check(call(kind, 1, no_time) == 1, "so that others do as the model says meanwhile");
  outer.end(false);
  check(call(kind + 256, 1, no_time) == 1 && call(kind, 1, no_time) == 0, "two kinds with the same first place are both known");
  constexpr uint64_t neighbour = (kind >> 8) % 256 + (3 << 16);  // its first place is kind's second one
  for (int i = 0; i < 100; ++i) last = call(neighbour, 1, long_time);
  TunedCall holds;
  holds.begin(kind, 1);
  call(kind, 1, no_time);
  holds.end(false);
  check(last == 0 && call(neighbour, 1, no_time) == 0, "a kind in use takes no other kind's place");
}

void test_retreat() {
  Retreat retreat;
  int64_t now = 1000000;
  const auto call = [&](int64_t waited, bool woke = false) {  // of 1 ms, to now
    retreat.judge([&] { return now; }, 1000, waited, woke);
  };
  const auto on = [&](int64_t after) { return retreat.on([&] { return now + after; }); };
  // Whether the retreat lasts for so many times the shortest from now on; then it is over.
  const auto lasts = [&](int64_t times) {
    const int64_t length = times * Retreat::shortest;
    const bool right = on(length - 1) && !on(length);
    now += length;
    return right;
  };
  call(Retreat::stall), call(240);
  check(!on(0), "short waits, and small shares of a call, make no retreat");
  call(Retreat::late, true);
  check(!on(0), "nor does the time in which threads are woken");
  call(300);
  check(lasts(1), "a stall does");
  call(300);
  check(lasts(2), "one soon after it makes one twice as long");
  call(Retreat::late + 1, true);
  check(lasts(4), "the next doubles it again");
  now += 4 * Retreat::shortest;
  call(300);
  check(lasts(1), "one that comes later starts over");
  for (int64_t times = 2; times * Retreat::shortest < Retreat::longest; times *= 2) call(300), lasts(times);
  call(300), check(lasts(Retreat::longest / Retreat::shortest), "the longest retreat is reached");
  call(300), check(lasts(Retreat::longest / Retreat::shortest), "and no retreat is longer");
}

void test_denormals() {
  volatile float tiny = 1e-40f;
  float inside[2] = {1, 1};
  {
    Lease lease(2);
    lease.run(lease.size(), [&](int rank) { inside[rank] = tiny + tiny; });
    check(inside[0] == 0 && (lease.size() == 1 || inside[1] == 0), "every thread of a team flushes denormals");
    lease.run(1, [&](int) { inside[0] = tiny + tiny; });
    check(inside[0] == 0, "so does a caller that runs alone");
  }
  check(tiny + tiny > 0, "and the caller's mode is as it was");
}

// The hash that hash.h describes, word by word.
template <class T>
uint64_t plain_hash(const std::vector<T>& w, int64_t rows, int64_t stride, int64_t columns, uint64_t place) {
  constexpr int64_t n = 8 / sizeof(T);  // elements of a word
  uint64_t sum = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < columns; k += n) {
      uint64_t word = 0;
      memcpy(&word, &w[r * stride + k], sizeof(T) * std::min(n, columns - k));
      const uint64_t key = (place + r * ceil_div(stride, n) + k / n + 1) * 0x9e3779b97f4a7c15u, keyed = word ^ key;
      sum += (keyed & 0xffffffffu) * (keyed >> 32) + word;
    }
  return sum;
}

template <class T>
void check_hash() {
  const auto hash = kernels<T>().hash;
  Random random(7);
  std::vector<T> w(5 * 61);
  for (T& v : w) v = T(random.normal());
  bool right = true;
  for (int64_t columns : {0, 1, 2, 15, 16, 17, 32, 47, 61})
    right = right && hash(w.data(), 5, 61, columns, 3) == plain_hash(w, 5, 61, columns, 3) &&
            hash(w.data(), 1, 0, columns, 3) == plain_hash(w, 1, 0, columns, 3);
  check(right, "the hash of rows of any length");
  check(hash(w.data(), 5, 60, 60, 3) == hash(w.data(), 5, 60, 44, 3) + hash(w.data() + 44, 5, 60, 16, 3 + 44 * sizeof(T) / 8),
        "the hash of a matrix is the sum of its pieces'");
  const uint64_t before = hash(w.data(), 5, 61, 61, 3);
  std::swap(w[100], w[102]);
  check(hash(w.data(), 5, 61, 61, 3) != before, "the hash tells places apart");
}

void test_hash() {
  check_hash<float>();
  check_hash<double>();
}

void test_cgroups() {
  namespace fs = std::filesystem;
  const fs::path root = fs::temp_directory_path() / ("fusedrnn_cgroup_" + std::to_string(getpid()));
  const auto write = [&](const char* path, const char* text) {
    fs::create_directories((root / path).parent_path());
    std::ofstream(root / path) << text;
  };
  const auto limit = [&] { return cgroup_limit(root.string()); };
  check(limit() == 0, "no cgroups, no limit");
  write("proc/self/cgroup", "1:name=x:/elsewhere\n0::/outer/inner\n");
  write("sys/fs/cgroup/outer/inner/cpu.max", "max 100000\n");
  check(limit() == 0, "no quota, no limit");
  write("sys/fs/cgroup/outer/cpu.max", "250000 100000\n");
  check(limit() == 3, "the quota of a group around it, rounded up");
  write("sys/fs/cgroup/outer/inner/cpu.max", "150000 100000\n");
  check(limit() == 2, "the least of them");
  fs::remove_all(root);
}

void test_settings() {
  check(available_threads() >= 1 && default_threads() >= 1, "there is a thread");
  const int before = default_threads();
  set_default_threads(5);
  check(default_threads() == 5 && wanted_threads() == 5, "the default number of threads");
  set_local_threads(2);
  std::thread([] { check(wanted_threads() == 5, "a thread's own number is its own"); }).join();
  check(wanted_threads() == 2, "a thread's own number goes before the default");
  set_local_threads(0);
  set_default_threads(before);
  bool found = false;
  for (const std::string& name : available_isas()) found = found || name == isa();
  check(found, "the ISA in use is one that the CPU has");
}

}  // namespace

void test_machinery(bool forks) {
  test_memory();
  test_settings();
  test_cgroups();
  test_hash();
  test_tuner();
  test_tuned_calls();
  test_retreat();
  test_denormals();
  test_pool();
  test_affinity();
  test_large_barriers();
  test_concurrent_callers();
  if (forks) test_fork();
}

}  // namespace fusedrnn::tests
