#include "cuda/persistent.cuh"

namespace fusedrnn::cuda {
FUSEDRNN_PERSISTENT(__half)
}  // namespace fusedrnn::cuda
