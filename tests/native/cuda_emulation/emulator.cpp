#include "emulator.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <mutex>
#include <numeric>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(EMULATED_RACES)
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() {
  // The shortest history, since there are thousands of threads. GCC 12's runtime reports a race also where it has no more
  // of it, as test_emulator and mutants showed; a later one may not.
  return "history_size=0:halt_on_error=1:abort_on_error=1";
}
#endif

namespace emulated {

Thread* current = nullptr;
Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

#if defined(EMULATED_RACES)
constexpr size_t stack_bytes = 32 << 10;
#else
constexpr size_t stack_bytes = 128 << 10;
#endif

// Saves what a function must preserve, and goes on on another stack.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" void emulated_switch(void** save, void* load);
asm(R"(
.text
.globl emulated_switch
.type emulated_switch, @function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulated_switch, .-emulated_switch
)");
void go(Context& from, Context& to) { emulated_switch(&from.stack_pointer, to.stack_pointer); }
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + stack_bytes);
  *--top = nullptr;  // as if entry had been called: its stack is 8 off a multiple of 16
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}
#else
struct Context {
  ucontext_t context;
};
void go(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = stack_bytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
#endif

// A fiber as ThreadSanitizer knows it, where it watches. To make one takes long, and it knows 8,128 at most: they are used
// again, by another launch where that is enough, since what one of them does is in order.
class Watched {
#if defined(EMULATED_RACES)
 public:
  Watched() {
    if (idle.empty() && made >= 6000) idle.swap(used);
    if (idle.empty()) idle.push_back(__tsan_create_fiber(0)), ++made;
    fiber = idle.back();
    idle.pop_back();
  }
  ~Watched() { used.push_back(fiber); }
  static void launch_ends() { idle.insert(idle.end(), used.begin(), used.end()), used.clear(); }
  void enter() const {
    host = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
  }
  static void leave() { __tsan_switch_to_fiber(host, __tsan_switch_to_fiber_no_sync); }

 private:
  static inline std::vector<void*> idle, used;
  static inline size_t made = 0;
  static inline void* host = nullptr;
  void* fiber;
#else
 public:
  static void launch_ends() {}
  void enter() const {}
  static void leave() {}
#endif
};

}  // namespace

struct Fiber {
  Thread thread;
  Context context;
  unsigned char* stack = nullptr;
  Fiber* next = nullptr;  // who waits for the same
  bool polls = false, done = false;
  bool meets_warp = false;               // what it last waited for was its warp
  bool (*ready)(const void*) = nullptr;  // what it polls for; null: it looks itself
  const void* what = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
#endif
  Watched watched;
};

namespace {

Context scheduler;
Fiber* running = nullptr;
std::vector<Fiber*> runnable;  // whoever may go on
std::deque<Fiber*> polling;    // in order, those who poll wait until nobody else can go on
const std::function<void()>* body = nullptr;
uint64_t seed = [] {
  const char* text = getenv("EMULATED_SEED");
  return text ? strtoull(text, nullptr, 10) : 0;
}();
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_size = 0;
#endif
const char launch_begins = 0, launch_ends = 0;

void to_scheduler() {
  Fiber* fiber = running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fiber->done ? nullptr : &fiber->fake, scheduler_stack, scheduler_size);
#endif
  Watched::leave();
  go(fiber->context, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber->fake, &scheduler_stack, &scheduler_size);
#endif
}

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  acquire(&launch_begins);
  (*body)();
  release(&launch_ends);
  running->done = true;
  to_scheduler();
  abort();
}

void resume(Fiber& fiber) {
  running = &fiber;
  current = &fiber.thread;
  threadIdx = fiber.thread.index, blockIdx = fiber.thread.block->index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake, fiber.stack, stack_bytes);
#endif
  fiber.watched.enter();
  go(scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
  running = nullptr;
  current = nullptr;
}

