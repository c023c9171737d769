// Vec, Scalar and the activations of one ISA against libm in a wider type: float over every bit pattern (about every
// N-th with --stride N), double over random points. Returns 1 on failure; the last line counts the checks.
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "cells/activations.h"
#include "cpu/simd.h"

namespace fusedrnn {
namespace {

using FUSEDRNN_TARGET::Vec;

int passed = 0, failed = 0;

void check(bool ok, const char* type, const char* what) {
  ++(ok ? passed : failed);
  if (!ok) printf("FAILED %s: %s\n", type, what);
}

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

uint64_t random_bits() {  // splitmix64
  static uint64_t state = 0;
  uint64_t z = (state += 0x9e3779b97f4a7c15);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

double random_unit() { return double(random_bits() >> 11) * 0x1p-53; }

// A function under test: its kernel, and its exact value in a type wider than the argument's.
struct Sigmoid {
  static constexpr const char* name = "sigmoid";
  static constexpr bool odd = false;
  template <class V>
  static V kernel(V x) {
    return sigmoid(x);
  }
  static double exact(double x) {
    if (fabs(x) < 0x1p-10) return 0.5 + x * (0.25 - x * x / 48);  // the sweep's time is spent here
    if (x > 40) return 1;
    const double e = exp(x);
    return e / (1 + e);
  }
  static long double exact(long double x) { return x < 0 ? expl(x) / (1 + expl(x)) : 1 / (1 + expl(-x)); }
};

struct Tanh {
  static constexpr const char* name = "tanh";
  static constexpr bool odd = true;
  template <class V>
  static V kernel(V x) {
    return tanh(x);
  }
  static double exact(double x) {
    if (fabs(x) < 0x1p-10) return x - x * x * x * (1.0 / 3 - x * x * (2.0 / 15));
    return fabs(x) > 20 ? ::copysign(1.0, x) : expm1(2 * x) / (expm1(2 * x) + 2);
  }
  static long double exact(long double x) { return tanhl(x); }
};

// The greatest error in ulp over normal results; faults where that says nothing: NaN, denormal results, odd symmetry.
template <class T>
struct Errors {
  double worst = 0;
  T where = 0;
  uint64_t faults = 0;
  T fault = 0;

  void fault_at(T x) {
    if (faults++ == 0) fault = x;
  }
  template <class R>
  void add(T x, T out, R exact) {
    constexpr T least_normal = sizeof(T) == 4 ? T(FLT_MIN) : T(DBL_MIN);
    if (x != x) {
      if (out == out) fault_at(x);
    } else if (fabs(double(exact)) < least_normal) {  // may be flushed
      const T size = exact < 0 ? -out : out;
      if (!(size >= 0 && size <= least_normal)) fault_at(x);
    } else {
      const double binade = bits_as<double>(bits_as<uint64_t>(double(exact)) & 0x7ff0000000000000);
      const double difference = double(R(out) - exact);
      const double ulp = fabs(difference / binade) / (sizeof(T) == 4 ? 0x1p-23 : 0x1p-52);
      if (!(ulp <= DBL_MAX)) fault_at(x);
      if (ulp > worst) worst = ulp, where = x;
    }
  }
};

constexpr int chunk = 4096;

// Whether a chunk of floats is clean and changes no maximum, by a loop that vectorises: most of the sweep ends here.
template <class F, class T>
bool within(double worst, const T* x, const T* out, const T* mirrored) {
  static double exact[2][chunk];
  for (int i = 0; i < chunk; ++i) exact[0][i] = F::exact(double(x[i]));
  for (int i = 0; i < chunk; ++i) exact[1][i] = F::odd ? -exact[0][i] : F::exact(-double(x[i]));
  int outside = 0;
  for (int k = 0; k < 2; ++k) {
    const T* const y = k == 0 ? out : mirrored;
    for (int i = 0; i < chunk; ++i) {
      const double binade = bits_as<double>(bits_as<uint64_t>(exact[k][i]) & 0x7ff0000000000000);
      outside |= !(fabs(double(y[i]) - exact[k][i]) <= worst * 0x1p-23 * binade);
    }
  }
  if (F::odd) {
    for (int i = 0; i < chunk; ++i) outside |= T(-out[i]) != mirrored[i];
  }
  return outside == 0;
}

// Evaluates F at x[i] and at -x[i].
template <class F, class V, class R>
void add_points(Errors<typename V::value_type>& errors, const typename V::value_type* x) {
  using T = typename V::value_type;
  static T out[chunk], mirrored[chunk];
  for (int i = 0; i < chunk; i += V::lanes) {
    const V v = V::load(x + i);
    F::kernel(v).store(out + i);
    F::kernel(-v).store(mirrored + i);
  }
  if (sizeof(T) == 4 && within<F>(errors.worst, x, out, mirrored)) return;
  for (int i = 0; i < chunk; ++i) {
    errors.add(x[i], out[i], F::exact(R(x[i])));
    if (!F::odd) {
      errors.add(T(-x[i]), mirrored[i], F::exact(R(-x[i])));
    } else if (x[i] == x[i] && memcmp(&(out[i] = -out[i]), &mirrored[i], sizeof(T)) != 0) {
      errors.fault_at(-x[i]);
    }
  }
}

template <class T>
void report(const Errors<T>& errors, const char* type, const char* what, double limit) {
  char text[200];
  printf("%-15s %-8s %.4f ulp at %.17g (%a)\n", type, what, errors.worst, double(errors.where), double(errors.where));
  snprintf(text, sizeof text, "%s is off by %.4f ulp at %a, more than %g", what, errors.worst, double(errors.where), limit);
  check(errors.worst <= limit, type, text);
  snprintf(text, sizeof text, "%s is wrong at %llu points, the first %a", what, (unsigned long long)errors.faults,
           double(errors.fault));
  check(errors.faults == 0, type, text);
}

template <class F, class V>
void sweep_float(const char* type, uint32_t stride) {
  static float x[chunk];
  Errors<float> errors;
  uint64_t bits = 0;
  while (bits < 0x80000000u) {
    for (int i = 0; i < chunk; ++i, bits += stride) x[i] = bits_as<float>(uint32_t(bits & 0x7fffffff));
    add_points<F, V, double>(errors, x);
  }
  report(errors, type, F::name, 2);
}

// A long double that is no wider than double brings an error of its own.
constexpr double double_limit = LDBL_MANT_DIG > DBL_MANT_DIG ? 2 : 3;

template <class F, class V>
void sample_double(const char* type, int count) {
  static double x[chunk];
  Errors<double> errors;
  for (int k = 0; k < count; k += chunk) {
    for (int i = 0; i < chunk; ++i) {
      switch (i % 4) {
        case 0:
          x[i] = random_unit() * 2;
          break;
        case 1:
          x[i] = random_unit() * 40;
          break;
        case 2:
          x[i] = random_unit() * 760;
          break;
        default:
          x[i] = fabs(bits_as<double>(random_bits()));  // any exponent, Inf and NaN too
      }
    }
    add_points<F, V, long double>(errors, x);
  }
  report(errors, type, F::name, double_limit);
}

template <class V>
typename V::value_type lane(V v, int i = 0) {
  typename V::value_type lanes[V::lanes];
  v.store(lanes);
  return lanes[i];
}

template <class V>
void special_values(const char* type) {
  using T = typename V::value_type;
  const T inf = T(INFINITY), nan = T(NAN), least = sizeof(T) == 4 ? T(FLT_TRUE_MIN) : T(DBL_TRUE_MIN);
  const auto same = [](V v, T expected) {
    T all[V::lanes];
    v.store(all);
    for (T x : all) {
      if (expected != expected ? x == x : memcmp(&x, &expected, sizeof x) != 0) return false;
    }
    return true;
  };
  check(same(sigmoid(V(T(0))), T(0.5)) && same(sigmoid(V(T(-0.0))), T(0.5)), type, "sigmoid(+-0) = 1/2");
  check(same(sigmoid(V(inf)), 1) && same(sigmoid(V(-inf)), 0), type, "sigmoid(+-Inf) = 1, 0");
  check(same(sigmoid(V(least)), T(0.5)) && same(sigmoid(V(-least)), T(0.5)), type, "sigmoid(denormal) = 1/2");
  check(same(tanh(V(T(0))), 0) && same(tanh(V(T(-0.0))), T(-0.0)), type, "tanh(+-0) = +-0");
  check(same(tanh(V(inf)), 1) && same(tanh(V(-inf)), -1), type, "tanh(+-Inf) = +-1");
  check(same(tanh(V(5 * least)), 5 * least) && same(tanh(V(-least)), -least), type, "tanh(denormal) is its argument");
  check(same(sigmoid(V(nan)), nan) && same(tanh(V(nan)), nan) && same(relu(V(nan)), nan), type, "NaN propagates");
  check(same(relu(V(T(3))), 3) && same(relu(V(T(-3))), 0) && same(relu(V(-inf)), 0), type, "relu");
  check(same(relu_grad(V(T(3))), 1) && same(relu_grad(V(T(0))), 0) && same(relu_grad(V(nan)), 1), type, "relu_grad");
  check(same(sigmoid_grad(V(T(0.25))), T(0.1875)) && same(sigmoid_grad(V(nan)), nan), type, "sigmoid_grad");
  check(same(tanh_grad(V(T(-0.5))), T(0.75)) && same(tanh_grad(V(nan)), nan), type, "tanh_grad");
}

template <class V>
void operations(const char* type) {
  using T = typename V::value_type;
  constexpr int lanes = V::lanes;
  T a[lanes], b[lanes], c[lanes];
  for (int i = 0; i < lanes; ++i) {  // exact in T, both signs
    a[i] = T(i - lanes / 2) + T(0.5);
    b[i] = T(i % 3) - 1;
    c[i] = T(0.25) * T(i + 1);
  }
  const V va = V::load(a), vb = V::load(b), vc = V::load(c);
  const auto each = [&](V v, auto expected, const char* what) {
    bool ok = true;
    for (int i = 0; i < lanes; ++i) ok = ok && lane(v, i) == expected(a[i], b[i], c[i]);
    check(ok, type, what);
  };
  V sum = va;
  sum += vb;
  each(va + vb, [](T a, T b, T) { return a + b; }, "+");
  each(sum, [](T a, T b, T) { return a + b; }, "+=");
  each(va - vb, [](T a, T b, T) { return a - b; }, "-");
  each(va * vb, [](T a, T b, T) { return a * b; }, "*");
  each(vb / vc, [](T, T b, T c) { return b / c; }, "/");
  each(-va, [](T a, T, T) { return -a; }, "unary -");
  each(fma(va, vb, vc), [](T a, T b, T c) { return a * b + c; }, "fma");
  each(fnma(va, vb, vc), [](T a, T b, T c) { return c - a * b; }, "fnma");
  each(min(va, vb), [](T a, T b, T) { return a < b ? a : b; }, "min");
  each(max(va, vb), [](T a, T b, T) { return a > b ? a : b; }, "max");
  each(abs(va), [](T a, T, T) { return T(::fabs(a)); }, "abs");
  each(copysign(vc, va), [](T a, T, T c) { return T(::copysign(c, a)); }, "copysign");
  each(power_of_two(vb + V(V::exponent_magic)), [](T, T b, T) { return T(::ldexp(1, int(b))); }, "power_of_two");
  each(select(va <= vb, va, vc), [](T a, T b, T c) { return a <= b ? a : c; }, "select <=");
  each(V::broadcast(a), [&](T, T, T) { return a[0]; }, "broadcast");
  check(signbit(lane(V(T(-0.0)))) && signbit(lane(-V(T(0)))), type, "the sign of zero");
  const T nan = T(NAN);
  const V limit(T(1)), not_a_number(nan);
  check(isnan(lane(min(limit, not_a_number))) && isnan(lane(max(limit, not_a_number))), type, "min and max keep b's NaN");
  check(lane(select(not_a_number <= limit, limit, -limit)) == -1 && lane(select(limit <= not_a_number, limit, -limit)) == -1,
        type, "NaN is not below anything");
  const T eps = sizeof(T) == 4 ? T(FLT_EPSILON) : T(DBL_EPSILON);
  const T residue = lane(fma(V(1 + eps), V(1 - eps), V(T(-1))));
  check(residue == (V::has_fma ? -eps * eps : 0), type, "fma rounds once where has_fma says so");
}

// [first, first + count) of T ends where the readable memory does, where the system can say so.
template <class T>
struct Fenced {
  T* first;
  Fenced(const T* values, int count) {
#if defined(__unix__) || defined(__APPLE__)
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    map = mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    size = 2 * page;
    char* const fence = static_cast<char*>(map) + page;
    if (map == MAP_FAILED || mprotect(fence, page, PROT_NONE) != 0) abort();
    first = reinterpret_cast<T*>(fence) - count;
#else
    first = map = static_cast<T*>(malloc(size_t(count) * sizeof(T)));
#endif
    for (int i = 0; i < count; ++i) first[i] = values[i];
  }
  Fenced(const Fenced&) = delete;
#if defined(__unix__) || defined(__APPLE__)
  ~Fenced() { munmap(map, size); }
  size_t size;
  void* map;
#else
  ~Fenced() { free(map); }
  T* map;
#endif
};

template <class V>
void partial_access(const char* type) {
  using T = typename V::value_type;
  constexpr int lanes = V::lanes;
  T values[lanes];
  for (int i = 0; i < lanes; ++i) values[i] = T(i + 1);
  bool loads = true, stores = true, guarded = true, heads = true;
  for (int n = 0; n <= lanes; ++n) {
    const Fenced<T> fenced(values, n);
    const V v = V::load(fenced.first, n), whole = V::load(values), head = first(whole, n);
    for (int i = 0; i < lanes; ++i) {
      loads = loads && lane(v, i) == (i < n ? values[i] : 0);
      heads = heads && lane(head, i) == (i < n ? values[i] : 0);
    }
    (-whole).store(fenced.first, n);  // touches nothing past the fence
    T guard[lanes + 2];
    for (T& x : guard) x = T(-77);
    whole.store(guard + 1, n);
    guarded = guarded && guard[0] == -77;
    for (int i = 0; i <= lanes; ++i) {
      stores = stores && (i >= n || (guard[i + 1] == values[i] && fenced.first[i] == -values[i]));
      guarded = guarded && (i < n || guard[i + 1] == -77);
    }
  }
  check(loads, type, "load(p, n)");
  check(stores, type, "store(p, n)");
  check(guarded, type, "store(p, n) leaves the rest alone");
  check(heads, type, "first(v, n)");
}

template <class F, class V>
void sweep(const char* type, uint32_t stride) {
  if constexpr (sizeof(typename V::value_type) == 4) {
    sweep_float<F, V>(type, stride);
  } else {
    sample_double<F, V>(type, int(4000000 / (stride < 50 ? 1 : stride / 50)));
  }
}

template <class V>
void test(const char* type, uint32_t stride) {
  operations<V>(type);
  partial_access<V>(type);
  special_values<V>(type);
  sweep<Sigmoid, V>(type, stride);
  sweep<Tanh, V>(type, stride);
}

int run(int argc, char** argv) {
  uint32_t stride = 1;
  if (argc == 3 && strcmp(argv[1], "--stride") == 0) {
    stride = uint32_t(strtoul(argv[2], nullptr, 10));
  } else if (argc != 1) {
    stride = 0;
  }
  if (stride < 1 || stride > 1000000) {
    fprintf(stderr, "usage: %s [--stride N], N from 1 to 1000000\n", argv[0]);
    return 2;
  }
  const uint32_t sparse = stride < 1009 ? 1009 : stride;
  printf("ISA %s, stride %u\n", FUSEDRNN_TARGET_NAME, stride);
  test<Vec<float>>("Vec<float>", stride);
  test<Vec<double>>("Vec<double>", stride);
  test<Scalar<float>>("Scalar<float>", sparse);
  test<Scalar<double>>("Scalar<double>", sparse);
#if defined(__x86_64__)
  const unsigned csr = _mm_getcsr();
  _mm_setcsr(csr | 0x8040);  // denormal results and arguments are zero
  sweep<Sigmoid, Vec<float>>("float, flushed", sparse);
  sweep<Tanh, Vec<float>>("float, flushed", sparse);
  sweep<Sigmoid, Vec<double>>("double, flushed", sparse);
  sweep<Tanh, Vec<double>>("double, flushed", sparse);
  _mm_setcsr(csr);
#endif
  printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}

}  // namespace
}  // namespace fusedrnn

int main(int argc, char** argv) { return fusedrnn::run(argc, argv); }
