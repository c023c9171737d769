// CUDA threads on one CPU thread: each is a fiber that runs until it waits for others. It finds wrong indices, missing
// barriers and deadlocks of the kernels, and checks their values; it says nothing about time.
//
// A launch's blocks run one after the other. Those of a cluster are alive at once, as are all of a cooperative launch. Fresh
// device memory, shared memory included, holds NaN. With EMULATED_SEED in the environment, or set_seed, any of the fibers that
// can go on is the next, and any block or cluster that has not run, so that what depends on their order shows.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <functional>
#include <vector>

#include "races.h"

namespace emulated {

struct Index {
  unsigned x = 1, y = 1, z = 1;
  constexpr Index(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Where `size` threads meet.
struct Meeting {
  int size = 0, arrived = 0;
  uint64_t round = 0;
  struct Fiber* waiting = nullptr;  // those who wait for this round's end
};

struct Warp {
  Meeting meeting;
  int asleep = 0;  // turns of its threads that it lets go by
  alignas(16) unsigned char value[2][32][64];  // what each lane hands to the others: see exchange
};

struct Block;

struct Cluster {
  Meeting meeting;
  bool asked;  // the launch spoke of clusters: without that, not even one block is a cluster
  Block** blocks;
  int size;
};

struct Block {
  Meeting meeting;
  Cluster* cluster;
  int rank;  // in the cluster
  unsigned char* shared;
  size_t shared_bytes;
  Index index;
};

// What a thread copies without waiting comes when it waits; in a shuffled order, or at once.
struct Copy {
  unsigned char* to;
  const void* from;
  int bytes, commit;
};

struct Thread {
  Index index;
  int lane;
  Warp* warp;
  Block* block;
  std::vector<Copy> copies{};
  int commits = 0;
};

struct Configuration {
  Index grid, block, cluster;
  size_t shared = 0;
  bool resident = false;  // all blocks are alive at once
  bool clusters = false;  // it is a launch of clusters, if only of one block each
};

extern Thread* current;  // the thread that runs, null outside of a launch
extern Index threadIdx, blockIdx, blockDim, gridDim;  // its own

void launch(const char* name, const Configuration& configuration, const std::function<void()>& kernel);
void set_seed(uint64_t seed);  // 0: threads run in an order of the emulator's own
bool by_chance();  // never where they do

// Aborts with a message where a GPU would fault.
inline void require_aligned(uintptr_t at, size_t bytes) {
  if (at % bytes == 0) return;
  fprintf(stderr, "emulator: an access of %zu bytes that is not aligned\n", bytes);
  abort();
}

// Lets the others run, until `ready` says so. A launch all of whose threads wait for ever aborts with a message.
void wait_until(bool (*ready)(const void*), const void* what);
void yield();  // one turn; for loops that poll memory

void arrive(Meeting& meeting);  // without waiting; see wait
void wait(Meeting& meeting, uint64_t round);
inline void meet_in_no_order(Meeting& meeting) {
  const Unwatched here;
  const uint64_t round = meeting.round;
  arrive(meeting);
  wait(meeting, round);
}
// A barrier: what was done before it comes before what is done behind it.
inline void meet(Meeting& meeting) {
  const char* const round = reinterpret_cast<const char*>(&meeting) + meeting.round % 2;
  release(round);
  meet_in_no_order(meeting);
  acquire(round);
}

// Every lane hands over a value and calls use(values of all lanes), all of which are there. One meeting is enough, since the
// values of the next one lie elsewhere, and those of the one after it come when all lanes have read these.
template <class V, class Use>
inline auto exchange(const V& value, Use use) {
  static_assert(sizeof(V) <= 64, "raise Warp::value");
  const Unwatched here;
  Warp& warp = *current->warp;
  auto& values = warp.value[warp.meeting.round % 2];
  __builtin_memcpy(values[current->lane], &value, sizeof value);
  meet_in_no_order(warp.meeting);
  return use([&](int lane) {
    V v;
    __builtin_memcpy(&v, values[lane], sizeof v);
    return v;
  });
}

}  // namespace emulated
