// Copies between arrays of any strides, in the memory of one device.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime.h>

namespace fusedrnn::cuda {

constexpr int max_axes = 4;

struct StridedArray {  // strides in elements; axes that are not needed come first and have size 1
  char* data;
  int64_t stride[max_axes];
};

struct Shape {
  int64_t size[max_axes];
  int64_t count() const { return size[0] * size[1] * size[2] * size[3]; }
};

// `to` may not overlap `from`, nor itself. Elements have 2, 4 or 8 bytes.
void copy_strided(const StridedArray& from, const StridedArray& to, const Shape& shape, size_t element, cudaStream_t stream);

}  // namespace fusedrnn::cuda
