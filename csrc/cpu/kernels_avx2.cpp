#define FUSEDRNN_TARGET avx2
#include "cpu/kernels_isa.h"
