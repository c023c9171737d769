// The large products: input projections and the gradients of weights and inputs. They are cuBLASLt's, which is looked
// for when the first is needed, so that neither building nor importing needs it.
#pragma once

#include <stdint.h>

#include <string>

#include "cuda/dtype.h"

struct CUstream_st;

namespace fusedrnn::cuda {

// c (m, n) = a b, or c + a b; all row-major, with rows ld elements apart. Sums are of float32 (float64 for float64).
struct Product {
  DType factors, result;  // equal, or result is what factors accumulate in
  int64_t m, n, k;
  const void* a;  // (m, k), or (k, m) where a_transposed
  int64_t lda;
  bool a_transposed;
  const void* b;  // (k, n), or (n, k) where b_transposed
  int64_t ldb;
  bool b_transposed;
  void* c;
  int64_t ldc;
  bool adds;
  bool tf32;  // float32 factors may be rounded to TF32
};

// Throws std::runtime_error, which says what was tried and what to install, where no cuBLASLt works.
void multiply(const Product& product, int device, CUstream_st* stream);

void set_blas_path(const std::string& path);  // where to look first; before the first product
std::string blas_version();                   // "13.0.2"; throws as multiply does

}  // namespace fusedrnn::cuda
