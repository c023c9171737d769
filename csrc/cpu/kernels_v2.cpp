#define FUSEDRNN_TARGET v2
#include "cpu/kernels_isa.h"
