// The vector type of the CPU kernels: Vec<float> and Vec<double>, one register of the ISA this file is compiled for.
// Who includes it has that ISA's flags and defines FUSEDRNN_TARGET: avx512, avx2, v2 (x86-64-v2) or neon.
// Everything stands in a namespace of that name and is inlined, so that the linker can never hand one ISA's code to
// another; for the same reason nothing here uses the C++ library.
#pragma once

#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push  // its own "undefined" operands warn once inlined (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cells/value.h"

#define FUSEDRNN_ISA_avx512 1
#define FUSEDRNN_ISA_avx2 2
#define FUSEDRNN_ISA_v2 3
#define FUSEDRNN_ISA_neon 4
#define FUSEDRNN_PASTE_(a, b) a##b
#define FUSEDRNN_PASTE(a, b) FUSEDRNN_PASTE_(a, b)
#define FUSEDRNN_ISA_ID FUSEDRNN_PASTE(FUSEDRNN_ISA_, FUSEDRNN_TARGET)
#define FUSEDRNN_STRING_(a) #a
#define FUSEDRNN_STRING(a) FUSEDRNN_STRING_(a)
#define FUSEDRNN_TARGET_NAME FUSEDRNN_STRING(FUSEDRNN_TARGET)

namespace fusedrnn::FUSEDRNN_TARGET {

// Native<T>: the register type, the same register as signed integers, and the operations that the compiler's vector
// extensions lack or translate poorly. min and max return b when the operands are equal; see Vec for NaN.
template <class T>
struct Native;

#if FUSEDRNN_ISA_ID == FUSEDRNN_ISA_avx512

template <>
struct Native<float> {
  using Reg = __m512;
  using Mask = __mmask16;
  typedef int32_t Int __attribute__((vector_size(64)));
  static FUSEDRNN_INLINE Mask head(int n) { return Mask((1u << n) - 1); }
  static FUSEDRNN_INLINE Reg set(float x) { return _mm512_set1_ps(x); }
  static FUSEDRNN_INLINE Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static FUSEDRNN_INLINE Reg load(const float* p, int n) { return _mm512_maskz_loadu_ps(head(n), p); }
  static FUSEDRNN_INLINE void store(float* p, Reg a) { _mm512_storeu_ps(p, a); }
  static FUSEDRNN_INLINE void store(float* p, Reg a, int n) { _mm512_mask_storeu_ps(p, head(n), a); }
  static FUSEDRNN_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static FUSEDRNN_INLINE Reg fnma(Reg a, Reg b, Reg c) { return _mm512_fnmadd_ps(a, b, c); }
  static FUSEDRNN_INLINE Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static FUSEDRNN_INLINE Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static FUSEDRNN_INLINE Reg select(Mask m, Reg a, Reg b) { return _mm512_mask_blend_ps(m, b, a); }
  static FUSEDRNN_INLINE Reg blend_bits(Int m, Reg a, Reg b) {
    return (Reg)_mm512_ternarylogic_epi32((__m512i)m, (__m512i)a, (__m512i)b, 0xCA);
  }
  static FUSEDRNN_INLINE Reg first(Reg a, int n) { return _mm512_maskz_mov_ps(head(n), a); }
  static FUSEDRNN_INLINE Mask less_equal(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
};

template <>
struct Native<double> {
  using Reg = __m512d;
  using Mask = __mmask8;
  typedef int64_t Int __attribute__((vector_size(64)));
  static FUSEDRNN_INLINE Mask head(int n) { return Mask((1u << n) - 1); }
  static FUSEDRNN_INLINE Reg set(double x) { return _mm512_set1_pd(x); }
  static FUSEDRNN_INLINE Reg load(const double* p) { return _mm512_loadu_pd(p); }
  static FUSEDRNN_INLINE Reg load(const double* p, int n) { return _mm512_maskz_loadu_pd(head(n), p); }
  static FUSEDRNN_INLINE void store(double* p, Reg a) { _mm512_storeu_pd(p, a); }
  static FUSEDRNN_INLINE void store(double* p, Reg a, int n) { _mm512_mask_storeu_pd(p, head(n), a); }
  static FUSEDRNN_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  static FUSEDRNN_INLINE Reg fnma(Reg a, Reg b, Reg c) { return _mm512_fnmadd_pd(a, b, c); }
  static FUSEDRNN_INLINE Reg min(Reg a, Reg b) { return _mm512_min_pd(a, b); }
  static FUSEDRNN_INLINE Reg max(Reg a, Reg b) { return _mm512_max_pd(a, b); }
  static FUSEDRNN_INLINE Reg select(Mask m, Reg a, Reg b) { return _mm512_mask_blend_pd(m, b, a); }
  static FUSEDRNN_INLINE Reg blend_bits(Int m, Reg a, Reg b) {
    return (Reg)_mm512_ternarylogic_epi64((__m512i)m, (__m512i)a, (__m512i)b, 0xCA);
  }
  static FUSEDRNN_INLINE Reg first(Reg a, int n) { return _mm512_maskz_mov_pd(head(n), a); }
  static FUSEDRNN_INLINE Mask less_equal(Reg a, Reg b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
};

#else  // masks are vectors of all-ones or all-zeros integers

#if FUSEDRNN_ISA_ID == FUSEDRNN_ISA_avx2

template <>
struct Native<float> {
  using Reg = __m256;
  typedef int32_t Int __attribute__((vector_size(32)));
  using Mask = Int;
  static FUSEDRNN_INLINE Mask head(int n) { return (Mask)(Int{0, 1, 2, 3, 4, 5, 6, 7} < n); }
  static FUSEDRNN_INLINE Reg set(float x) { return _mm256_set1_ps(x); }
  static FUSEDRNN_INLINE Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static FUSEDRNN_INLINE Reg load(const float* p, int n) { return _mm256_maskload_ps(p, (__m256i)head(n)); }
  static FUSEDRNN_INLINE void store(float* p, Reg a) { _mm256_storeu_ps(p, a); }
  static FUSEDRNN_INLINE void store(float* p, Reg a, int n) { _mm256_maskstore_ps(p, (__m256i)head(n), a); }
  static FUSEDRNN_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static FUSEDRNN_INLINE Reg fnma(Reg a, Reg b, Reg c) { return _mm256_fnmadd_ps(a, b, c); }
  static FUSEDRNN_INLINE Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static FUSEDRNN_INLINE Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
};

template <>
struct Native<double> {
  using Reg = __m256d;
  typedef int64_t Int __attribute__((vector_size(32)));
  using Mask = Int;
  static FUSEDRNN_INLINE Mask head(int n) { return (Mask)(Int{0, 1, 2, 3} < (int64_t)n); }
  static FUSEDRNN_INLINE Reg set(double x) { return _mm256_set1_pd(x); }
  static FUSEDRNN_INLINE Reg load(const double* p) { return _mm256_loadu_pd(p); }
  static FUSEDRNN_INLINE Reg load(const double* p, int n) { return _mm256_maskload_pd(p, (__m256i)head(n)); }
  static FUSEDRNN_INLINE void store(double* p, Reg a) { _mm256_storeu_pd(p, a); }
  static FUSEDRNN_INLINE void store(double* p, Reg a, int n) { _mm256_maskstore_pd(p, (__m256i)head(n), a); }
  static FUSEDRNN_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  static FUSEDRNN_INLINE Reg fnma(Reg a, Reg b, Reg c) { return _mm256_fnmadd_pd(a, b, c); }
  static FUSEDRNN_INLINE Reg min(Reg a, Reg b) { return _mm256_min_pd(a, b); }
  static FUSEDRNN_INLINE Reg max(Reg a, Reg b) { return _mm256_max_pd(a, b); }
};

#else  // 128-bit registers without masked memory access: lane by lane, in branches that cannot become a call to memcpy

template <class V>
struct PartialAccess {
  template <class T>
  static FUSEDRNN_INLINE auto load(const T* p, int n) {
    auto r = V::set(T(0));
    if (n > 0) r[0] = p[0];
    if (n > 1) r[1] = p[1];
    if constexpr (sizeof(r) / sizeof(T) == 4) {
      if (n > 2) r[2] = p[2];
      if (n > 3) r[3] = p[3];
    }
    return r;
  }
  template <class T, class R>
  static FUSEDRNN_INLINE void store(T* p, const R& r, int n) {
    if (n > 0) p[0] = r[0];
    if (n > 1) p[1] = r[1];
    if constexpr (sizeof(r) / sizeof(T) == 4) {
      if (n > 2) p[2] = r[2];
      if (n > 3) p[3] = r[3];
    }
  }
};

#if FUSEDRNN_ISA_ID == FUSEDRNN_ISA_v2

// x86-64-v2 has no FMA: fma() rounds twice there, and emulating it would cost more than the rounding does.
template <>
struct Native<float> : PartialAccess<Native<float>> {
  using Reg = __m128;
  typedef int32_t Int __attribute__((vector_size(16)));
  using Mask = Int;
  using PartialAccess::load;
  using PartialAccess::store;
  static FUSEDRNN_INLINE Mask head(int n) { return (Mask)(Int{0, 1, 2, 3} < n); }
  static FUSEDRNN_INLINE Reg set(float x) { return _mm_set1_ps(x); }
  static FUSEDRNN_INLINE Reg load(const float* p) { return _mm_loadu_ps(p); }
  static FUSEDRNN_INLINE void store(float* p, Reg a) { _mm_storeu_ps(p, a); }
  static FUSEDRNN_INLINE Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static FUSEDRNN_INLINE Reg fnma(Reg a, Reg b, Reg c) { return c - a * b; }
  static FUSEDRNN_INLINE Reg min(Reg a, Reg b) { return _mm_min_ps(a, b); }
  static FUSEDRNN_INLINE Reg max(Reg a, Reg b) { return _mm_max_ps(a, b); }
};

template <>
struct Native<double> : PartialAccess<Native<double>> {
  using Reg = __m128d;
  typedef int64_t Int __attribute__((vector_size(16)));
  using Mask = Int;
  using PartialAccess::load;
  using PartialAccess::store;
  static FUSEDRNN_INLINE Mask head(int n) { return (Mask)(Int{0, 1} < (int64_t)n); }
  static FUSEDRNN_INLINE Reg set(double x) { return _mm_set1_pd(x); }
  static FUSEDRNN_INLINE Reg load(const double* p) { return _mm_loadu_pd(p); }
  static FUSEDRNN_INLINE void store(double* p, Reg a) { _mm_storeu_pd(p, a); }
  static FUSEDRNN_INLINE Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static FUSEDRNN_INLINE Reg fnma(Reg a, Reg b, Reg c) { return c - a * b; }
  static FUSEDRNN_INLINE Reg min(Reg a, Reg b) { return _mm_min_pd(a, b); }
  static FUSEDRNN_INLINE Reg max(Reg a, Reg b) { return _mm_max_pd(a, b); }
};

#elif FUSEDRNN_ISA_ID == FUSEDRNN_ISA_neon

template <>
struct Native<float> : PartialAccess<Native<float>> {
  using Reg = float32x4_t;
  typedef int32_t Int __attribute__((vector_size(16)));
  using Mask = Int;
  using PartialAccess::load;
  using PartialAccess::store;
  static FUSEDRNN_INLINE Mask head(int n) { return (Mask)(Int{0, 1, 2, 3} < n); }
  static FUSEDRNN_INLINE Reg set(float x) { return vdupq_n_f32(x); }
  static FUSEDRNN_INLINE Reg load(const float* p) { return vld1q_f32(p); }
  static FUSEDRNN_INLINE void store(float* p, Reg a) { vst1q_f32(p, a); }
  static FUSEDRNN_INLINE Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  static FUSEDRNN_INLINE Reg fnma(Reg a, Reg b, Reg c) { return vfmsq_f32(c, a, b); }
  static FUSEDRNN_INLINE Reg min(Reg a, Reg b) { return vminq_f32(a, b); }
  static FUSEDRNN_INLINE Reg max(Reg a, Reg b) { return vmaxq_f32(a, b); }
};

template <>
struct Native<double> : PartialAccess<Native<double>> {
  using Reg = float64x2_t;
  typedef int64_t Int __attribute__((vector_size(16)));
  using Mask = Int;
  using PartialAccess::load;
  using PartialAccess::store;
  static FUSEDRNN_INLINE Mask head(int n) { return (Mask)(Int{0, 1} < (int64_t)n); }
  static FUSEDRNN_INLINE Reg set(double x) { return vdupq_n_f64(x); }
  static FUSEDRNN_INLINE Reg load(const double* p) { return vld1q_f64(p); }
  static FUSEDRNN_INLINE void store(double* p, Reg a) { vst1q_f64(p, a); }
  static FUSEDRNN_INLINE Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f64(c, a, b); }
  static FUSEDRNN_INLINE Reg fnma(Reg a, Reg b, Reg c) { return vfmsq_f64(c, a, b); }
  static FUSEDRNN_INLINE Reg min(Reg a, Reg b) { return vminq_f64(a, b); }
  static FUSEDRNN_INLINE Reg max(Reg a, Reg b) { return vmaxq_f64(a, b); }
};

#endif
#endif
#endif

// A register of `lanes` values of T. Memory may be unaligned. Every n is a number of lanes, 0 <= n <= lanes.
template <class T>
struct Vec {
  using value_type = T;
  using N = Native<T>;
  using Reg = typename N::Reg;
  using Int = typename N::Int;
  using Mask = typename N::Mask;
  static constexpr int lanes = sizeof(Reg) / sizeof(T);
  static constexpr bool has_fma = FUSEDRNN_ISA_ID != FUSEDRNN_ISA_v2;
  static constexpr T exponent_magic = FloatFormat<T>::exponent_magic;

