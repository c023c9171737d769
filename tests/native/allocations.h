// Counts what the program allocates, on all threads.
#pragma once

#include <stdint.h>

#include <atomic>

namespace fusedrnn::tests {

struct Allocations {
  int64_t count, aligned_bytes;
};
Allocations allocations();          // so far
Allocations in_calls();            // those within fusedrnn_counted (problem.h), added up
extern std::atomic<bool> refuses;   // the next aligned one

}  // namespace fusedrnn::tests
