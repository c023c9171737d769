// Which ISA's kernels this process uses: the best that the CPU has, or the one that FUSEDRNN_ISA names.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace fusedrnn {

std::vector<std::string> available_isas();  // those that this CPU has, best first
const std::string& isa();                   // the one in use; throws std::invalid_argument when FUSEDRNN_ISA is wrong

template <class T>
const Kernels<T>& kernels();

}  // namespace fusedrnn
