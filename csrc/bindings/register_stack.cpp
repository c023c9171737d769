// Forward and backward passes of a stack for Python: arrays become pointers, the GIL is released. No maths.
#include <atomic>

#include "bindings/arrays.h"

namespace fusedrnn::bindings {
namespace {

struct PyTape {
  std::unique_ptr<Tape<float>> of_float;
  std::unique_ptr<Tape<double>> of_double;
  std::atomic<int> passes{0};  // backward passes that have ended
  template <class T>
  std::unique_ptr<Tape<T>>& get() {
    if constexpr (sizeof(T) == 4)
      return of_float;
    else
      return of_double;
  }
  size_t bytes() const { return of_float ? of_float->bytes() : of_double->bytes(); }
};

PySpec make_typed_spec(const std::string& cell, const py::dtype& dtype, int64_t I, int64_t H, int64_t L, int D, bool bias,
                       bool reverse) {
  const bool is_double = dtype.num() == py::dtype::of<double>().num();
  expect(is_double || dtype.num() == py::dtype::of<float>().num(), "dtype must be float32 or float64");
  return {make_spec(cell, I, H, L, D, bias, reverse), is_double};
}

py::object forward(const PySpec& s, const py::tuple& params, const py::array& x, const py::object& state,
                   const py::object& lengths, const py::array& y, const py::tuple& state_out, bool training, double dropout,
                   uint64_t seed, const PyPanels* panels) {
  return with_type(s, [&](auto zero) -> py::object {
    using T = decltype(zero);
    const Spec& spec = s.spec;
    StackForward<T> call{};
    call.spec = spec;
    expect(x.ndim() == 3, "x must have three axes");
    call.T_ = x.shape(0), call.B = x.shape(1);
    py::array x_copy;
    call.x = readable<T>(x, spec.I, x_copy);
    call.y = writable<T>(y, spec.D * spec.H);
    expect(y.shape(0) == call.T_ && y.shape(1) == call.B, "y of the wrong shape");
    states<const T>(state, spec, call.B, call.state);
    states<T>(state_out, spec, call.B, call.final_state);
    for (int i = 0; i < spec.info().states; ++i) expect(call.final_state[i], "state_out must be whole");
    call.weights = weights<const T>(params, spec);
    if (!lengths.is_none()) {
      auto a = py::reinterpret_borrow<py::array>(lengths);
      call.lengths = contiguous<const int64_t>(a, call.B);
    }
    if (panels) call.panels = panels->get<T>().get();
    auto tape = std::make_unique<PyTape>();
    {
      GilRelease release;
      if (training)
        tape->get<T>() =
            std::make_unique<Tape<T>>(spec, call.T_, call.B, call.lengths, call.state[0] != nullptr, dropout, seed);
      run_forward(call, tape->get<T>().get());
    }
    return training ? py::cast(std::move(tape)) : py::none();
  });
}

void backward(const PySpec& s, const py::tuple& params, PyTape& tape, const py::array& x, const py::object& dy,
              const py::object& dstate, const py::object& dx, const py::object& dstate_out, const py::object& dparams,
              bool accumulate) {
  with_type(s, [&](auto zero) {
    using T = decltype(zero);
    const Spec& spec = s.spec;
    expect(bool(tape.get<T>()), "tape of another dtype");
    const Tape<T>& t = *tape.get<T>();
    StackBackward<T> call{};
    call.spec = spec;
    call.tape = &t;
    py::array x_copy, dy_copy;
    call.x = readable<T>(x, spec.I, x_copy);
    expect(x.shape(0) == t.T_ && x.shape(1) == t.B, "x of another shape than in the forward pass");
    call.dy = readable<T>(dy, spec.D * spec.H, dy_copy);
    call.dx = writable<T>(dx, spec.I);
    states<const T>(dstate, spec, t.B, call.dfinal_state);
    states<T>(dstate_out, spec, t.B, call.dstate);
    call.weights = weights<const T>(params, spec);
    if (!dparams.is_none()) call.dweights = weights<T>(py::reinterpret_borrow<py::tuple>(dparams), spec);
    call.adds = accumulate;
    GilRelease release;
    run_backward(call);
  });
  ++tape.passes;
}

PyPanels pack(const PySpec& s, const py::tuple& params) {
  return with_type(s, [&](auto zero) {
    using T = decltype(zero);
    auto w = weights<const T>(params, s.spec);
    GilRelease release;
    auto panels = std::make_shared<const Panels<T>>(s.spec, w);
    if constexpr (sizeof(T) == 4)
      return PyPanels{panels, nullptr};
    else
      return PyPanels{nullptr, panels};
  });
}

}  // namespace

void register_stack(py::module_& m) {
  py::list list;
  for (const CellInfo& cell : cells) {
    py::dict row;
    row["name"] = cell.name, row["gates"] = cell.gates, row["states"] = cell.states;
    list.append(row);
  }
  m.attr("CELLS") = list;
  py::class_<PySpec>(m, "Spec").def(py::init(&make_typed_spec), py::arg("cell"), py::arg("dtype"), py::arg("input_size"),
                                    py::arg("hidden_size"), py::arg("num_layers"), py::arg("directions"), py::arg("bias"),
                                    py::arg("reverse"));
  py::class_<PyTape>(m, "Tape")
      .def_property_readonly("nbytes", &PyTape::bytes)
      .def_property_readonly("passes", [](const PyTape& tape) { return tape.passes.load(); });
  py::class_<PyPanels>(m, "Panels").def_property_readonly("nbytes", &PyPanels::bytes);
  m.def("forward", &forward, py::arg("spec"), py::arg("params"), py::arg("x"), py::arg("state").none(true),
        py::arg("lengths").none(true), py::arg("y"), py::arg("state_out"), py::arg("training"), py::arg("dropout"),
        py::arg("seed"), py::arg("panels").none(true));
  m.def("backward", &backward, py::arg("spec"), py::arg("params"), py::arg("tape"), py::arg("x"), py::arg("dy"),
        py::arg("dstate"), py::arg("dx"), py::arg("dstate_out"), py::arg("dparams"), py::arg("accumulate"));
  m.def("pack", &pack, py::arg("spec"), py::arg("params"));
}

}  // namespace fusedrnn::bindings
