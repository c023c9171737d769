// The extension module: registers, and nothing else.
#include "bindings/arrays.h"

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  m.doc() = "The compiled kernels of fusedrnn. Use the functions of fusedrnn itself, which check their arguments.";
  fusedrnn::bindings::register_stack(m);
  fusedrnn::bindings::register_stream(m);
  fusedrnn::bindings::register_machine(m);
}
