// The module of the GPU's kernels. Arrays come as NumPy arrays over the device's addresses ("shadows", _device_array.py):
// their pointers, shapes and strides are read here, and nobody reads what they point to.
#include <cuda_runtime.h>
#include <pthread.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <atomic>
#include <memory>
#include <optional>

#include "bindings/common.h"
#include "bindings/dlpack.h"
#include "cuda/blas.h"
#include "cuda/check.h"
#include "cuda/machine.h"
#include "cuda/memory.h"
#include "cuda/plan.h"
#include "cuda/stack.h"
#include "cuda/strided.h"

namespace fusedrnn::bindings {
namespace {

using cuda::DType;
using cuda::OnDevice;
using cuda::Stream;

Stream stream_of(uintptr_t handle) { return reinterpret_cast<Stream>(handle); }

// ---- Whether there is a GPU to work with

std::atomic<bool> initialised{false};

// CUDA does not survive a fork: a child that goes on with it would hang or crash.
const char forked_text[] =
    "this process was forked from one that had used the GPU, which CUDA does not support: start processes by "
    "multiprocessing's 'spawn' or 'forkserver', or use the GPU in the children only";

void expect_not_forked() {
  if (cuda::is_forked()) throw std::runtime_error(std::string("cuda: ") + forked_text);
}

std::string version_text(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

int device_count() {
  expect_not_forked();
  int devices = 0;
  const cudaError_t code = cudaGetDeviceCount(&devices);
  if (code == cudaErrorInsufficientDriver) {
    cudaGetLastError();
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (driver == 0) throw std::runtime_error("cuda: no NVIDIA driver was found on this machine");
    throw std::runtime_error("cuda: the NVIDIA driver supports CUDA " + version_text(driver) + ", but CUDA " +
                             version_text(runtime) + " or later is needed: update the driver");
  }
  if (code == cudaErrorNoDevice || (code == cudaSuccess && devices == 0)) {
    cudaGetLastError();
    throw std::runtime_error("cuda: the NVIDIA driver finds no GPU (CUDA_VISIBLE_DEVICES may hide it)");
  }
  if (code == cudaErrorInitializationError) {  // so also in a child whose parent used it through another library
    cudaGetLastError();
    throw std::runtime_error(std::string("cuda: CUDA cannot be initialised, as a rule because ") + forked_text);
  }
  cuda::check(code, "cudaGetDeviceCount");
  if (!initialised.exchange(true)) pthread_atfork(nullptr, nullptr, [] { cuda::set_forked(); });
  return devices;
}

void require_capable(int device) {
  expect_not_forked();
  const cuda::Machine machine = cuda::machine_of(device);
  if (!machine.is_capable())
    throw std::runtime_error("cuda: cuda:" + std::to_string(device) + ", " + machine.name + ", has compute capability " +
                             std::to_string(machine.major) + "." + std::to_string(machine.minor) +
                             ", but 8.0 or later is needed");
}

std::string description() {
  const int devices = device_count();
  int driver = 0, runtime = 0;
  FUSEDRNN_CUDA(cudaDriverGetVersion(&driver));
  FUSEDRNN_CUDA(cudaRuntimeGetVersion(&runtime));
  std::string text =
      "CUDA " + version_text(runtime) + " for " FUSEDRNN_CUDA_ARCHITECTURES "; driver for " + version_text(driver);
  for (int i = 0; i < devices; ++i) {
    const cuda::Machine m = cuda::named_machine(i);
    text += "; cuda:" + std::to_string(i) + " " + m.name + " (sm_" + std::to_string(10 * m.major + m.minor) + ", " +
            (m.is_capable() ? std::to_string(m.processors) + " processors)" : "too old)");
  }
  try {
    text += "; cuBLASLt " + cuda::blas_version();
  } catch (const std::runtime_error& error) {
    const std::string why = error.what();
    text += "; " + why.substr(0, why.find('\n'));
  }
  return text;
}

// ---- Memory

// A stream's handle as Python gives it. Who frees memory there later holds the object itself, which keeps the stream
// alive (_device_array.StreamHandle).
using StreamObject = py::int_;

uintptr_t handle_of(const StreamObject& stream) { return stream.cast<uintptr_t>(); }

// Memory of an array, from the pool that calls take theirs from.
class Buffer {
 public:
  Buffer(int device, const StreamObject& stream, size_t bytes) : stream_(stream), device_(device) {
    expect_not_forked();
    if (bytes == 0) return;
    OnDevice on(device);  // the legacy stream is the current device's
    arena_.want_bytes(&data_, int64_t(bytes));
    arena_.allocate(device, stream_of(handle_of(stream)));
  }
  ~Buffer() {
    if (!data_ || !used_elsewhere_ || cuda::is_forked()) return;
    std::optional<GilRelease> release;  // the GPU may wait for a function of Python's
    if (PyGILState_Check()) release.emplace();
    try {
      OnDevice on(device_);
      // What frees the memory is ordered on one stream only. It is never freed where CUDA will not wait, beside a capture.
      if (cudaDeviceSynchronize() != cudaSuccess) cudaGetLastError(), new cuda::Arena(std::move(arena_));
    } catch (const cuda::Error&) {  // a device that has failed runs nothing any more
    }
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data() const { return data_; }
  void set_used_elsewhere() {
    expect_not_forked();
    used_elsewhere_ = true;
  }

 private:
  StreamObject stream_;  // first, so that it goes last
  int device_;
  void* data_ = nullptr;
  std::atomic<bool> used_elsewhere_{false};
  cuda::Arena arena_;
};

py::array shadow(const py::object& owner, uintptr_t pointer, const std::vector<py::ssize_t>& shape,
                 const std::optional<std::vector<py::ssize_t>>& strides, const py::dtype& dtype, bool writeable) {
  py::array a(dtype, shape, strides.value_or(std::vector<py::ssize_t>()), reinterpret_cast<void*>(pointer), owner);
  if (!writeable) py::detail::array_proxy(a.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  return a;
}

py::tuple empty(int device, const StreamObject& stream, const std::vector<py::ssize_t>& shape, const py::dtype& dtype) {
  size_t bytes = size_t(dtype.itemsize());
  for (py::ssize_t n : shape)
    if (__builtin_mul_overflow(bytes, size_t(n), &bytes) || bytes > size_t(PTRDIFF_MAX))
      throw std::length_error("array size overflows");
  auto buffer = std::make_shared<Buffer>(device, stream, bytes);
  py::object owner = py::cast(buffer);
  return py::make_tuple(owner, shadow(owner, reinterpret_cast<uintptr_t>(buffer->data()), shape, std::nullopt, dtype, true));
}

void* pointer(const py::array& a) { return const_cast<void*>(a.data()); }

// What `waiter` does from now on happens after what `before` has been given to do.
void order_streams(int device, uintptr_t waiter, uintptr_t before) {
  expect_not_forked();
  OnDevice on(device);
  cudaEvent_t event;
  FUSEDRNN_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  cudaError_t code = cudaEventRecord(event, stream_of(before));
  if (code == cudaSuccess) code = cudaStreamWaitEvent(stream_of(waiter), event, 0);
  cudaEventDestroy(event);
  cuda::check(code, "the order of two streams");
}

void expect_no_capture(int device, uintptr_t stream) {
  expect_not_forked();
  OnDevice on(device);  // the legacy stream is the current device's
  cuda::expect_no_capture(stream_of(stream));
}

void synchronize(int device, uintptr_t stream) {
  expect_not_forked();
  GilRelease release;
  OnDevice on(device);
  FUSEDRNN_CUDA(cudaStreamSynchronize(stream_of(stream)));
}

void upload(int device, uintptr_t stream, const py::array& host, const py::array& to) {
  expect(host.nbytes() == to.nbytes() && (host.flags() & to.flags() & py::array::c_style), "upload must be C-contiguous");
  expect_not_forked();
  const void* const from = host.data();
  void* const into = pointer(to);
  const size_t bytes = size_t(host.nbytes());
  GilRelease release;
  OnDevice on(device);
  FUSEDRNN_CUDA(cudaMemcpyAsync(into, from, bytes, cudaMemcpyHostToDevice, stream_of(stream)));
  FUSEDRNN_CUDA(cudaStreamSynchronize(stream_of(stream)));  // the caller may write the host's array again
}

void download(int device, uintptr_t stream, const py::array& from, py::array& host) {
  expect(host.nbytes() == from.nbytes() && (host.flags() & from.flags() & py::array::c_style), "download must be C-contiguous");
  expect_not_forked();
  void* const into = host.mutable_data();
  const void* const source = pointer(from);
  const size_t bytes = size_t(host.nbytes());
  GilRelease release;
  OnDevice on(device);
  FUSEDRNN_CUDA(cudaMemcpyAsync(into, source, bytes, cudaMemcpyDeviceToHost, stream_of(stream)));
  FUSEDRNN_CUDA(cudaStreamSynchronize(stream_of(stream)));
}

int64_t elements(const py::array& a, py::ssize_t bytes) {
  if (bytes % a.itemsize() != 0) throw std::invalid_argument("an array on a GPU must have strides of whole elements");
  return bytes / a.itemsize();
}

void copy(int device, uintptr_t stream, const py::array& from, const py::array& to) {
  const int axes = int(to.ndim());
  expect(from.ndim() == axes && axes <= cuda::max_axes && from.itemsize() == to.itemsize(), "copy of another shape");
  expect_not_forked();
  cuda::Shape shape{{1, 1, 1, 1}};
  cuda::StridedArray source{static_cast<char*>(pointer(from)), {}}, target{static_cast<char*>(pointer(to)), {}};
  for (int i = 0; i < axes; ++i) {
    const int axis = cuda::max_axes - axes + i;
    expect(from.shape(i) == to.shape(i), "copy of another shape");
    shape.size[axis] = to.shape(i);
    if (to.shape(i) > 1)
      source.stride[axis] = elements(from, from.strides(i)), target.stride[axis] = elements(to, to.strides(i));
  }
  OnDevice on(device);
  if (to.size() == 0) return;
  if (from.flags() & to.flags() & py::array::c_style)
    FUSEDRNN_CUDA(cudaMemcpyAsync(target.data, source.data, size_t(to.nbytes()), cudaMemcpyDeviceToDevice, stream_of(stream)));
  else
    cuda::copy_strided(source, target, shape, size_t(to.itemsize()), stream_of(stream));
}

int device_of(uintptr_t address) {
  expect_not_forked();
  cudaPointerAttributes attributes{};
  FUSEDRNN_CUDA(cudaPointerGetAttributes(&attributes, reinterpret_cast<const void*>(address)));
  return address == 0 ? 0 : attributes.device;
}

// ---- Kernels

struct PySpec {
  Spec spec;
  DType dtype;
  py::ssize_t element;
};

PySpec make_typed_spec(const std::string& cell, const std::string& dtype, int64_t I, int64_t H, int64_t L, int D, bool bias,
                       bool reverse) {
  const struct {
    const char* name;
    DType dtype;
    py::ssize_t element;
  } known[] = {{"float32", DType::float32, 4},
               {"float64", DType::float64, 8},
               {"float16", DType::float16, 2},
               {"bfloat16", DType::bfloat16, 2}};
  for (const auto& row : known)
    if (dtype == row.name) return {make_spec(cell, I, H, L, D, bias, reverse), row.dtype, row.element};
  throw std::invalid_argument("unknown dtype '" + dtype + "'");
}

struct PyTape {
  StreamObject stream;  // first, so that it goes last
  std::shared_ptr<cuda::Tape> tape;
  cuda::Options options;
  int64_t T, B;
  std::atomic<int> passes{0};  // backward passes that are on their way, or have ended
  int64_t bytes() const { return cuda::tape_bytes(*tape); }
};

void* contiguous(const PySpec& s, const py::handle& object, int64_t n) {
  const auto a = py::reinterpret_borrow<py::array>(object);
  expect(a.itemsize() == s.element && (a.flags() & py::array::c_style) && a.size() == n,
         "array must be C-contiguous and of the right size");
  return pointer(a);
}

cuda::Sequence sequence(const PySpec& s, const py::object& object, int64_t T, int64_t B, int64_t width) {
  if (object.is_none()) return {};
  const auto a = py::reinterpret_borrow<py::array>(object);
  expect(a.itemsize() == s.element && a.ndim() == 3 && a.shape(0) == T && a.shape(1) == B && a.shape(2) == width,
         "sequence of the wrong shape");
  return {pointer(a), elements(a, a.strides(0)), elements(a, a.strides(1)), width > 1 ? elements(a, a.strides(2)) : 1};
}

template <class Pointer>
void states(const PySpec& s, const py::object& tuple, int64_t B, Pointer* out) {
  for (int i = 0; i < max_states; ++i) out[i] = nullptr;
  if (tuple.is_none()) return;
  const auto entries = py::reinterpret_borrow<py::tuple>(tuple);
  expect(int(entries.size()) == s.spec.info().states, "wrong number of states");
  for (int i = 0; i < s.spec.info().states; ++i)
    if (!entries[i].is_none()) out[i] = contiguous(s, entries[i], s.spec.count() * B * s.spec.H);
}

std::vector<cuda::Weights> weights(const PySpec& s, const py::object& tuple) {
  if (tuple.is_none()) return {};
  const Spec& spec = s.spec;
  const auto arrays = py::reinterpret_borrow<py::tuple>(tuple);
  const int64_t each = spec.bias ? 4 : 2, rows = spec.info().gates * spec.H;
  expect(int64_t(arrays.size()) == each * spec.count(), "wrong number of parameters");
  std::vector<cuda::Weights> out(spec.count());
  for (int64_t i = 0; i < spec.count(); ++i) {
    const auto at = [&](int64_t k, int64_t n) { return contiguous(s, arrays[each * i + k], n); };
    out[i] = {at(0, rows * spec.input_size(i / spec.D)), at(1, rows * spec.H), nullptr, nullptr};
    if (spec.bias) out[i].b_ih = at(2, rows), out[i].b_hh = at(3, rows);
  }
  return out;
}

void pack(const PySpec& s, int device, uintptr_t stream, const py::tuple& params, const py::array& panels) {
  require_capable(device);
  void* const into = contiguous(s, panels, cuda::panel_bytes(s.spec, s.dtype) / s.element);
  const std::vector<cuda::Weights> from = weights(s, params);
  GilRelease release;
  cuda::pack(s.spec, s.dtype, device, stream_of(stream), from, into);
}

std::unique_ptr<PyTape> forward(const PySpec& s, int device, const StreamObject& stream, bool tf32, const py::tuple& params,
                                const py::object& panels, const py::array& x, const py::object& state,
                                const py::object& lengths, const py::array& y, const py::tuple& state_out, bool training,
                                double dropout, uint64_t seed) {
  require_capable(device);
  const Spec& spec = s.spec;
  cuda::StackForward call{};
  call.spec = spec, call.dtype = s.dtype, call.options.tf32 = tf32;
  call.device = device, call.stream = stream_of(handle_of(stream));
  expect(x.ndim() == 3, "x must have three axes");
  call.T_ = x.shape(0), call.B = x.shape(1);
  call.weights = weights(s, params);
  if (!panels.is_none()) call.panels = contiguous(s, panels, cuda::panel_bytes(spec, s.dtype) / s.element);
  call.x = sequence(s, x, call.T_, call.B, spec.I);
  call.y = sequence(s, y, call.T_, call.B, spec.D * spec.H);
  states(s, state, call.B, call.state);
  states(s, state_out, call.B, call.final_state);
  for (int i = 0; i < spec.info().states; ++i) expect(call.final_state[i], "state_out must be whole");
  if (!lengths.is_none()) {
    const auto a = py::reinterpret_borrow<py::array_t<int64_t, py::array::c_style>>(lengths);
    expect(py::isinstance<py::array_t<int64_t, py::array::c_style>>(lengths) && a.size() == call.B, "lengths of another kind");
    call.lengths = a.data();
  }
  call.dropout = dropout, call.seed = seed;
  std::shared_ptr<cuda::Tape> tape;
  {
    GilRelease release;
    tape = cuda::run_forward(call, training);
  }
  if (!training) return nullptr;
  return std::unique_ptr<PyTape>(new PyTape{stream, std::move(tape), call.options, call.T_, call.B});
}

void backward(const PySpec& s, int device, uintptr_t stream, const py::tuple& params, PyTape& tape, const py::array& x,
              const py::object& dy, const py::object& dstate, const py::object& dx, const py::object& dstate_out,
              const py::object& dparams, bool accumulate) {
  expect_not_forked();
  const Spec& spec = s.spec;
  cuda::StackBackward call{};
  call.spec = spec, call.dtype = s.dtype, call.options = tape.options;
  call.device = device, call.stream = stream_of(stream);
  call.weights = weights(s, params);
  call.tape = tape.tape.get();
  call.x = sequence(s, x, tape.T, tape.B, spec.I);
  call.dy = sequence(s, dy, tape.T, tape.B, spec.D * spec.H);
  call.dx = sequence(s, dx, tape.T, tape.B, spec.I);
  states(s, dstate, tape.B, call.dfinal_state);
  states(s, dstate_out, tape.B, call.dstate);
  call.dweights = weights(s, dparams);
  call.adds = accumulate;
  {
    GilRelease release;
    cuda::run_backward(call);
  }
  ++tape.passes;
}

}  // namespace
}  // namespace fusedrnn::bindings

PYBIND11_MODULE(_cuda, m, pybind11::mod_gil_not_used()) {
  namespace py = pybind11;
  using namespace fusedrnn;
  using namespace fusedrnn::bindings;
  m.doc() = "The GPU's kernels of fusedrnn. Use the functions of fusedrnn itself, which check their arguments.";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const cuda::OutOfMemory& error) {
      PyErr_SetString(PyExc_MemoryError, error.what());
    } catch (const cuda::AddedInPart& error) {
      PyObject* const kind = error.out_of_memory ? PyExc_MemoryError : PyExc_RuntimeError;
      py::object made = py::reinterpret_borrow<py::object>(kind)(error.what());
      made.attr("added_in_part") = true;  // _device_stack.py asks for it
      PyErr_SetObject(kind, made.ptr());
    }
  });
#if defined(FUSEDRNN_EMULATED)
  m.attr("EMULATED") = true;
  m.def("fault_after", &emulated::fault_after, py::arg("launches"), "For tests: see emulation's cuda_runtime.h.");
#else
  m.attr("EMULATED") = false;
#endif
  m.attr("ARCHITECTURES") = FUSEDRNN_CUDA_ARCHITECTURES;
  m.def("device_count", &device_count);
  m.def("expect_not_forked", &expect_not_forked);
  m.def("expect_no_capture", &expect_no_capture, py::arg("device"), py::arg("stream"));
  m.def("require_capable", &require_capable, py::arg("device"));
  m.def("current_device", [] {
    expect_not_forked();
    int device = 0;
    FUSEDRNN_CUDA(cudaGetDevice(&device));
    return device;
  });
  m.def("description", &description);
  m.def("synchronize", &synchronize, py::arg("device"), py::arg("stream"));
  m.def("override_path", &cuda::set_path_override, py::arg("path"),
        "For tests: 0 makes layers run step by step, 1 persistently where they can, -1 as planned.");
  m.def("override_projected", &cuda::set_projected_override, py::arg("when"),
        "For tests and measurements: where it can be, the input is projected 0 before the recurrence, 1 that of later steps "
        "beside the first ones, 2 within its launch, -1 as planned.");
  m.def(
      "plan",
      [](const fusedrnn::bindings::PySpec& s, int device, bool tf32, bool backward, int64_t T, int64_t B) {
        require_capable(device);
        return cuda::describe(
            cuda::layer_plan(s.spec.info(), s.dtype, backward, s.spec.H, B, T * B, tf32, s.spec.D, cuda::machine_of(device)));
      },
      py::arg("spec"), py::arg("device"), py::arg("tf32"), py::arg("backward"), py::arg("T"), py::arg("B"),
      "What a layer would run as, and why.");
  m.def("set_blas_path", &cuda::set_blas_path, py::arg("path"));

