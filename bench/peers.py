"""The peers: PyTorch, ONNX Runtime and JAX, each in the settings that may suit it best.

Each is imported only when it is used, and computes what engines.py says under the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np

from .engines import (
    CHECKED_STEPS,
    PARAMETERS,
    TORCH_NAMES,
    Candidate,
    Engine,
    Outputs,
    Problem,
    Reference,
    final_states,
)
from .machine import cores
from .shapes import Case, Cell

Within = Callable[[], AbstractContextManager[object]]


class Torch(Engine):
    """PyTorch's modules on the CPU: nn.LSTM and its like under inference_mode, autograd for training."""

    name, label, needs = "torch", "PyTorch", ("torch",)

    def unsupported(self, case: Case, threads: tuple[int, ...]) -> str | None:
        return (
            "has no GRU with the reset gate before the product"
            if case.cell.name == "gru_reset_before"
            else None
        )

    def candidates(self, problem: Problem, threads: tuple[int, ...]) -> Iterator[Candidate]:
        import torch

        case = problem.case
        options = {k: v for k, v in case.cell.options if k == "nonlinearity"}
        parameters = {name: torch.from_numpy(array) for name, array in problem.params.items()}

        def filled(kind: str, names: dict[str, str]) -> Any:
            module = getattr(torch.nn, kind)(case.I, case.H, dtype=parameters["w_ih"].dtype, **options)
            module.load_state_dict({names[k]: array for k, array in parameters.items()})
            return module

        @contextmanager
        def within(n: int) -> Iterator[None]:
            before = torch.get_num_threads()
            torch.set_num_threads(n)
            try:
                with torch.inference_mode(case.work != "train"):
                    yield
            finally:
                torch.set_num_threads(before)

        layer = filled(case.cell.layer, TORCH_NAMES)
        for n in threads:
            if case.work == "stream":
                cell = filled(
                    f"{case.cell.layer}Cell", {k: name.removesuffix("_l0") for k, name in TORCH_NAMES.items()}
                )
                yield self._step(problem, cell, n, partial(within, n))
                yield self._sequence_of_one(problem, layer, n, partial(within, n))
            else:
                make = self._forward if case.work == "forward" else self._train
                yield make(problem, layer, n, partial(within, n))

    @staticmethod
    def _forward(problem: Problem, layer: Any, n: int, within: Within) -> Candidate:
        import torch

        call = partial(layer, torch.from_numpy(problem.x))

        def outputs() -> Outputs:
            y, state = call()
            states = state if isinstance(state, tuple) else (state,)
            return {"y": y.numpy()} | final_states(s[0].numpy() for s in states)

        return Candidate(f"nn.{problem.case.cell.layer}", n, call, outputs, within)

    @staticmethod
    def _train(problem: Problem, layer: Any, n: int, within: Within) -> Candidate:
        import torch

        x, dy = torch.from_numpy(problem.x).requires_grad_(), torch.from_numpy(problem.dy)
        inputs = (x, *(getattr(layer, name) for name in TORCH_NAMES.values()))

        def call() -> tuple[Any, Any]:
            y, _ = layer(x)
            return y, torch.autograd.grad(y, inputs, dy)

        def outputs() -> Outputs:
            y, grads = call()
            names = ("dx", *(f"d{k}" for k in PARAMETERS))
            return {"y": y.detach().numpy()} | {k: g.numpy() for k, g in zip(names, grads, strict=True)}

        return Candidate(f"nn.{problem.case.cell.layer}, autograd", n, call, outputs, within)

    @staticmethod
    def _step(problem: Problem, cell: Any, n: int, within: Within) -> Candidate:
        import torch

        x, zeros = torch.from_numpy(problem.x[0]), [torch.from_numpy(z) for z in problem.zeros]
        initial = tuple(zeros) if len(zeros) > 1 else zeros[0]  # what nn.LSTMCell takes and gives, or h alone
        return Candidate(
            f"nn.{problem.case.cell.layer}Cell",
            n,
            *Torch._stepping(lambda state: cell(x, state), initial),
            within,
        )

    @staticmethod
    def _sequence_of_one(problem: Problem, layer: Any, n: int, within: Within) -> Candidate:
        import torch

        x, zeros = torch.from_numpy(problem.x), [torch.from_numpy(z)[None] for z in problem.zeros]
        initial = tuple(zeros) if len(zeros) > 1 else zeros[0]
        return Candidate(
            f"nn.{problem.case.cell.layer}, T = 1",
            n,
            *Torch._stepping(lambda state: layer(x, state)[1], initial),
            within,
        )

    @staticmethod
    def _stepping(
        step: Callable[[Any], Any], initial: Any
    ) -> tuple[Callable[[], None], Callable[[], Outputs]]:
        state = initial

        def call() -> None:
            nonlocal state
            state = step(state)

        def outputs() -> Outputs:
            nonlocal state
            state = initial
            for _ in range(CHECKED_STEPS):
                call()
            h = state[0] if isinstance(state, tuple) else state
            return {"h": h.numpy().reshape(h.shape[-2:])}

        return call, outputs


