// Sigmoid, tanh and relu, and their derivatives from their outputs, on the cells' value type V (cells/value.h).
// No branches, no tables, no dependence on the flushing of denormals; at most 2 ulp wherever the result is normal.
//
// Both follow from one small even function, C(h) = h coth h, since exp(2h) = (C + h) / (C - h). With an integer n,
// s = 2^n and h in a short interval around 0:
//
//     sigmoid(x) = (C + h) / ((C + h) + (C - h) / s)                  x = 2h + n ln2
//     tanh(x)    = (s (C + h) - (C - h)) / (s (C + h) + (C - h))      x =  h + n ln2/2
//
// so the one division that each needs anyway serves the exponential too, and h damps the error of C in exp(2h).
#pragma once

#include "cells/value.h"

namespace fusedrnn {

// C(h) = 1 + c(0) h^2 + c(1) h^4 + ..., found by Remez exchange in 60 digits for the least relative error of h / C(h)
// on |h| <= 0.75 ln2/2, the range of tanh: 0.43 * 2^-24 for float, 0.002 * 2^-53 for double. For float, sigmoid has a
// c of its own, for the least relative error of exp(2h) on |h| <= ln2/4: 0.01 * 2^-24; its c(0) was then moved by
// 1.5e-6 of itself, where the greatest error over all floats is least.
// log2e and half_ln2 = ln(2)/2 are in two parts; half_ln2 is so short that n * half_ln2 is exact.
template <class T>
struct ActivationConstants;

template <>
struct ActivationConstants<float> {
  static constexpr int terms = 2;
  static FUSEDRNN_HD constexpr double sigmoid_c(int k) {
    return k == 0 ? 0.33333233455969133264 * (1 + 1.5e-6) : -0.022126957298844295362;
  }
  static FUSEDRNN_HD constexpr double tanh_c(int k) { return k == 0 ? 0.33332915267143201577 : -0.022023055873513864763; }
  static constexpr float log2e = 0x1.715476p+0f, log2e_low = 0x1.4ae0c0p-26f;
  static constexpr float half_ln2 = 0x1.62e4p-2f, half_ln2_low = 0x1.7f7d1cp-21f;
  static constexpr float sigmoid_min = -87.9f;  // n = -127: the denominator is Inf, the quotient 0
  static constexpr float sigmoid_max = 60.0f;   // 1 - sigmoid is far below 2^-54
  static constexpr float tanh_max = 9.1f;       // 1 - tanh < 2^-25
};

template <>
struct ActivationConstants<double> {
  static constexpr int terms = 6;
  static FUSEDRNN_HD constexpr double sigmoid_c(int k) { return tanh_c(k); }
  static FUSEDRNN_HD constexpr double tanh_c(int k) {
    constexpr double values[] = {0.33333333333333315613,     -0.022222222222171570665,  0.0021164021115829216916,
                                 -0.00021164000082079834981, 2.1373133413755158407e-05, -2.1134970096600648102e-06};
    return values[k];
  }
  static constexpr double log2e = 0x1.71547652b82fep+0, log2e_low = 0x1.777d0ffda0d24p-56;
  static constexpr double half_ln2 = 0x1.62e42fefa38p-2, half_ln2_low = 0x1.ef35793c7673p-46;
  static constexpr double sigmoid_min = -709.0;  // n = -1023
  static constexpr double sigmoid_max = 60.0;
  static constexpr double tanh_max = 19.1;  // 1 - tanh < 2^-54
};

enum class Sigmoidal { sigmoid, tanh };

// The coefficient of h^2k in C(h); for sigmoid that of f^2k in 2 log2(e) C, f = 2h log2(e).
template <class T, Sigmoidal function>
FUSEDRNN_HD constexpr T even_coefficient(int k) {
  using A = ActivationConstants<T>;
  if (function == Sigmoidal::tanh) return k == 0 ? T(1) : T(A::tanh_c(k - 1));
  const double unit = 2.0 * A::log2e;
  double value = k == 0 ? unit : unit * A::sigmoid_c(k - 1);
  for (int i = 0; i < k; ++i) value /= unit * unit;
  return T(value);
}

// The terms k and above of C over u^k, u = h^2 or f^2, by Horner's rule.
template <Sigmoidal function, int k = 0, class V>
FUSEDRNN_HD_INLINE V even_part(V u) {
  using T = typename V::value_type;
  constexpr T coefficient = even_coefficient<T, function>(k);
  if constexpr (k == ActivationConstants<T>::terms) {
    return V(coefficient);
  } else {
    return fma(even_part<function, k + 1>(u), u, V(coefficient));
  }
}

// 1 / (1 + exp(-x)).
template <class V>
FUSEDRNN_HD_INLINE V sigmoid(V x) {
  using T = typename V::value_type;
  using A = ActivationConstants<T>;
  x = max(V(A::sigmoid_min), min(V(A::sigmoid_max), x));
  const V z = fma(x, V(-A::log2e), V(V::exponent_magic));
  const V n = z - V(V::exponent_magic);
  const V inverse_s = power_of_two(z);
  // f = 2h log2(e) in [-1/2, 1/2]. In this unit C + f and C - f keep clear of powers of two, where rounding hurts most.
  V f;
  if constexpr (V::has_fma) {
    f = fma(x, V(A::log2e_low), fma(x, V(A::log2e), n));
  } else {
    f = (x + n * V(2 * A::half_ln2) + n * V(2 * A::half_ln2_low)) * V(A::log2e);
  }
  const V c = even_part<Sigmoidal::sigmoid>(f * f);
  const V numerator = c + f;
  const V twice = f + f;
  const V rest = numerator - twice;  // not c - f: what numerator was rounded by belongs to c, and is damped
  if constexpr (V::has_fma && sizeof(T) == 4) {
    return numerator / fma(inverse_s, rest, numerator);  // every float is within 2 ulp without the correction below
  } else {
    const V lost = (numerator - rest) - twice;
    return numerator / fma(inverse_s, rest, fma(inverse_s, lost, numerator));
  }
}

template <class V>
FUSEDRNN_HD_INLINE V tanh(V x) {
  using T = typename V::value_type;
  using A = ActivationConstants<T>;
  const V a = min(V(A::tanh_max), abs(x));
  // n = round(2a log2(e) - 1/4): rounding to nearest would cancel more in the numerator at the lower end of n = 1.
  constexpr T magic = V::exponent_magic - 1;  // gives s/2: half the numerator and denominator need fewer additions
  const V z = fma(a, V(2 * A::log2e), V(T(-0.25))) + V(magic);
  const V n = z - V(magic);
  const V half_s = power_of_two(z);
  V h;  // exactly a where n = 0, so that small x keep their relative accuracy
  if constexpr (V::has_fma) {
    h = fma(n, V(-(A::half_ln2 + A::half_ln2_low)), a);
  } else {
    h = a - n * V(A::half_ln2) - n * V(A::half_ln2_low);
  }
  const V c = even_part<Sigmoidal::tanh>(h * h);
  const V numerator = fma(c + h, half_s - V(T(0.5)), h);
  return copysign(numerator / (numerator + (c - h)), x);
}

template <class V>
FUSEDRNN_HD_INLINE V relu(V x) {
  return max(V(typename V::value_type(0)), x);
}

// The derivatives, from y = sigmoid(x), tanh(x), relu(x). relu's is 0 at 0, and 1 where y is NaN.
template <class V>
FUSEDRNN_HD_INLINE V sigmoid_grad(V y) {
  return y * (V(typename V::value_type(1)) - y);
}

template <class V>
FUSEDRNN_HD_INLINE V tanh_grad(V y) {
  return fnma(y, y, V(typename V::value_type(1)));
}

template <class V>
FUSEDRNN_HD_INLINE V relu_grad(V y) {
  using T = typename V::value_type;
  return select(y <= V(T(0)), V(T(0)), V(T(1)));
}

}  // namespace fusedrnn
