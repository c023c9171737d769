// DLPack (https://dmlc.github.io/dlpack), the part of its ABI that arrays on a GPU come and go by: versions 0 and 1.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <vector>

#include "bindings/common.h"

namespace fusedrnn::bindings {
namespace dlpack {

struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t *shape, *strides;  // in elements; no strides: C-contiguous
  uint64_t byte_offset;
};
struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};
constexpr uint64_t read_only = 1, is_copied = 2;
struct ManagedVersioned {
  uint32_t major, minor;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  Tensor tensor;
};
constexpr const char *name = "dltensor", *used_name = "used_dltensor";
constexpr const char *versioned_name = "dltensor_versioned", *used_versioned_name = "used_dltensor_versioned";

// What one of our arrays lends to another library: alive until that has called the deleter.
template <class M>
struct Lent {
  M managed{};
  std::vector<int64_t> shape, strides;
  py::object array, owner;
};

template <class M>
void release(M* managed) {
  if (!Py_IsInitialized()) return;  // the process is ending, and its memory with it
  py::gil_scoped_acquire gil;
  delete static_cast<Lent<M>*>(managed->context);
}

template <class M>
py::object lend(const py::array& array, const py::object& owner, DataType dtype, Device device, const char* capsule_name) {
  auto lent = std::make_unique<Lent<M>>();
  lent->array = array, lent->owner = owner;
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    lent->shape.push_back(array.shape(i));
    lent->strides.push_back(array.strides(i) / array.itemsize());
  }
  lent->managed.tensor = {array.size() ? const_cast<void*>(array.data()) : nullptr,
                          device,
                          int32_t(array.ndim()),
                          dtype,
                          lent->shape.data(),
                          lent->strides.data(),
                          0};
  lent->managed.context = lent.get();
  lent->managed.deleter = &release<M>;
  // A capsule that nobody has taken, which its name tells, still owns the loan.
  PyObject* capsule = PyCapsule_New(&lent->managed, capsule_name, [](PyObject* self) {
    const char* const called = PyCapsule_GetName(self);
    if (called != versioned_name && called != name) return;
    auto* managed = static_cast<M*>(PyCapsule_GetPointer(self, called));
    managed->deleter(managed);
  });
  if (!capsule) throw py::error_already_set();
  lent.release();
  return py::reinterpret_steal<py::object>(capsule);
}

// What another library has lent us; given back when this goes.
class Taken {
 public:
  explicit Taken(const py::object& capsule) {
    PyObject* const p = capsule.ptr();
    if (PyCapsule_IsValid(p, versioned_name)) {
      versioned_ = static_cast<ManagedVersioned*>(PyCapsule_GetPointer(p, versioned_name));
      if (versioned_->major != 1) throw py::buffer_error("DLPack: version 1 is known here, got another");
      PyCapsule_SetName(p, used_versioned_name);
    } else if (PyCapsule_IsValid(p, name)) {
      managed_ = static_cast<Managed*>(PyCapsule_GetPointer(p, name));
      PyCapsule_SetName(p, used_name);
    } else {
      throw py::buffer_error("DLPack: __dlpack__ must return a fresh capsule");
    }
  }
  ~Taken() {
    if (versioned_ && versioned_->deleter) versioned_->deleter(versioned_);
    if (managed_ && managed_->deleter) managed_->deleter(managed_);
  }
  Taken(const Taken&) = delete;
  Taken& operator=(const Taken&) = delete;

  const Tensor& tensor() const { return versioned_ ? versioned_->tensor : managed_->tensor; }
  bool writeable() const { return !versioned_ || !(versioned_->flags & read_only); }
  uintptr_t pointer() const { return reinterpret_cast<uintptr_t>(tensor().data) + tensor().byte_offset; }
  std::vector<int64_t> shape() const { return {tensor().shape, tensor().shape + tensor().ndim}; }
  std::optional<std::vector<int64_t>> strides() const {  // in bytes, as NumPy's
    if (!tensor().strides) return std::nullopt;
    std::vector<int64_t> out(tensor().strides, tensor().strides + tensor().ndim);
    for (int64_t& stride : out) stride *= tensor().dtype.bits / 8;
    return out;
  }

 private:
  Managed* managed_ = nullptr;
  ManagedVersioned* versioned_ = nullptr;
};

}  // namespace dlpack

inline void register_dlpack(py::module_& m) {
  using namespace dlpack;
  py::class_<Taken>(m, "Taken")
      .def_property_readonly("pointer", &Taken::pointer)
      .def_property_readonly("shape", &Taken::shape)
      .def_property_readonly("strides", &Taken::strides)
      .def_property_readonly("writeable", &Taken::writeable)
      .def_property_readonly("device_id", [](const Taken& t) { return t.tensor().device.id; })
      .def_property_readonly("dtype", [](const Taken& t) {  // type code, bits, lanes
        return py::make_tuple(t.tensor().dtype.code, t.tensor().dtype.bits, t.tensor().dtype.lanes);
      });
  m.def("from_dlpack", [](const py::object& capsule) { return std::make_unique<Taken>(capsule); }, py::arg("capsule"));
  m.def(
      "to_dlpack",
      [](const py::array& array, const py::object& owner, int code, int bits, int type, int id, bool versioned, bool copied) {
        const DataType dtype{uint8_t(code), uint8_t(bits), 1};
        if (!versioned) return lend<Managed>(array, owner, dtype, {type, id}, name);
        py::object capsule = lend<ManagedVersioned>(array, owner, dtype, {type, id}, versioned_name);
        auto* managed = static_cast<ManagedVersioned*>(PyCapsule_GetPointer(capsule.ptr(), versioned_name));
        managed->major = 1;
        managed->flags = (array.writeable() ? 0 : read_only) | (copied ? is_copied : 0);
        return capsule;
      },
      py::arg("array"), py::arg("owner"), py::arg("code"), py::arg("bits"), py::arg("device_type"), py::arg("device_id"),
      py::arg("versioned"), py::arg("copied"));
}

}  // namespace fusedrnn::bindings
