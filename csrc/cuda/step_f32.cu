// The step kernels of float32, without tensor cores.
#include "cuda/step.cuh"

namespace fusedrnn::cuda {
FUSEDRNN_INSTANTIATE_STEPS(float, float)
}
