// A stream checks its own arguments: one step costs less than a Python function that would check them for it.
#include <atomic>
#include <cstring>
#include <variant>

#include "bindings/arrays.h"
#include "cpu/stream.h"

namespace fusedrnn::bindings {
namespace {

std::string shape_text(const py::array& a) { return py::str(a.attr("shape")).cast<std::string>(); }

class PyStream {
 public:
  PyStream(const PySpec& s, const PyPanels& panels, int64_t B) : spec_(s.spec), B_(B) {
    with_type(s, [&](auto zero) {
      using T = decltype(zero);
      auto stream = std::make_unique<Stream<T>>(s.spec, panels.get<T>(), B);
      dtype_ = py::dtype::of<T>();
      input_ = py::array_t<T>({B, s.spec.I});
      stream_ = std::move(stream);
    });
  }

  py::object step(const py::object& x, const py::object& out) {
    return std::visit([&](auto& stream) { return typed_step(*stream, x, out); }, stream_);
  }

  py::tuple state() {
    Busy busy(*this);
    return std::visit([&](auto& stream) { return typed_state(*stream); }, stream_);
  }

  void set_state(const py::object& values) {
    Busy busy(*this);
    std::visit([&](auto& stream) { typed_set_state(*stream, values); }, stream_);
  }

  int64_t batch() const { return B_; }

 private:
  // A stream belongs to one thread: a second one that comes while a step runs is told so.
  struct Busy {
    explicit Busy(PyStream& s) : stream(s) {
      if (s.busy_.exchange(true, std::memory_order_acquire))
        throw std::runtime_error("stream.step: another thread is using this stream; give each thread a stream of its own");
    }
    ~Busy() { stream.busy_.store(false, std::memory_order_release); }
    PyStream& stream;
  };

  template <class T>
  py::object typed_step(Stream<T>& stream, const py::object& x_object, const py::object& out_object) {
    Busy busy(*this);
    const py::array x = checked("x", x_object);
    const bool flat = x.ndim() == 1;
    if (!(flat && B_ == 1 && x.shape(0) == spec_.I) && !(x.ndim() == 2 && x.shape(0) == B_ && x.shape(1) == spec_.I))
      throw py::value_error("stream.step: x must have shape " + expected(spec_.I) + ", got " + shape_text(x));
    const T* from = static_cast<const T*>(x.data());
    if (!(x.flags() & py::array::c_style) || reinterpret_cast<uintptr_t>(from) % alignof(T) != 0) {
      auto copy = static_cast<T*>(input_.mutable_data());
      for (int64_t b = 0; b < B_; ++b)
        for (int64_t i = 0; i < spec_.I; ++i) memcpy(copy + b * spec_.I + i, flat ? x.data(i) : x.data(b, i), sizeof(T));
      from = copy;
    }
    py::object out = out_object;
    if (out.is_none()) {
      out = flat ? py::array_t<T>(spec_.H) : py::array_t<T>({B_, spec_.H});
    } else {
      check_out(checked("out", out), flat, x);
    }
    T* to = static_cast<T*>(py::reinterpret_borrow<py::array>(out).mutable_data());
    {
      GilRelease release;
      stream.step(from, to);
    }
    return out;
  }

  py::array checked(const char* name, const py::object& a) const {
    // Py_TYPE first: the plain type is the usual case, and a comparison is all that it then costs.
    if (Py_TYPE(a.ptr()) != py::detail::npy_api::get().PyArray_Type_) {
      const std::string type = py::type::of(a).attr("__name__").cast<std::string>();
      if (!py::isinstance<py::array>(a))
        throw py::type_error(std::string("stream.step: ") + name + " must be a numpy.ndarray, got " + type);
      if (type != "memmap")
        throw py::type_error(std::string("stream.step: ") + name + " must be a plain numpy.ndarray, got its subclass " + type);
    }
    auto array = py::reinterpret_borrow<py::array>(a);
    if (array.dtype().ptr() != dtype_.ptr() && !array.dtype().equal(dtype_))
      throw py::type_error(std::string("stream.step: ") + name + " must have dtype " + py::str(dtype_).cast<std::string>() +
                           ", got " + py::str(array.dtype()).cast<std::string>() + "; convert it with .astype(np." +
                           py::str(dtype_).cast<std::string>() + ")");
    return array;
  }

