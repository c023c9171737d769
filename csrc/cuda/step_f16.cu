// The step kernels of float16.
#include "cuda/step.cuh"

namespace fusedrnn::cuda {
FUSEDRNN_INSTANTIATE_STEPS(__half, __half)
}
