// The persistent kernels of bfloat16.
#include "cuda/persistent_launch.cuh"

namespace fusedrnn::cuda {
FUSEDRNN_PERSISTENT(__nv_bfloat16)
}  // namespace fusedrnn::cuda
