// float16 as CUDA has it, of the compiler's own type.
#pragma once

struct __half {
  _Float16 value;
  __half() = default;
  explicit __half(float x) : value(_Float16(x)) {}
};
inline __half __float2half_rn(float x) { return __half(x); }
inline float __half2float(__half x) { return float(x.value); }
