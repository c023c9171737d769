// Copies between arrays of any strides, for DeviceArray.
#include "cuda/strided.h"

#include <algorithm>

#include "cuda/check.h"
#include "cuda/device.cuh"

namespace fusedrnn::cuda {
namespace {

template <class Element>
__global__ void copy_kernel(StridedArray from, StridedArray to, Shape shape, int64_t count) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    int64_t rest = i, source = 0, target = 0;
    for (int axis = max_axes - 1; axis >= 0; --axis) {
      const int64_t at = rest % shape.size[axis];
      rest /= shape.size[axis];
      source += at * from.stride[axis];
      target += at * to.stride[axis];
    }
    reinterpret_cast<Element*>(to.data)[target] = reinterpret_cast<const Element*>(from.data)[source];
  }
}

}  // namespace

void copy_strided(const StridedArray& from, const StridedArray& to, const Shape& shape, size_t element, cudaStream_t stream) {
  const int64_t count = shape.count();
  if (count == 0) return;
  const auto kernel = element == 2 ? copy_kernel<uint16_t> : element == 4 ? copy_kernel<uint32_t> : copy_kernel<uint64_t>;
  Launch how{unsigned(std::min<int64_t>((count + 255) / 256, 4096)), 256};
  how.stream = stream;
  launch("copy_strided", how, kernel, from, to, shape, count);
}

}  // namespace fusedrnn::cuda
