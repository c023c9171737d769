// The value type of the cells: their maths is written once on a type V that is cpu/simd.h's Vec on the CPU and Scalar
// here on the GPU and in tests. A bare float never stands for it: ADL must find fma, min, select and the rest.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define FUSEDRNN_HD __host__ __device__
#define FUSEDRNN_INLINE __forceinline__
#else
#define FUSEDRNN_HD
#define FUSEDRNN_INLINE inline __attribute__((always_inline))
#endif
#define FUSEDRNN_HD_INLINE FUSEDRNN_HD FUSEDRNN_INLINE

namespace fusedrnn {

// exponent_magic: 1.5 * 2^mantissa_bits + exponent bias. z = x + exponent_magic rounds x to an integer n (ties to even)
// and holds n + bias in its lowest bits; z - exponent_magic is n.
template <class T>
struct FloatFormat;

template <>
struct FloatFormat<float> {
  using Bits = uint32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr float exponent_magic = 12582912.0f + 127.0f;
};

template <>
struct FloatFormat<double> {
  using Bits = uint64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr double exponent_magic = 6755399441055744.0 + 1023.0;
};

// One overload per type, each a single instruction on the GPU but for the quotient.
namespace scalar {
FUSEDRNN_HD_INLINE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
FUSEDRNN_HD_INLINE double fma(double a, double b, double c) { return ::fma(a, b, c); }
FUSEDRNN_HD_INLINE float abs(float a) { return ::fabsf(a); }
FUSEDRNN_HD_INLINE double abs(double a) { return ::fabs(a); }
FUSEDRNN_HD_INLINE float copysign(float a, float s) { return ::copysignf(a, s); }
FUSEDRNN_HD_INLINE double copysign(double a, double s) { return ::copysign(a, s); }
FUSEDRNN_HD_INLINE double divide(double a, double b) { return a / b; }
// On a GPU an approximate reciprocal, then a correction: within 0.51 ulp wherever the quotient is normal, and without the
// branches that would keep the cells' divisions apart. b = Inf gives 0, as it should.
FUSEDRNN_HD_INLINE float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  const float scale = b > 0x1p125f ? 0.25f : 1.0f;  // 1 / b must be normal
  a *= scale, b *= scale;
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  const float q = a * inverse, corrected = ::fmaf(::fmaf(-b, q, a), inverse, q);
  return b <= 0x1p126f ? corrected : q;  // not Inf
#else
  return a / b;
#endif
}
}  // namespace scalar

// One lane, with Vec's interface; Vec documents the semantics. `quick`, where arrays have 16 bits: sigmoid and tanh may be less
// exact than float (cuda/quick_activations.cuh).
template <class T, bool quick = false>
struct Scalar {
  using value_type = T;
  using Mask = bool;
  static constexpr int lanes = 1;
  static constexpr bool has_fma = true;
  static constexpr T exponent_magic = FloatFormat<T>::exponent_magic;

  T r;

  Scalar() = default;
  FUSEDRNN_HD_INLINE explicit Scalar(T x) : r(x) {}

  static FUSEDRNN_HD_INLINE Scalar load(const T* p) { return Scalar(*p); }
  static FUSEDRNN_HD_INLINE Scalar load(const T* p, int n) { return Scalar(n > 0 ? *p : T(0)); }
  static FUSEDRNN_HD_INLINE Scalar broadcast(const T* p) { return Scalar(*p); }
  FUSEDRNN_HD_INLINE void store(T* p) const { *p = r; }
  FUSEDRNN_HD_INLINE void store(T* p, int n) const {
    if (n > 0) *p = r;
  }

  friend FUSEDRNN_HD_INLINE Scalar operator+(Scalar a, Scalar b) { return Scalar(a.r + b.r); }
  friend FUSEDRNN_HD_INLINE Scalar operator-(Scalar a, Scalar b) { return Scalar(a.r - b.r); }
  friend FUSEDRNN_HD_INLINE Scalar operator*(Scalar a, Scalar b) { return Scalar(a.r * b.r); }
  friend FUSEDRNN_HD_INLINE Scalar operator/(Scalar a, Scalar b) { return Scalar(scalar::divide(a.r, b.r)); }
  friend FUSEDRNN_HD_INLINE Scalar operator-(Scalar a) { return Scalar(-a.r); }
  FUSEDRNN_HD_INLINE Scalar& operator+=(Scalar b) { return *this = *this + b; }

  friend FUSEDRNN_HD_INLINE Mask operator<=(Scalar a, Scalar b) { return a.r <= b.r; }

  friend FUSEDRNN_HD_INLINE Scalar fma(Scalar a, Scalar b, Scalar c) { return Scalar(scalar::fma(a.r, b.r, c.r)); }
  friend FUSEDRNN_HD_INLINE Scalar fnma(Scalar a, Scalar b, Scalar c) { return Scalar(scalar::fma(-a.r, b.r, c.r)); }
  friend FUSEDRNN_HD_INLINE Scalar min(Scalar a, Scalar b) { return a.r < b.r ? a : b; }
  friend FUSEDRNN_HD_INLINE Scalar max(Scalar a, Scalar b) { return a.r > b.r ? a : b; }
  friend FUSEDRNN_HD_INLINE Scalar abs(Scalar a) { return Scalar(scalar::abs(a.r)); }
  friend FUSEDRNN_HD_INLINE Scalar copysign(Scalar a, Scalar s) { return Scalar(scalar::copysign(a.r, s.r)); }
  friend FUSEDRNN_HD_INLINE Scalar select(Mask m, Scalar a, Scalar b) { return m ? a : b; }
  friend FUSEDRNN_HD_INLINE Scalar first(Scalar v, int n) { return n > 0 ? v : Scalar(T(0)); }
  friend FUSEDRNN_HD_INLINE Scalar power_of_two(Scalar z) {
    typename FloatFormat<T>::Bits bits;
    memcpy(&bits, &z.r, sizeof bits);
    bits <<= FloatFormat<T>::mantissa_bits;
    memcpy(&z.r, &bits, sizeof bits);
    return z;
  }
};

}  // namespace fusedrnn
