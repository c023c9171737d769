"""What a benchmark compares: engines, each with ready-made calls for a case. Ours and the reference.

An engine turns a problem (weights, inputs) into candidates: one call per setting worth trying, and the same
call's outputs as NumPy arrays under common names. Everything an engine can prepare once (converted or packed
weights, sessions, compiled functions) is prepared before the clock runs.

Outputs   forward   y (T, B, H), h_n and c_n (B, H)
          train     y, dx (T, B, I), and dw_ih, dw_hh, db_ih, db_hh, shaped like the parameters
          stream    h (B, H) after CHECKED_STEPS steps with the same x
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

import fusedrnn as fr

from .shapes import Case

PARAMETERS = ("w_ih", "w_hh", "b_ih", "b_hh")
TORCH_NAMES = dict(zip(PARAMETERS, ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"), strict=True))
CHECKED_STEPS = 4

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Candidate:
    """One way of doing the work: `call` does it `steps` times over, `outputs` once, giving the results.

    `clock` counts nanoseconds; one that stands still in some part of the call leaves that part out.
    """

    setting: str
    threads: int | None  # None: the engine decides by itself
    call: Callable[[], object]
    outputs: Callable[[], Outputs]
    within: Callable[[], AbstractContextManager[object]] = nullcontext
    steps: int = 1
    clock: Callable[[], int] = time.perf_counter_ns


@dataclass(frozen=True, eq=False)
class Problem:
    """A case with its numbers: x, dy ~ N(0, 1), parameters ~ U(-1/sqrt(H), 1/sqrt(H)), a state of zeros."""

    case: Case
    x: np.ndarray  # (T, B, I)
    dy: np.ndarray  # (T, B, H)
    params: dict[str, np.ndarray] = field(repr=False)

    @classmethod
    def draw(cls, case: Case, seed: int = 0) -> Problem:
        rng = np.random.default_rng(seed)
        g, k = case.cell.gates * case.H, case.H**-0.5
        shapes = ((g, case.I), (g, case.H), (g,), (g,))
        return cls(
            case,
            rng.standard_normal((case.T, case.B, case.I)).astype(case.dtype),
            rng.standard_normal((case.T, case.B, case.H)).astype(case.dtype),
            {
                name: rng.uniform(-k, k, s).astype(case.dtype)
                for name, s in zip(PARAMETERS, shapes, strict=True)
            },
        )

    @property
    def zeros(self) -> list[np.ndarray]:
        """The initial state, each array (B, H)."""
        return [np.zeros((self.case.B, self.case.H), self.case.dtype) for _ in range(self.case.cell.states)]


def final_states(states: Iterable[np.ndarray]) -> Outputs:
    return dict(zip(("h_n", "c_n"), states, strict=False))


class Engine:
    """What `measure` asks of an engine; `name` is that of --peers, `needs` the modules it imports."""

    name: str
    label: str
    needs: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """Modules this engine needs and the environment lacks."""
        return [module for module in self.needs if importlib.util.find_spec(module) is None]

    def versions(self) -> dict[str, str]:
        return {module: version(module) for module in self.needs}

    def unsupported(self, case: Case, threads: tuple[int, ...]) -> str | None:
        """Why this engine cannot do the case on any of these thread counts, or None."""
        return None

    def candidates(self, problem: Problem, threads: tuple[int, ...]) -> Iterator[Candidate]:
        raise NotImplementedError


class Ours(Engine):
    """fusedrnn. Inference goes through a frozen layer, whose weights are packed once, as in a session of ONNX
    Runtime; without `frozen` it calls the layer, which packs them in every call."""

    name, label = "fusedrnn", "fusedrnn"

    def __init__(self, frozen: bool = True) -> None:
        self.frozen = frozen

    def versions(self) -> dict[str, str]:
        return {"fusedrnn": fr.__version__}

    def candidates(self, problem: Problem, threads: tuple[int, ...]) -> Iterator[Candidate]:
        layer = self.layer(problem.case)
        layer.load_state_dict({TORCH_NAMES[name]: array for name, array in problem.params.items()})
        for n in threads:
            yield getattr(self, problem.case.work)(problem, layer, n)

    @staticmethod
    def layer(case: Case, **options: object) -> Any:
        """The case's layer; `options` of its class beside those of the cell."""
        make = getattr(fr, case.cell.layer)
        return make(case.I, case.H, dtype=case.dtype, seed=0, **dict(case.cell.options), **options)

    def forward(self, problem: Problem, layer: Any, n: int, **given: object) -> Candidate:
        """`given`: more arguments of the call."""
        y = np.empty_like(problem.dy)
        call = partial(layer.freeze() if self.frozen else layer, problem.x, out=y, **given)

        def outputs() -> Outputs:
            _, state = call()
            states = state if isinstance(state, tuple) else (state,)
            return {"y": y.copy()} | final_states(s[0] for s in states)

        return Candidate(
            "frozen, out=" if self.frozen else "layer, out=", n, call, outputs, partial(fr.num_threads, n)
        )

    def train(self, problem: Problem, layer: Any, n: int, **given: object) -> Candidate:
        wanted = ("x", "params")

        def call() -> tuple[Any, Any]:
            y, _, tape = layer.forward(problem.x, **given)
            return y, layer.backward(tape, problem.dy, wrt=wanted)

        def outputs() -> Outputs:
            y, grads = call()
            return {"y": y, "dx": grads.x} | {f"d{k}": grads.params[name] for k, name in TORCH_NAMES.items()}

        return Candidate("forward, backward", n, call, outputs, partial(fr.num_threads, n))

    def stream(self, problem: Problem, layer: Any, n: int) -> Candidate:
        case = problem.case
        stream = layer.freeze().stream(batch_size=case.B)
        h = np.empty((case.B, case.H), case.dtype)
        call = partial(stream.step, problem.x[0], h)

        def outputs() -> Outputs:
            stream.reset()
            for _ in range(CHECKED_STEPS):
                call()
            return {"h": h.copy()}

        return Candidate("stream.step, out=", n, call, outputs, partial(fr.num_threads, n))


class Reference(Engine):
    """fusedrnn.reference: NumPy, computing in float64, on as many threads as NumPy's BLAS takes."""

    name, label = "reference", "NumPy reference"

    def versions(self) -> dict[str, str]:
        return {"numpy": np.__version__}

    def candidates(self, problem: Problem, threads: tuple[int, ...]) -> Iterator[Candidate]:
        case, p = problem.case, problem.params
        name, options = case.cell.layer.lower(), dict(case.cell.options)
        weights = tuple(p[k] for k in PARAMETERS)

        def forward() -> Outputs:
            y, *states = getattr(fr.reference, name)(problem.x, *weights, **options)
            return {"y": y} | final_states(states)

        def train() -> Outputs:
            y, *_, tape = getattr(fr.reference, f"{name}_forward")(problem.x, *weights, **options)
            grads = getattr(fr.reference, f"{name}_backward")(tape, problem.dy)
            return {"y": y, "dx": grads.x} | {f"d{k}": getattr(grads, k) for k in PARAMETERS}

        state = problem.zeros

        def step() -> None:
            new = getattr(fr.reference, f"{name}_cell")(problem.x[0], *state, *weights, **options)
            state[:] = new if isinstance(new, tuple) else (new,)

        def stream() -> Outputs:
            state[:] = problem.zeros
            for _ in range(CHECKED_STEPS):
                step()
            return {"h": state[0]}

        if case.work == "stream":
            yield Candidate("float64", None, step, stream)
        else:
            call = forward if case.work == "forward" else train
            yield Candidate("float64", None, call, call)
