// The step kernels of float32 with factors rounded to TF32.
#include "cuda/step.cuh"

namespace fusedrnn::cuda {
FUSEDRNN_INSTANTIATE_STEPS(float, Tf32)
}
