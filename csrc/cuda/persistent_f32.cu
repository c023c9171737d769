// The persistent kernels of float32, with TF32 too.
#include "cuda/persistent_launch.cuh"

namespace fusedrnn::cuda {
FUSEDRNN_PERSISTENT(float)
}  // namespace fusedrnn::cuda
