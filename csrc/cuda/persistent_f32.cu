#include "cuda/persistent_launch.cuh"

namespace fusedrnn::cuda {
FUSEDRNN_PERSISTENT(float)
}  // namespace fusedrnn::cuda