# Our gates in the order of ONNX: iofc of i, f, g, o; zrh of r, z, n.
ONNX_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


class OnnxRuntime(Engine):
    """ONNX Runtime on a model of one node, inputs and outputs bound to buffers beforehand. No backward."""

    name, label, needs = "onnxruntime", "ONNX Runtime", ("onnxruntime", "onnx")

    def unsupported(self, case: Case, threads: tuple[int, ...]) -> str | None:
        return "has no backward" if case.work == "train" else None

    def candidates(self, problem: Problem, threads: tuple[int, ...]) -> Iterator[Candidate]:
        import onnxruntime as ort

        model = self._model(problem)
        for n in threads:
            options = ort.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = n, 1
            options.log_severity_level = 3
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            make = self._stream if problem.case.work == "stream" else self._forward
            yield make(problem, session, n)

    def _model(self, problem: Problem) -> bytes:
        from onnx import helper, numpy_helper

        case, p = problem.case, problem.params
        order = ONNX_ORDER[case.cell.layer]
        element = helper.np_dtype_to_tensor_dtype(case.dtype)

        def reordered(array: np.ndarray) -> np.ndarray:
            gates = np.split(array, case.cell.gates)
            return np.concatenate([gates[i] for i in order])

        weights = {
            "W": reordered(p["w_ih"])[None],
            "R": reordered(p["w_hh"])[None],
            "B": np.concatenate([reordered(p["b_ih"]), reordered(p["b_hh"])])[None],
        }
        options = dict(case.cell.options)
        attributes: dict[str, Any] = {"hidden_size": case.H}
        if case.cell.layer == "GRU":
            attributes["linear_before_reset"] = int(options["reset_after"])
        if case.cell.layer == "RNN":
            attributes["activations"] = [options["nonlinearity"].capitalize()]

        states, shape = ("h", "c")[: case.cell.states], (1, case.B, case.H)
        node = helper.make_node(
            case.cell.layer,
            ["X", "W", "R", "B", "", *states],
            ["Y", *(f"{s}_n" for s in states)],
            **attributes,
        )
        tensor = helper.make_tensor_value_info
        graph = helper.make_graph(
            [node],
            "layer",
            [tensor("X", element, problem.x.shape), *(tensor(s, element, shape) for s in states)],
            [
                tensor("Y", element, (case.T, 1, case.B, case.H)),
                *(tensor(f"{s}_n", element, shape) for s in states),
            ],
            [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in weights.items()],
        )
        # opset 14 has all three operators in their present form
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
        serialized: bytes = model.SerializeToString()
        return serialized

    def _forward(self, problem: Problem, session: Any, n: int) -> Candidate:
        from onnxruntime import OrtValue

        case = problem.case
        states = [OrtValue.ortvalue_from_numpy(z[None]) for z in problem.zeros]
        last = [OrtValue.ortvalue_from_numpy(z[None]) for z in problem.zeros]
        y = OrtValue.ortvalue_from_numpy(np.zeros((case.T, 1, case.B, case.H), case.dtype))
        binding = self._binding(session, problem.x, states, {"Y": y}, last)
        call = partial(session.run_with_iobinding, binding)

        def outputs() -> Outputs:
            call()
            return {"y": y.numpy()[:, 0].copy()} | final_states(s.numpy()[0].copy() for s in last)

        return Candidate("one node, bound", n, call, outputs)

    def _stream(self, problem: Problem, session: Any, n: int) -> Candidate:
        from onnxruntime import OrtValue

        # Two sets of buffers take turns, so that a step's state is the next one's input without a copy.
        pair = [[OrtValue.ortvalue_from_numpy(z[None]) for z in problem.zeros] for _ in range(2)]
        run = session.run_with_iobinding
        there = self._binding(session, problem.x, pair[0], {}, pair[1])
        back = self._binding(session, problem.x, pair[1], {}, pair[0])

        def call() -> None:
            run(there)
            run(back)

        def outputs() -> Outputs:
            for value, zero in zip(pair[0], problem.zeros, strict=True):
                value.update_inplace(zero[None])
            for _ in range(CHECKED_STEPS // 2):
                call()
            return {"h": pair[0][0].numpy()[0].copy()}

        return Candidate("one node, bound", n, call, outputs, steps=2)

    @staticmethod
    def _binding(
        session: Any, x: np.ndarray, states: list[Any], results: dict[str, Any], last: list[Any]
    ) -> Any:
        from onnxruntime import OrtValue

        binding = session.io_binding()
        binding.bind_ortvalue_input("X", OrtValue.ortvalue_from_numpy(x))
        for name, before, after in zip("hc", states, last, strict=False):
            binding.bind_ortvalue_input(name, before)
            binding.bind_ortvalue_output(f"{name}_n", after)
        for name, value in results.items():
            binding.bind_ortvalue_output(name, value)
        return binding


class Jax(Engine):
    """JAX on the CPU: lax.scan, jitted; weights are constants in inference and arguments in training.

    XLA decides per operation how many threads to use and has no setting for it within a process. The input
    product is tried hoisted out of the loop and within it, the loop rolled and (in inference, where it
    sometimes pays) unrolled eight times.
    """

    name, label, needs = "jax", "JAX", ("jax",)

    def unsupported(self, case: Case, threads: tuple[int, ...]) -> str | None:
        return None if cores() in threads else f"always uses all {cores()} cores"

    @staticmethod
    def _step(cell: Cell, hoisted: bool) -> Callable[..., Any]:
        """step(weights, state, u) -> state; u is x_t or, if hoisted, its part of the pre-activations."""
        import jax
        import jax.numpy as jnp

        options, sigmoid, tanh = dict(cell.options), jax.nn.sigmoid, jnp.tanh

        def step(weights: Any, state: Any, u: Any) -> Any:
            w_ih, w_hh, b_ih, b_hh = weights  # transposed: (I, G*H), (H, G*H)
            h = state[0]
            size = h.shape[-1]
            if not hoisted:
                u = u @ w_ih + b_ih
            if cell.layer == "LSTM":
                i, f, g, o = jnp.split(u + h @ w_hh + b_hh, 4, axis=-1)
                c = sigmoid(f) * state[1] + sigmoid(i) * tanh(g)
                return sigmoid(o) * tanh(c), c
            if cell.layer == "RNN":
                a = u + h @ w_hh + b_hh
                return (tanh(a) if options["nonlinearity"] == "tanh" else jax.nn.relu(a),)
            if options["reset_after"]:
                v = h @ w_hh + b_hh
                r, z = jnp.split(sigmoid(u[..., : 2 * size] + v[..., : 2 * size]), 2, axis=-1)
                n = tanh(u[..., 2 * size :] + r * v[..., 2 * size :])
            else:
                v = h @ w_hh[:, : 2 * size] + b_hh[: 2 * size]
                r, z = jnp.split(sigmoid(u[..., : 2 * size] + v), 2, axis=-1)
                n = tanh(u[..., 2 * size :] + (r * h) @ w_hh[:, 2 * size :] + b_hh[2 * size :])
            return (z * h + (1 - z) * n,)

        return step

    def candidates(self, problem: Problem, threads: tuple[int, ...]) -> Iterator[Candidate]:
        import jax

        within = partial(jax.enable_x64, problem.case.dtype == np.float64)
        with within():
            if problem.case.work == "stream":
                yield self._stream(problem, within)
                return
            plans = [("hoisted", 1), ("in the loop", 1)]
            if problem.case.work == "forward":
                plans.append(("in the loop", 8))
            for product, unroll in plans:
                yield self._sequence(problem, product, unroll, within)

    def _sequence(self, problem: Problem, product: str, unroll: int, within: Within) -> Candidate:
        import jax

        step = self._step(problem.case.cell, product == "hoisted")
        zeros = tuple(jax.numpy.asarray(z) for z in problem.zeros)
        x, dy = jax.numpy.asarray(problem.x), jax.numpy.asarray(problem.dy)
        weights = tuple(jax.numpy.asarray(problem.params[k]) for k in PARAMETERS)

        def layer(x: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
            w = (w_ih.T, w_hh.T, b_ih, b_hh)
            u = x @ w[0] + b_ih if product == "hoisted" else x

            def body(state: Any, u_t: Any) -> Any:
                state = step(w, state, u_t)
                return state, state[0]

            states, y = jax.lax.scan(body, zeros, u, unroll=min(unroll, problem.case.T))
            return y, states

        def train(x: Any, dy: Any, *w: Any) -> Any:
            y, pull = jax.vjp(lambda *args: layer(*args)[0], x, *w)
            return y, pull(dy)

        if problem.case.work == "forward":
            work = partial(jax.jit(lambda x: layer(x, *weights)), x)
        else:
            work = partial(jax.jit(train), x, dy, *weights)

        ready: Any = jax.block_until_ready  # untyped

        def call() -> Any:
            return ready(work())

        def outputs() -> Outputs:
            y, rest = call()
            if problem.case.work == "forward":
                return {"y": np.asarray(y)} | final_states(np.asarray(s) for s in rest)
            names = ("dx", *(f"d{k}" for k in PARAMETERS))
            return {"y": np.asarray(y)} | {k: np.asarray(g) for k, g in zip(names, rest, strict=True)}

        return Candidate(f"scan, unroll {unroll}, input product {product}", None, call, outputs, within)

    def _stream(self, problem: Problem, within: Within) -> Candidate:
        import jax

        step = self._step(problem.case.cell, hoisted=False)
        w_ih, w_hh, b_ih, b_hh = (jax.numpy.asarray(problem.params[k]) for k in PARAMETERS)
        x = jax.numpy.asarray(problem.x[0])
        one = jax.jit(lambda x, state: step((w_ih.T, w_hh.T, b_ih, b_hh), state, x))
        initial = state = tuple(jax.numpy.asarray(z) for z in problem.zeros)

        def call() -> None:
            nonlocal state
            state = one(x, state)
            state[0].block_until_ready()

        def outputs() -> Outputs:
            nonlocal state
            state = initial
            for _ in range(CHECKED_STEPS):
                call()
            return {"h": np.asarray(state[0])}

        return Candidate("jitted step", None, call, outputs, within)


PEERS: dict[str, Engine] = {engine.name: engine for engine in (Torch(), OnnxRuntime(), Jax(), Reference())}
DEFAULT_PEERS = ("torch", "onnxruntime", "jax")
