// The persistent kernels of float16.
#include "cuda/persistent_launch.cuh"

namespace fusedrnn::cuda {
FUSEDRNN_PERSISTENT(__half)
}  // namespace fusedrnn::cuda
