// All kernels of kernels_isa.h for x86-64-v3: AVX2 and FMA.
#define FUSEDRNN_TARGET avx2
#include "cpu/kernels_isa.h"