  py::class_<Buffer, std::shared_ptr<Buffer>>(m, "Buffer").def("used_elsewhere", &Buffer::set_used_elsewhere);
  m.def("empty", &empty, py::arg("device"), py::arg("stream"), py::arg("shape"), py::arg("dtype"));
  m.def("shadow", &shadow, py::arg("owner"), py::arg("pointer"), py::arg("shape"), py::arg("strides").none(true),
        py::arg("dtype"), py::arg("writeable"));
  m.def("wait", &order_streams, py::arg("device"), py::arg("waiter"), py::arg("before"));
  m.def("upload", &upload, py::arg("device"), py::arg("stream"), py::arg("host"), py::arg("to"));
  m.def("download", &download, py::arg("device"), py::arg("stream"), py::arg("source"), py::arg("host"));
  m.def("copy", &fusedrnn::bindings::copy, py::arg("device"), py::arg("stream"), py::arg("source"), py::arg("to"));
  m.def("device_of", &device_of, py::arg("address"));
  register_dlpack(m);

  py::class_<fusedrnn::bindings::PySpec>(m, "Spec").def(py::init(&make_typed_spec), py::arg("cell"), py::arg("dtype"),
                                                        py::arg("input_size"), py::arg("hidden_size"), py::arg("num_layers"),
                                                        py::arg("directions"), py::arg("bias"), py::arg("reverse"));
  py::class_<PyTape>(m, "Tape")
      .def_property_readonly("nbytes", &PyTape::bytes)
      .def_property_readonly("passes", [](const PyTape& tape) { return tape.passes.load(); });
  m.def("panel_bytes", [](const fusedrnn::bindings::PySpec& s) { return cuda::panel_bytes(s.spec, s.dtype); }, py::arg("spec"));
  m.def("pack", &fusedrnn::bindings::pack, py::arg("spec"), py::arg("device"), py::arg("stream"), py::arg("params"),
        py::arg("panels"));
  m.def("forward", &fusedrnn::bindings::forward, py::arg("spec"), py::arg("device"), py::arg("stream"), py::arg("tf32"),
        py::arg("params"), py::arg("panels").none(true), py::arg("x"), py::arg("state").none(true),
        py::arg("lengths").none(true), py::arg("y"), py::arg("state_out"), py::arg("training"), py::arg("dropout"),
        py::arg("seed"));
  m.def("backward", &fusedrnn::bindings::backward, py::arg("spec"), py::arg("device"), py::arg("stream"), py::arg("params"),
        py::arg("tape"), py::arg("x"), py::arg("dy"), py::arg("dstate"), py::arg("dx"), py::arg("dstate_out"),
        py::arg("dparams"), py::arg("accumulate"));
}
