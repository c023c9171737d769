// bfloat16 as CUDA has it: a float's upper half, rounded to nearest even.
#pragma once

#include <stdint.h>
#include <string.h>

struct __nv_bfloat16 {
  uint16_t bits;
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t b;
  memcpy(&b, &x, sizeof b);
  if ((b & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {uint16_t((b + 0x7fffu + (b >> 16 & 1)) >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t b = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &b, sizeof f);
  return f;
}
