// All kernels of kernels_isa.h for x86-64-v4: AVX-512.
#define FUSEDRNN_TARGET avx512
#include "cpu/kernels_isa.h"
