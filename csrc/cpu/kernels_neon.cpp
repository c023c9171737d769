// All kernels of kernels_isa.h for AArch64: NEON.
#define FUSEDRNN_TARGET neon
#include "cpu/kernels_isa.h"