  void check_out(const py::array& out, bool flat, const py::array& x) const {
    const bool fits =
        flat ? out.ndim() == 1 && out.shape(0) == spec_.H : out.ndim() == 2 && out.shape(0) == B_ && out.shape(1) == spec_.H;
    if (!fits)
      throw py::value_error(
          "stream.step: out must have shape " +
          (flat ? "(" + std::to_string(spec_.H) + ",)" : "(" + std::to_string(B_) + ", " + std::to_string(spec_.H) + ")") +
          ", got " + shape_text(out));
    if (!out.writeable()) throw py::value_error("stream.step: out must be writeable, got a read-only array");
    if (!(out.flags() & py::array::c_style) || reinterpret_cast<uintptr_t>(out.data()) % size_t(out.itemsize()) != 0)
      throw py::value_error("stream.step: out must be C-contiguous and aligned");
    // Both are small: the bounds of their memory are enough.
    auto end = [](const py::array& a) {
      const char* last = static_cast<const char*>(a.data());
      for (py::ssize_t i = 0; i < a.ndim(); ++i)
        if (a.strides(i) > 0) last += (a.shape(i) - 1) * a.strides(i);
      return last + a.itemsize();
    };
    auto begin = [](const py::array& a) {
      const char* first = static_cast<const char*>(a.data());
      for (py::ssize_t i = 0; i < a.ndim(); ++i)
        if (a.strides(i) < 0) first += (a.shape(i) - 1) * a.strides(i);
      return first;
    };
    if (x.size() > 0 && out.size() > 0 && begin(x) < end(out) && begin(out) < end(x))
      throw py::value_error("stream.step: out must not overlap x");
  }

  std::string expected(int64_t n) const {
    std::string batch = "(" + std::to_string(B_) + ", " + std::to_string(n) + ")";
    return B_ == 1 ? "(" + std::to_string(n) + ",) or " + batch : batch;
  }

  template <class T>
  py::tuple typed_state(const Stream<T>& stream) const {
    py::tuple out(spec_.info().states);
    for (int i = 0; i < spec_.info().states; ++i) {
      py::array_t<T> a({spec_.L, B_, spec_.H});
      stream.get_state(i, a.mutable_data());
      out[i] = a;
    }
    return out;
  }

  template <class T>
  void typed_set_state(Stream<T>& stream, const py::object& values) {
    const T* from[max_states];
    states<const T>(values, spec_, B_, from);
    for (int i = 0; i < spec_.info().states; ++i) stream.set_state(i, from[i]);
  }

  Spec spec_;
  int64_t B_;
  py::dtype dtype_;
  py::array input_;  // (B, I): room for an x with gaps
  std::variant<std::unique_ptr<Stream<float>>, std::unique_ptr<Stream<double>>> stream_;
  std::atomic<bool> busy_{false};
};

// Stream.step in CPython's own calling convention: pybind11's dispatch, keywords above all, takes longer than a small step.
PyObject* step(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  static const char* const names[] = {"x", "out"};
  PyObject* given[2] = {nullptr, nullptr};
  const Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;
  if (count > 2) {
    PyErr_Format(PyExc_TypeError, "stream.step: takes x and out, got %zd arguments", count);
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < count; ++i) given[i] = args[i];
  for (Py_ssize_t i = 0; i < named; ++i) {
    PyObject* const name = PyTuple_GET_ITEM(keywords, i);
    int at = 0;
    while (at < 2 && PyUnicode_CompareWithASCIIString(name, names[at]) != 0) ++at;
    if (at == 2 || given[at]) {
      PyErr_Format(PyExc_TypeError, at == 2 ? "stream.step: got an unexpected argument %R" : "stream.step: got %R twice", name);
      return nullptr;
    }
    given[at] = args[count + i];
  }
  if (!given[0]) {
    PyErr_SetString(PyExc_TypeError, "stream.step: x is missing");
    return nullptr;
  }
  try {
    const py::handle out = given[1] ? given[1] : Py_None;
    return py::cast<PyStream&>(py::handle(self))
        .step(py::reinterpret_borrow<py::object>(given[0]), py::reinterpret_borrow<py::object>(out))
        .release()
        .ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyMethodDef step_method = {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step)),
                           METH_FASTCALL | METH_KEYWORDS, "step(x, out=None) -> h"};

}  // namespace

void register_stream(py::module_& m) {
  py::class_<PyStream> stream(m, "Stream");
  stream.def(py::init<const PySpec&, const PyPanels&, int64_t>(), py::arg("spec"), py::arg("panels"), py::arg("batch_size"))
      .def("set_state", &PyStream::set_state, py::arg("state").none(true))
      .def_property_readonly("state", &PyStream::state)
      .def_property_readonly("batch_size", &PyStream::batch);
  stream.attr("step") =
      py::reinterpret_steal<py::object>(PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(stream.ptr()), &step_method));
}

}  // namespace fusedrnn::bindings