#if defined(EMULATED_RACES)
// Fresh memory to ThreadSanitizer, which knew another thread's otherwise.
constexpr uint64_t canary = 0x9d3b1f5ac0de7e57;
unsigned char* take_stack() {
  void* stack = malloc(stack_bytes);
  memcpy(stack, &canary, sizeof canary);
  return static_cast<unsigned char*>(stack);
}
void keep_stack(unsigned char* stack) {
  if (memcmp(stack, &canary, sizeof canary) != 0) {
    fprintf(stderr, "emulator: a thread's stack was too small\n");
    abort();
  }
  free(stack);
}
#else
// Stacks are kept: most of a launch's time would go into fresh pages.
std::vector<unsigned char*> stacks;
void keep_stack(unsigned char* stack) { stacks.push_back(stack); }
unsigned char* take_stack() {
  if (!stacks.empty()) {
    unsigned char* stack = stacks.back();
    stacks.pop_back();
    return stack;
  }
  void* stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) {
    fprintf(stderr, "emulator: no memory for another thread's stack\n");
    abort();
  }
  return static_cast<unsigned char*>(stack);
}
#endif

uint64_t random_bits() {
  seed += 0x9e3779b97f4a7c15u;
  uint64_t z = (seed ^ (seed >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// In a shuffled order, a warp also falls asleep now and then while others run many turns ahead of it: on its lanes'
// turns `asleep` counts down. Where only barriers keep the others from getting too far, one that is missing shows.
bool dozes(Warp& warp) {
  if (warp.asleep == 0 && random_bits() % 2048 == 0) warp.asleep = int(random_bits() % 1024);
  if (warp.asleep > 0) --warp.asleep;
  return warp.asleep > 0;
}

void let_run(Fiber* fiber) {
  if (fiber->polls && seed == 0)
    polling.push_back(fiber);
  else
    runnable.push_back(fiber);
}

// The last that could go on, so that a warp runs for as long as it can; in a shuffled order any.
Fiber* take() {
  if (runnable.empty()) {
    if (polling.empty()) return nullptr;
    Fiber* fiber = polling.front();
    polling.pop_front();
    return fiber;
  }
  if (seed != 0) std::swap(runnable[random_bits() % runnable.size()], runnable.back());
  Fiber* fiber = runnable.back();
  runnable.pop_back();
  return fiber;
}

// Runs the fibers until all are done.
void run(const char* name, std::vector<Fiber>& fibers) {
  const size_t n = fibers.size(), patience = 20000 * n;  // turns in which nothing but polling happened
  for (size_t i = n; i-- > 0;) let_run(&fibers[i]);
  for (size_t left = n, idle = 0; left > 0;) {
    Fiber* fiber = take();
    if (!fiber || idle > patience) {
      const size_t poll = runnable.size() + polling.size() + (fiber != nullptr);
      fprintf(stderr, "emulator: deadlock in %s: of %zu threads %zu are done, %zu wait at a barrier, %zu poll\n", name, n,
              n - left, left - poll, poll);
      abort();
    }
    if ((seed != 0 && dozes(*fiber->thread.warp)) || (fiber->ready && !fiber->ready(fiber->what))) {
      ++idle;
      let_run(fiber);
      continue;
    }
    if (fiber->polls && !fiber->ready)
      ++idle;
    else if (!fiber->meets_warp)  // a warp may poll together
      idle = 0;
    fiber->polls = fiber->meets_warp = false, fiber->ready = nullptr;
    resume(*fiber);
    if (fiber->done) --left, idle = 0;
  }
}

// Blocks [first, first + count) of the grid, alive at once.
void run_blocks(const char* name, const Configuration& c, size_t first, size_t count) {
  const Unwatched here;  // memory that the blocks of a launch have in turns is not the same to them
  const size_t threads = size_t(c.block.x) * c.block.y * c.block.z, warps = (threads + 31) / 32;
  const size_t cluster_size = size_t(c.cluster.x) * c.cluster.y * c.cluster.z;
  std::vector<Block> blocks(count);
  std::vector<Block*> pointers(count);
  std::vector<Cluster> clusters(count / cluster_size);
  const auto warp = std::make_unique<Warp[]>(count * warps);
  std::vector<Fiber> fibers(count * threads);
  for (size_t b = 0; b < count; ++b) {
    Block& block = blocks[b];
    pointers[b] = &block;
    // Clusters lie along x, as ours all do.
    const size_t number = first + b;
    block.index = Index(number % c.grid.x, number / c.grid.x % c.grid.y, number / c.grid.x / c.grid.y);
    block.meeting.size = int(threads);
    block.shared_bytes = c.shared;
    block.shared = static_cast<unsigned char*>(aligned_alloc(1024, (c.shared + 1024) / 1024 * 1024));
    memset(block.shared, 0xff, c.shared);
#if defined(__SANITIZE_ADDRESS__)
    block.shared = static_cast<unsigned char*>(realloc(block.shared, c.shared ? c.shared : 1));  // ends where it ends
    memset(block.shared, 0xff, c.shared);
#endif
    block.cluster = &clusters[b / cluster_size];
    block.rank = int(b % cluster_size);
    Cluster& cluster = *block.cluster;
    cluster.meeting.size = int(cluster_size * threads);
    cluster.blocks = &pointers[b / cluster_size * cluster_size];
    cluster.size = int(cluster_size), cluster.asked = c.clusters;
    for (size_t t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[b * threads + t];
      fiber.thread.index = Index(t % c.block.x, t / c.block.x % c.block.y, t / c.block.x / c.block.y);
      fiber.thread.lane = int(t % 32);
      fiber.thread.warp = &warp[b * warps + t / 32];
      ++fiber.thread.warp->meeting.size;
      fiber.thread.block = &block;
      fiber.stack = take_stack();
      prepare(fiber.context, fiber.stack, entry);
    }
  }
  run(name, fibers);
  for (Block& block : blocks) free(block.shared);
  for (Fiber& fiber : fibers) keep_stack(fiber.stack);
}

}  // namespace

void set_seed(uint64_t value) { seed = value; }
bool by_chance() { return seed != 0 && random_bits() % 2 == 0; }

void wait_until(bool (*ready)(const void*), const void* what) {
  if (ready(what)) return;
  running->ready = ready, running->what = what;
  yield();
}

void yield() {
  const Unwatched here;
  running->polls = true;
  let_run(running);
  to_scheduler();
}

void arrive(Meeting& meeting) {
  if (++meeting.arrived < meeting.size) return;
  meeting.arrived = 0;
  ++meeting.round;
  for (Fiber *fiber = meeting.waiting, *next; fiber; fiber = next) next = fiber->next, let_run(fiber);
  meeting.waiting = nullptr;
}

void wait(Meeting& meeting, uint64_t round) {
  if (meeting.round != round) return;
  running->meets_warp = meeting.size <= 32;
  running->next = meeting.waiting;
  meeting.waiting = running;
  to_scheduler();
}

void launch(const char* name, const Configuration& c, const std::function<void()>& kernel) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const size_t blocks = size_t(c.grid.x) * c.grid.y * c.grid.z, cluster = size_t(c.cluster.x) * c.cluster.y * c.cluster.z;
  release(&launch_begins);
  body = &kernel;
  blockDim = c.block, gridDim = c.grid;
  const size_t group = c.resident ? blocks : cluster, groups = blocks / group;
  // One at a time, in a shuffled order when threads are.
  size_t first = 0, step = 1;
  if (seed != 0 && groups > 1) {
    first = random_bits() % groups;
    do step = random_bits() % groups;
    while (std::gcd(step, groups) != 1);
  }
  for (size_t i = 0; i < groups; ++i) run_blocks(name, c, (first + i * step) % groups * group, group);
  acquire(&launch_ends);
  Watched::launch_ends();
}

}  // namespace emulated
