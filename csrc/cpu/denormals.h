// Denormals cost some hundred cycles each on many cores and carry nothing that a recurrent state needs.
#pragma once

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fusedrnn {

// While it lives, this thread takes denormal operands for zero and rounds denormal results to zero.
class FlushDenormals {
 public:
  FlushDenormals() : before_(mode()) { set_mode(before_ | flush); }
  ~FlushDenormals() { set_mode(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint64_t flush = 0x8040;  // FTZ and DAZ
  static uint64_t mode() { return _mm_getcsr(); }
  static void set_mode(uint64_t mode) { _mm_setcsr(unsigned(mode)); }
#elif defined(__aarch64__)
  static constexpr uint64_t flush = uint64_t(1) << 24;  // FZ
  static uint64_t mode() {
    uint64_t fpcr;
    asm volatile("mrs %0, fpcr" : "=r"(fpcr));
    return fpcr;
  }
  static void set_mode(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#endif
  const uint64_t before_;
};

}  // namespace fusedrnn
