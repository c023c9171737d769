// What ThreadSanitizer must know to find races between CUDA threads: each fiber is a thread to it, in which only barriers and
// what releases and acquires put accesses in order. It then sees the memory of the kernels, shared and global, as
// compute-sanitizer's racecheck sees the shared one, and does not depend on the order in which the emulator runs threads.
// Shuffles and products of a warp put nothing in order, as on a GPU. Without ThreadSanitizer all of it is nothing.
#pragma once

#include <stddef.h>

#if defined(EMULATED_RACES)
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
void __tsan_read_range(void* from, unsigned long bytes);
void __tsan_write_range(void* to, unsigned long bytes);
}
#endif

namespace emulated {

// What a thread did before release(at) is before what another does after acquire(at).
inline void release([[maybe_unused]] const void* at) {
#if defined(EMULATED_RACES)
  __tsan_release(const_cast<void*>(at));
#endif
}
inline void acquire([[maybe_unused]] const void* at) {
#if defined(EMULATED_RACES)
  __tsan_acquire(const_cast<void*>(at));
#endif
}

// An access that happens elsewhere or later than the code that causes it.
inline void reads([[maybe_unused]] const void* from, [[maybe_unused]] size_t bytes) {
#if defined(EMULATED_RACES)
  __tsan_read_range(const_cast<void*>(from), bytes);
#endif
}
inline void writes([[maybe_unused]] void* to, [[maybe_unused]] size_t bytes) {
#if defined(EMULATED_RACES)
  __tsan_write_range(to, bytes);
#endif
}

// While it lives, what this thread accesses is the emulator's, or atomic.
struct Unwatched {
#if defined(EMULATED_RACES)
  Unwatched() { __tsan_ignore_thread_begin(); }
  ~Unwatched() { __tsan_ignore_thread_end(); }
#else
  Unwatched() {}
#endif
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

}  // namespace emulated
