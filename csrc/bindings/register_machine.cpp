// Threads, ISA, build and the machine's own limits.
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <thread>

#include "bindings/arrays.h"
#include "cpu/dispatch.h"
#include "cpu/plan.h"
#include "cpu/threads.h"

namespace fusedrnn::bindings {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// A lease of all the threads asked for, where they are to be had within a second: a retreat or another caller passes.
void lease_all(std::optional<Lease>& lease, int threads) {
  for (int attempt = 0; attempt < 200; ++attempt) {
    lease.emplace(threads);
    if (lease->size() >= threads) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

// The highest rate of fused multiply-adds on `threads` threads at once, in GFLOP/s: the best of many short tries.
double fma_peak(const py::dtype& dtype, int threads) {
  const bool is_double = dtype.num() == py::dtype::of<double>().num();
  GilRelease release;
  const auto chain = is_double ? kernels<double>().fma_chain : kernels<float>().fma_chain;
  std::optional<Lease> held;
  lease_all(held, threads);
  Lease& lease = *held;
  double best = 0;
  for (int attempt = 0; attempt < 40; ++attempt) {
    std::vector<double> rates(lease.size());
    lease.run(lease.size(), [&](int rank) {
      auto start = Clock::now();
      double operations = chain(20000);
      rates[rank] = operations / seconds_since(start) * 1e-9;
    });
    double sum = 0;
    for (double r : rates) sum += r;
    best = std::max(best, sum);
  }
  return best;
}

// The rate at which `threads` threads read blocks of `bytes` each over and over, in GB/s, all together.
double stream_bandwidth(int threads, int64_t bytes) {
  GilRelease release;
  const auto read = kernels<float>().read;
  std::optional<Lease> held;
  lease_all(held, threads);
  Lease& lease = *held;
  const int n = lease.size();
  const int64_t piece = 8 * kernels<float>().lanes;  // elements that `read` takes at a time
  const int64_t count = std::max<int64_t>(bytes / 4 / piece, 1) * piece;
  const int64_t rounds = std::max<int64_t>(1, (int64_t(64) << 20) / (count * 4));
  std::vector<Buffer> buffers;
  for (int i = 0; i < n; ++i) {
    buffers.emplace_back(count * 4);
    memset(buffers[i].data(), 0, count * 4);
  }
  double best = 0;
  for (int attempt = 0; attempt < 8; ++attempt) {
    auto start = Clock::now();
    lease.run(n, [&](int rank) { read(static_cast<const float*>(buffers[rank].data()), count, rounds); });
    best = std::max(best, double(n) * double(count * 4) * double(rounds) / seconds_since(start) * 1e-9);
  }
  return best;
}

// An uninitialised array in a Buffer: large results need no fresh pages from the system in every call.
py::array empty(const py::tuple& sizes, const py::dtype& dtype) {
  std::vector<py::ssize_t> shape;
  for (py::handle n : sizes) shape.push_back(n.cast<py::ssize_t>());
  size_t bytes = size_t(dtype.itemsize());
  for (py::ssize_t n : shape)
    if (__builtin_mul_overflow(bytes, size_t(n), &bytes)) throw std::length_error("array size overflows");
  const py::object owner = py::cast(Buffer(bytes));
  return py::array(dtype, shape, owner.cast<const Buffer&>().data(), owner);
}

py::dict build_info() {
  py::dict info;
  info["version"] = FUSEDRNN_VERSION;
#if defined(__clang__)
  info["compiler"] = "Clang " __clang_version__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  return info;
}

}  // namespace

void register_machine(py::module_& m) {
  // numpy asks an array's owner whether it may be written.
  py::class_<Buffer>(m, "Buffer", py::buffer_protocol()).def_buffer([](Buffer& b) {
    return py::buffer_info(static_cast<unsigned char*>(b.data()), py::ssize_t(b.bytes()));
  });
  m.def("set_num_threads", &set_default_threads);
  m.def("get_num_threads", &default_threads);
  m.def("set_local_threads", &set_local_threads);
  m.def("available_threads", &available_threads);
  m.def("isa", [] { return isa(); });
  m.def("available_isas", [] {
    py::list names;
    for (const std::string& name : available_isas()) names.append(name);
    return names;
  });
  m.def("build_info", &build_info);
  m.def("empty", &empty, py::arg("shape"), py::arg("dtype"));
  m.def("fma_peak", &fma_peak, py::arg("dtype"), py::arg("threads"));
  m.def("stream_bandwidth", &stream_bandwidth, py::arg("threads"), py::arg("bytes"));
  m.def(
      "override_plan",
      [](int row_threads, int unit_threads, int64_t chunk_steps, int64_t chunk_rows, int teams, int64_t ranges, int fused,
         int prefetch) {
        set_plan_override({row_threads, unit_threads, chunk_steps, chunk_rows, teams, ranges, fused, prefetch});
      },
      py::arg("row_threads") = 0, py::arg("unit_threads") = 0, py::arg("chunk_steps") = 0, py::arg("chunk_rows") = 0,
      py::arg("teams") = 0, py::arg("ranges") = 0, py::arg("fused") = 0, py::arg("prefetch") = 0,
      "For tests: replaces what plans choose, where above 0. The results of a call do not depend on it.");
}

}  // namespace fusedrnn::bindings
