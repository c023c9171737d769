// What the bindings of every device need.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>

#include "spec.h"

namespace fusedrnn::bindings {

namespace py = pybind11;

// Releases the GIL. A thread that outlives the interpreter is parked here, as Python 3.14 does itself: the pthread_exit
// of older ones would unwind through a destructor and abort the process.
class GilRelease {
 public:
  GilRelease() : state_(PyEval_SaveThread()) {}
  ~GilRelease() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* state_;
};

inline void expect(bool holds, const char* what) {
  if (!holds) throw std::logic_error(std::string("fusedrnn: ") + what);
}

inline Spec make_spec(const std::string& cell, int64_t I, int64_t H, int64_t L, int D, bool bias, bool reverse) {
  expect(I > 0 && H > 0 && L > 0 && (D == 1 || (D == 2 && !reverse)), "spec out of range");
  const int number = cell_named(cell.c_str());
  if (number < 0) throw std::invalid_argument("unknown cell '" + cell + "'");
  return {number, I, H, L, D, bias, reverse};
}

}  // namespace fusedrnn::bindings
