// The large products in plain loops.
#include <vector>

#include "cuda/blas.h"
#include "cuda/device.cuh"

namespace fusedrnn::cuda {

template <class T, class R>
static void loops(const Product& p) {
  const T *a = static_cast<const T*>(p.a), *b = static_cast<const T*>(p.b);
  R* c = static_cast<R*>(p.c);
  using S = Accumulate<T>;
  std::vector<S> row(p.n);
  for (int64_t i = 0; i < p.m; ++i) {
    for (int64_t j = 0; j < p.n; ++j) row[j] = p.adds ? S(widen(c[i * p.ldc + j])) : S(0);
    for (int64_t k = 0; k < p.k; ++k) {
      const S x = widen(p.a_transposed ? a[k * p.lda + i] : a[i * p.lda + k]);
      for (int64_t j = 0; j < p.n; ++j) row[j] += x * widen(p.b_transposed ? b[j * p.ldb + k] : b[k * p.ldb + j]);
    }
    for (int64_t j = 0; j < p.n; ++j) c[i * p.ldc + j] = narrow<R>(row[j]);
  }
}

void multiply(const Product& p, int, CUstream_st*) {
  with_type(p.factors, [&](auto t) {
    using T = decltype(t);
    if (p.result == p.factors)
      loops<T, T>(p);
    else
      loops<T, Accumulate<T>>(p);
  });
}

void set_blas_path(const std::string&) {}
std::string blas_version() { return "emulated"; }

}  // namespace fusedrnn::cuda
