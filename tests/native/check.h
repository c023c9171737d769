// Counting checks: the native tests need no framework.
#pragma once

#include <stdint.h>
#include <stdio.h>

#include <atomic>
#include <string>

namespace fusedrnn::tests {

inline std::atomic<int> passed{0}, failed{0};

inline bool check(bool ok, const std::string& what) {
  ++(ok ? passed : failed);
  if (!ok) fprintf(stderr, "FAILED %s\n", what.c_str());
  return ok;
}

// The same numbers on every machine: SplitMix64, and sums of twelve of its uniform values for N(0, 1).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double uniform() { return double(bits() >> 11) * 0x1p-53; }
  double normal() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }

 private:
  uint64_t state_;
};

void test_machinery(bool forks);  // memory, pool, barrier, fork: test_machinery.cpp
void test_allocations();          // test_allocations.cpp

}  // namespace fusedrnn::tests
