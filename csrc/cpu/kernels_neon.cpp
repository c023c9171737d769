#define FUSEDRNN_TARGET neon
#include "cpu/kernels_isa.h"
