// The step kernels of bfloat16.
#include "cuda/step.cuh"

namespace fusedrnn::cuda {
FUSEDRNN_INSTANTIATE_STEPS(__nv_bfloat16, __nv_bfloat16)
}