  Reg r;

  Vec() = default;
  explicit FUSEDRNN_INLINE Vec(T x) : r(N::set(x)) {}

  static FUSEDRNN_INLINE Vec wrap(Reg r) {
    Vec v;
    v.r = r;
    return v;
  }
  static FUSEDRNN_INLINE Vec load(const T* p) { return wrap(N::load(p)); }
  // The first n lanes; the others are 0. Memory past p[n - 1] is not touched.
  static FUSEDRNN_INLINE Vec load(const T* p, int n) { return wrap(N::load(p, n)); }
  static FUSEDRNN_INLINE Vec broadcast(const T* p) { return wrap(N::set(*p)); }
  FUSEDRNN_INLINE void store(T* p) const { N::store(p, r); }
  FUSEDRNN_INLINE void store(T* p, int n) const { N::store(p, r, n); }

  friend FUSEDRNN_INLINE Vec operator+(Vec a, Vec b) { return wrap(a.r + b.r); }
  friend FUSEDRNN_INLINE Vec operator-(Vec a, Vec b) { return wrap(a.r - b.r); }
  friend FUSEDRNN_INLINE Vec operator*(Vec a, Vec b) { return wrap(a.r * b.r); }
  friend FUSEDRNN_INLINE Vec operator/(Vec a, Vec b) { return wrap(a.r / b.r); }
  friend FUSEDRNN_INLINE Vec operator-(Vec a) { return from_int(to_int(a) ^ sign_bit()); }
  FUSEDRNN_INLINE Vec& operator+=(Vec b) { return *this = *this + b; }

