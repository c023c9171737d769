#include "cuda/persistent.cuh"

namespace fusedrnn::cuda {
FUSEDRNN_PERSISTENT(float)
}  // namespace fusedrnn::cuda
