// All kernels of kernels_isa.h for x86-64-v2, the baseline: SSE4.2, without a fused multiply-add.
#define FUSEDRNN_TARGET v2
#include "cpu/kernels_isa.h"
