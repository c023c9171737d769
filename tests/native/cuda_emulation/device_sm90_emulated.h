// The twins of csrc/cuda/device_sm90.cuh, which says what each does.
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "emulator.h"

namespace fusedrnn::cuda {

inline float emulated_number(__half, uint32_t word, int part) {
  __half h;
  const uint16_t bits = uint16_t(word >> (16 * part));
  memcpy(&h, &bits, sizeof h);
  return __half2float(h);
}
inline float emulated_number(__nv_bfloat16, uint32_t word, int part) {
  return __bfloat162float({uint16_t(word >> (16 * part))});
}
inline float emulated_number(Tf32, uint32_t word, int) {
  word &= ~0x1fffu;  // the unit drops the bits that TF32 has not
  float f;
  memcpy(&f, &word, sizeof f);
  return f;
}

struct EmulatedFactors {
  uint32_t a[4], b[2];
};

template <class Number>
inline void mma(Number, float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  constexpr int parts = std::is_same_v<Number, Tf32> ? 1 : 2;
  const int g = emulated::current->lane / 4, q = emulated::current->lane % 4;
  emulated::exchange(EmulatedFactors{{a0, a1, a2, a3}, {b0, b1}}, [&](auto of_lane) {
    for (int k = 0; k < 4; ++k) {
      const EmulatedFactors a = of_lane(4 * g + k);
      for (int i = 0; i < 4; ++i) {
        const EmulatedFactors b = of_lane(4 * (2 * q + i % 2) + k);
        for (int half = 0; half < 2; ++half)
          for (int part = 0; part < parts; ++part)
            d[i] += emulated_number(Number(), a.a[2 * half + i / 2], part) * emulated_number(Number(), b.b[half], part);
      }
    }
    return 0;
  });
}
inline float as_float(uint32_t x) {
  float f;
  memcpy(&f, &x, sizeof f);
  return f;
}
inline uint32_t round_to_tf32(uint32_t x) { return (x & 0x7f800000u) == 0x7f800000u ? x : (x + 0x1000u) & ~0x1fffu; }

using SharedAddress = uint32_t;  // within the block's

inline SharedAddress shared_address(const void* p) {
  return SharedAddress(static_cast<const unsigned char*>(p) - emulated::current->block->shared);
}
template <class V>
inline V load_shared(SharedAddress at) {
  V v;
  emulated::require_aligned(at, alignof(V));
  memcpy(&v, emulated::current->block->shared + at, sizeof v);
  return v;
}
inline void load_shared_if(bool wanted, SharedAddress at, Words& w) {
  if (wanted) w = load_shared<Words>(at);
}
template <class V>
inline void store_shared(SharedAddress at, V v) {
  emulated::require_aligned(at, alignof(V));
  memcpy(emulated::current->block->shared + at, &v, sizeof v);
}
template <int bytes>
inline void copy_async(SharedAddress to, const void* from) {
  emulated::require_aligned(to | uintptr_t(from), bytes);
  emulated::Thread& thread = *emulated::current;
  emulated::reads(from, bytes);
  emulated::writes(thread.block->shared + to, bytes);
  if (emulated::by_chance())
    memcpy(thread.block->shared + to, from, bytes);
  else
    thread.copies.push_back({thread.block->shared + to, from, bytes, thread.commits});
}
inline void copy_async_or_zeros(SharedAddress to, const void* from, bool there) {
  static const Words zeros{};
  emulated::require_aligned(uintptr_t(from), 16);
  copy_async<16>(to, there ? from : &zeros);
}
inline void copy_async_commit() { ++emulated::current->commits; }
template <int pending>
inline void copy_async_wait() {
  emulated::Thread& thread = *emulated::current;
  auto copy = thread.copies.begin();
  for (; copy != thread.copies.end() && copy->commit < thread.commits - pending; ++copy)
    memcpy(copy->to, copy->from, size_t(copy->bytes));
  thread.copies.erase(thread.copies.begin(), copy);
}
inline int kept(int x) { return x; }
inline int pinned(int x, SharedAddress own) {
  store_shared(own, x);
  emulated::yield();
  return load_shared<int>(own);
}
inline float pick(bool first, float a, float b) { return first ? a : b; }
inline Words load_given(const void* p) {
  emulated::require_aligned(uintptr_t(p), 16);
  const emulated::Unwatched here;
  return *static_cast<const Words*>(p);
}
inline void store_given(void* p, Words v) {
  emulated::require_aligned(uintptr_t(p), 16);
  const emulated::Unwatched here;
  *static_cast<Words*>(p) = v;
}
inline void poll_pause() { emulated::yield(); }
inline unsigned load_count(const unsigned* p) {
  emulated::acquire(p);
  const emulated::Unwatched here;
  return *p;
}
inline void raise_count(unsigned* p) {
  emulated::release(p);
  const emulated::Unwatched here;
  ++*p;
}
inline int leading_lanes(bool has) {
  const int leading = emulated::exchange(has, [](auto of_lane) {
    int n = 0;
    while (n < 32 && of_lane(n)) ++n;
    return n;
  });
  emulated::meet(emulated::current->warp->meeting);
  return leading;
}

inline emulated::Cluster& emulated_cluster() {
  emulated::Cluster& cluster = *emulated::current->block->cluster;
  if (!cluster.asked) {
    fprintf(stderr, "emulator: an instruction of clusters in a launch without them\n");
    abort();
  }
  return cluster;
}
inline void sync_cluster() { emulated::meet(emulated_cluster().meeting); }

struct EmulatedBarrier {
  int32_t bytes;     // still to come; below 0 if they came before they were expected
  int16_t arrivals;  // still to come
  int16_t parity;    // of the phase that runs
};
static_assert(sizeof(EmulatedBarrier) == sizeof(uint64_t), "it takes the place of a barrier");

inline void emulated_turn(EmulatedBarrier& b) {
  if (b.arrivals == 0 && b.bytes == 0) b.arrivals = 1, b.parity ^= 1;
}
inline EmulatedBarrier& emulated_barrier(SharedAddress barrier) {
  return *reinterpret_cast<EmulatedBarrier*>(emulated::current->block->shared + barrier);
}

// What puts accesses in order in this phase of a barrier.
inline const void* emulated_phase(const EmulatedBarrier& b, int parity) { return reinterpret_cast<const char*>(&b) + parity; }

// Whoever uses a barrier, which may be many at once, comes after whoever has made it.
inline EmulatedBarrier& emulated_use(EmulatedBarrier& b) {
  emulated::reads(&b, sizeof b);
  return b;
}

inline void barrier_init(SharedAddress barrier) {
  EmulatedBarrier& b = emulated_barrier(barrier);
  emulated::writes(&b, sizeof b);
  const emulated::Unwatched here;
  b = {0, 1, 0};
}
inline void barrier_init_done() {}
inline void barrier_expect(SharedAddress barrier, unsigned bytes) {
  EmulatedBarrier& b = emulated_use(emulated_barrier(barrier));
  const emulated::Unwatched here;
  emulated::release(emulated_phase(b, b.parity));
  if (b.arrivals == 0) {
    fprintf(stderr, "emulator: a barrier got a second arrival in one phase\n");
    abort();
  }
  b.bytes += int(bytes), --b.arrivals;
  emulated_turn(b);
}
inline void barrier_wait(SharedAddress barrier, unsigned parity) {
  struct Awaited {
    const EmulatedBarrier* barrier;
    int parity;
  };
  const EmulatedBarrier& b = emulated_use(emulated_barrier(barrier));
  const emulated::Unwatched here;
  const Awaited awaited{&b, int(parity)};
  emulated::wait_until(
      [](const void* p) {
        const Awaited* a = static_cast<const Awaited*>(p);
        return a->barrier->parity != a->parity;
      },
      &awaited);
  emulated::acquire(emulated_phase(b, int(parity)));
}

inline void send(SharedAddress at, Words v, unsigned rank, SharedAddress barrier) {
  unsigned char* peer = emulated_cluster().blocks[rank]->shared;
  const bool same = [&] {  // what a block sends to itself is there already, and is read meanwhile
    const emulated::Unwatched here;
    return peer == emulated::current->block->shared && memcmp(peer + at, &v, sizeof v) == 0;
  }();
  if (!same) memcpy(peer + at, &v, sizeof v);
  EmulatedBarrier& b = emulated_use(*reinterpret_cast<EmulatedBarrier*>(peer + barrier));
  const emulated::Unwatched here;
  emulated::release(emulated_phase(b, b.parity));
  b.bytes -= 16;
  emulated_turn(b);
}

}  // namespace fusedrnn::cuda
