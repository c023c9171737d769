// What every binding needs: a stack's description with its dtype, and NumPy arrays as the plain pointers of the core.
#pragma once

#include <pybind11/numpy.h>

#include "bindings/common.h"
#include "cpu/stack.h"

namespace fusedrnn::bindings {

struct PySpec {
  Spec spec;
  bool is_double;
};

// Calls work with a value of the spec's float type.
template <class Work>
auto with_type(const PySpec& spec, Work work) {
  return spec.is_double ? work(double{}) : work(float{});
}

template <class T>
void check_type(const py::array& a) {
  expect(py::isinstance<py::array_t<T>>(a), "array of another dtype than the spec's");
}

// The pointer of a C-contiguous array of n elements.
template <class T>
T* contiguous(const py::array& a, int64_t n) {
  check_type<std::remove_const_t<T>>(a);
  expect((a.flags() & py::array::c_style) != 0 && a.size() == n, "array must be C-contiguous and of the right size");
  return static_cast<T*>(const_cast<void*>(a.data()));
}

// A (T, B, width) array. Where the last axis has gaps, or a stride is no multiple of an element, a contiguous copy is
// kept in `copy`.
template <class T>
Sequence<const T> readable(const py::object& object, int64_t width, py::array& copy) {
  if (object.is_none()) return {};
  copy = py::reinterpret_borrow<py::array>(object);
  check_type<T>(copy);
  expect(copy.ndim() == 3 && copy.shape(2) == width, "sequence of the wrong shape");
  const auto whole = [&](int i) { return copy.strides(i) % py::ssize_t(sizeof(T)) == 0; };
  const bool aligned = reinterpret_cast<uintptr_t>(copy.data()) % alignof(T) == 0;
  if ((width > 1 && copy.strides(2) != py::ssize_t(sizeof(T))) || !whole(0) || !whole(1) || !aligned)
    copy = copy.attr("copy")("C");
  return {static_cast<const T*>(copy.data()), copy.strides(0) / py::ssize_t(sizeof(T)),
          copy.strides(1) / py::ssize_t(sizeof(T))};
}

template <class T>
Sequence<T> writable(const py::object& object, int64_t width) {
  if (object.is_none()) return {};
  auto a = py::reinterpret_borrow<py::array>(object);
  check_type<T>(a);
  expect(a.ndim() == 3 && a.shape(2) == width && a.writeable(), "output sequence of the wrong shape");
  expect(width <= 1 || a.size() == 0 || a.strides(2) == py::ssize_t(sizeof(T)),
         "output sequence's last axis must be contiguous");
  return {static_cast<T*>(a.mutable_data()), a.strides(0) / py::ssize_t(sizeof(T)), a.strides(1) / py::ssize_t(sizeof(T))};
}

// The pointers of a tuple of states, each (L*D, B, H) or None.
template <class T>
void states(const py::object& tuple, const Spec& spec, int64_t B, T** out) {
  for (int i = 0; i < max_states; ++i) out[i] = nullptr;
  if (tuple.is_none()) return;
  auto entries = py::reinterpret_borrow<py::tuple>(tuple);
  expect(int(entries.size()) == spec.info().states, "wrong number of states");
  for (int i = 0; i < spec.info().states; ++i)
    if (!entries[i].is_none()) out[i] = contiguous<T>(py::reinterpret_borrow<py::array>(entries[i]), spec.count() * B * spec.H);
}

// T is const for parameters that are read, and plain for gradients.
template <class T>
StackWeights<T> weights(const py::tuple& arrays, const Spec& spec) {
  const int64_t each = spec.bias ? 4 : 2, rows = spec.info().gates * spec.H;
  expect(int64_t(arrays.size()) == each * spec.count(), "wrong number of parameters");
  StackWeights<T> out(spec.count());
  for (int64_t i = 0; i < spec.count(); ++i) {
    auto at = [&](int64_t k, int64_t n) { return contiguous<T>(py::reinterpret_borrow<py::array>(arrays[each * i + k]), n); };
    out[i] = {at(0, rows * spec.input_size(i / spec.D)), at(1, rows * spec.H), nullptr, nullptr};
    if (spec.bias) out[i].b_ih = at(2, rows), out[i].b_hh = at(3, rows);
  }
  return out;
}

void register_stack(py::module_& m);
void register_stream(py::module_& m);
void register_machine(py::module_& m);

// Panels of either float type.
struct PyPanels {
  std::shared_ptr<const Panels<float>> of_float;
  std::shared_ptr<const Panels<double>> of_double;
  template <class T>
  const std::shared_ptr<const Panels<T>>& get() const {
    if constexpr (sizeof(T) == 4)
      return of_float;
    else
      return of_double;
  }
  size_t bytes() const { return of_float ? of_float->bytes() : of_double->bytes(); }
};

}  // namespace fusedrnn::bindings
