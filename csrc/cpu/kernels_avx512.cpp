#define FUSEDRNN_TARGET avx512
#include "cpu/kernels_isa.h"