  // a*b + c with one rounding (two on x86-64-v2, which has no such instruction).
  friend FUSEDRNN_INLINE Vec fma(Vec a, Vec b, Vec c) { return wrap(N::fma(a.r, b.r, c.r)); }
  // c - a*b, rounded likewise.
  friend FUSEDRNN_INLINE Vec fnma(Vec a, Vec b, Vec c) { return wrap(N::fnma(a.r, b.r, c.r)); }
  // NaN when b is NaN; when only a is NaN, the result depends on the ISA. So a limit goes first: min(limit, x) keeps
  // x's NaN.
  friend FUSEDRNN_INLINE Vec min(Vec a, Vec b) { return wrap(N::min(a.r, b.r)); }
  friend FUSEDRNN_INLINE Vec max(Vec a, Vec b) { return wrap(N::max(a.r, b.r)); }
  // 2^n of z = n + exponent_magic, -bias <= n <= bias + 1: 0 at the lower end, Inf at the upper.
  friend FUSEDRNN_INLINE Vec power_of_two(Vec z) { return from_int(to_int(z) << FloatFormat<T>::mantissa_bits); }
  friend FUSEDRNN_INLINE Vec abs(Vec a) { return from_int(to_int(a) & ~sign_bit()); }

#if FUSEDRNN_ISA_ID == FUSEDRNN_ISA_avx512
  friend FUSEDRNN_INLINE Mask operator<=(Vec a, Vec b) { return N::less_equal(a.r, b.r); }
  friend FUSEDRNN_INLINE Vec copysign(Vec a, Vec s) { return wrap(N::blend_bits(sign_bit(), s.r, a.r)); }
  friend FUSEDRNN_INLINE Vec select(Mask m, Vec a, Vec b) { return wrap(N::select(m, a.r, b.r)); }
  friend FUSEDRNN_INLINE Vec first(Vec v, int n) { return wrap(N::first(v.r, n)); }
#else
  friend FUSEDRNN_INLINE Mask operator<=(Vec a, Vec b) { return (Mask)(a.r <= b.r); }
  friend FUSEDRNN_INLINE Vec copysign(Vec a, Vec s) { return from_int((to_int(a) & ~sign_bit()) | (to_int(s) & sign_bit())); }
  // Lane by lane a where m holds, else b.
  friend FUSEDRNN_INLINE Vec select(Mask m, Vec a, Vec b) { return wrap(m ? a.r : b.r); }
  // The first n lanes of v; the others are 0.
  friend FUSEDRNN_INLINE Vec first(Vec v, int n) { return from_int(to_int(v) & N::head(n)); }
#endif

 private:
  static FUSEDRNN_INLINE Int to_int(Vec a) { return (Int)a.r; }
  static FUSEDRNN_INLINE Vec from_int(Int a) { return wrap((Reg)a); }
  static FUSEDRNN_INLINE Int sign_bit() { return (Int)N::set(T(-0.0)); }
};

}  // namespace fusedrnn::FUSEDRNN_TARGET
