// The step kernels of float64.
#include "cuda/step.cuh"

namespace fusedrnn::cuda {
FUSEDRNN_INSTANTIATE_STEPS(double, double)
}
