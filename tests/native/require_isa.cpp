// Linked into a program that is compiled for one ISA, which FUSEDRNN_ISA names: ends it before main, with status 77,
// where this CPU lacks the ISA.
#include <stdio.h>
#include <unistd.h>

#include <stdexcept>

#include "cpu/dispatch.h"

namespace {

__attribute__((constructor)) void require_isa() {
  try {
    fusedrnn::isa();
  } catch (const std::invalid_argument& error) {
    fprintf(stderr, "%s\n", error.what());
    _exit(77);
  }
}

}  // namespace
