// The types of arrays on a GPU, as values and as C++ types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace fusedrnn::cuda {

enum class DType { float32, float64, float16, bfloat16 };

inline int64_t size_of(DType t) { return t == DType::float64 ? 8 : t == DType::float32 ? 4 : 2; }
inline const char* name_of(DType t) {
  constexpr const char* names[] = {"float32", "float64", "float16", "bfloat16"};
  return names[int(t)];
}

template <class T>
constexpr DType dtype_of = DType::float32;
template <>
constexpr DType dtype_of<double> = DType::float64;
template <>
constexpr DType dtype_of<__half> = DType::float16;
template <>
constexpr DType dtype_of<__nv_bfloat16> = DType::bfloat16;

// Calls f with a value of the C++ type, of which only the type matters.
template <class F>
auto with_type(DType t, F f) {
  switch (t) {
    case DType::float64:
      return f(double{});
    case DType::float16:
      return f(__half{});
    case DType::bfloat16:
      return f(__nv_bfloat16{});
    default:
      return f(float{});
  }
}

}  // namespace fusedrnn::cuda
