"""Ratios of our own times, each held against a goal: what threads, backward, lengths and more cost or save.

The two calls of a ratio take turns like any candidates, and the ratio is taken within each round. Two facts
that are no times of kernels stand in the same table: the size of a tape and the time to import.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter_ns
from typing import Any

import numpy as np

from . import measure
from .engines import Candidate, Ours, Problem
from .shapes import CELLS, LAYERS, Case, Cell

Shape = tuple[int, int, int, int]  # B, T, I, H

LARGE: tuple[Shape, ...] = ((64, 100, 256, 256), (64, 50, 512, 512))
MIDDLE: tuple[Shape, ...] = ((32, 100, 256, 256),)
DIRECTIONS: tuple[Shape, ...] = ((16, 100, 128, 128), (1, 100, 256, 256))
STACKS: tuple[Shape, ...] = ((1, 100, 64, 64), (1, 100, 128, 128))
DENORMALS: tuple[Shape, ...] = ((16, 23, 256, 256),)  # 23 halvings keep float32 denormal
QUICK: tuple[Shape, ...] = ((4, 6, 8, 8),)

Peak = Callable[[], float]
Side = Callable[[], Candidate]  # one of the two calls of a ratio, made when it is their turn


@dataclass(frozen=True)
class Goal:
    """What a value is held against; `sense` is "<=" or ">="."""

    sense: str
    limit: float

    def met(self, value: float) -> bool:
        return value <= self.limit if self.sense == "<=" else value >= self.limit


@dataclass(frozen=True)
class Row:
    """A value and its goal. `values` measures it several times and says what else belongs in the result."""

    name: str
    title: str
    goal: Goal
    case: Case | None  # None: it has no shape
    values: Callable[[Peak, measure.Pace], tuple[list[float], dict[str, Any]]]
    unit: str = ""  # "s", or none

    def measure(self, peak: Peak, pace: measure.Pace) -> dict[str, Any]:
        """The row of the result. The median is what meets the goal or does not."""
        values, details = self.values(peak, pace)
        value, case = measure.spread(values), self.case
        return {
            "name": self.name,
            "title": self.title,
            "cell": case and case.cell.name,
            "work": case and case.work,
            **{letter: case and getattr(case, letter) for letter in "BTIH"},
            "dtype": case and str(case.dtype),
            "value": value,
            "unit": self.unit,
            "goal": {"sense": self.goal.sense, "limit": self.goal.limit},
            "met": self.goal.met(value["median"]),
            **details,
        }

    def __str__(self) -> str:
        return f"{self.title}: {self.case}" if self.case else self.title


def rows(
    cells: list[Cell], shapes: list[Shape] | None, dtype: np.dtype, threads: int, quick: bool, ours: Ours
) -> list[Row]:
    """The rows of a run, cell by cell, on `threads` threads where a ratio is not about them; `shapes` None
    means each ratio's own (a small one with `quick`)."""
    given = tuple(shapes) if shapes else QUICK if quick else None

    def cases(cell: Cell, own: tuple[Shape, ...], *works: str) -> Iterator[Case]:
        for b, t, i, h in given or own:
            for work in works or ("forward", "train"):
                yield Case(cell, work, b, t, i, h, dtype)

    def call(case: Case, n: int = threads, **kind: Any) -> Side:
        return partial(_call, ours, case, n, **kind)

    found: list[Row] = []

    def add(name: str, title: str, goal: Goal, case: Case, over: Side, under: Side, times: int = 1) -> None:
        found.append(Row(name, title, goal, case, partial(_ratio, over, under, times)))

    for cell in cells:
        for case in cases(cell, LARGE):
            title = f"1 thread / {threads}"
            add("threads", title, Goal(">=", 0.925 * threads), case, call(case, 1), call(case))
        for case in cases(cell, LARGE + MIDDLE, "train"):
            part = partial(_part, ours, case, threads)
            over, under = partial(part, "backward"), partial(part, "forward")
            add("backward", "backward / its forward", Goal("<=", 2.1), case, over, under)
        for case in cases(cell, MIDDLE):
            half = call(case, given={"lengths": half_lengths(case.B, case.T)})
            add("lengths", "half of the steps / all", Goal("<=", 0.6), case, half, call(case))
        for case in cases(cell, LARGE[:1]):
            double, single = (replace(case, dtype=np.dtype(name)) for name in ("float64", "float32"))
            add("float64", "float64 / float32", Goal("<=", 1 / 0.45), double, call(double), call(single))
        for case in cases(cell, DIRECTIONS):
            both = call(case, bidirectional=True)
            add("directions", "2 directions / 2 × 1", Goal("<=", 1.1), case, both, call(case), 2)
        for case in cases(cell, STACKS):
            stack = call(case, num_layers=LAYERS)
            title = f"{LAYERS} layers / {LAYERS} × 1"
            add("layers", title, Goal("<=", 0.8), case, stack, call(case), LAYERS)
        for case in cases(cell, LARGE[:1], "train"):
            size = partial(_tape_share, ours, case)
            found.append(Row("tape", "tape / (G + 3) T B H", Goal("<=", 1.0), case, size))
    for case in cases(CELLS["rnn_relu"], DENORMALS, "forward"):
        denormal, normal = (partial(_decay, ours, case, threads, h) for h in (np.finfo(dtype).tiny, 1.0))
        add("denormals", "denormals / normal numbers", Goal("<=", 1.1), case, denormal, normal)
    found.append(Row("import", "import, beyond NumPy's", Goal("<=", 0.1), None, _import_seconds, "s"))
    return found


def half_lengths(B: int, T: int) -> np.ndarray:
    """Lengths (B,), in no order, whose mean is T / 2 (rounded down over an odd batch's last)."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, T + 1, B // 2)
    return rng.permutation(np.concatenate([drawn, T - drawn, np.full(B % 2, T // 2)]))


def _call(
    ours: Ours, case: Case, threads: int, given: dict[str, object] | None = None, **options: object
) -> Candidate:
    """The case's work on a layer with `options`; `given` are more arguments of the call."""
    layer, problem = ours.layer(case, **options), Problem.draw(case)
    if layer.bidirectional:
        problem = replace(problem, dy=np.concatenate([problem.dy, problem.dy], axis=2))
    candidate: Candidate = getattr(ours, case.work)(problem, layer, threads, **(given or {}))
    return candidate


class Laps:
    """Forward + backward in one call, which counts the nanoseconds of each."""

    def __init__(self, layer: Any, problem: Problem) -> None:
        self.layer, self.problem = layer, problem
        self.spent = {"forward": 0, "backward": 0}

    def __call__(self) -> None:
        start = perf_counter_ns()
        _, _, tape = self.layer.forward(self.problem.x)
        middle = perf_counter_ns()
        self.layer.backward(tape, self.problem.dy, wrt=("x", "params"))
        self.spent["backward"] += perf_counter_ns() - middle
        self.spent["forward"] += middle - start


def _part(ours: Ours, case: Case, threads: int, part: str) -> Candidate:
    """Forward + backward, of which only `part` is timed."""
    layer, problem = ours.layer(case), Problem.draw(case)
    laps = Laps(layer, problem)
    whole = ours.train(problem, layer, threads)
    return replace(whole, setting=f"{part} amid both", call=laps, clock=lambda: laps.spent[part])


def _decay(ours: Ours, case: Case, threads: int, h0: float) -> Candidate:
    """No input, and a state that begins at `h0` and is halved in every step."""
    layer = ours.layer(case, bias=False)
    layer.params["weight_hh_l0"] = 0.5 * np.eye(case.H, dtype=case.dtype)
    problem = Problem.draw(case)
    state = np.full((1, case.B, case.H), h0, case.dtype)
    return ours.forward(replace(problem, x=np.zeros_like(problem.x)), layer, threads, state=state)


def _ratio(
    over: Side, under: Side, times: int, peak: Peak, pace: measure.Pace
) -> tuple[list[float], dict[str, Any]]:
    """The time of `over` over `times` that of `under`, round by round."""
    sides = (over(), under())
    samples, peaks = measure.rounds([(s, measure.calibrated(s, pace)[0]) for s in sides], peak, pace)
    details = [
        {"setting": side.setting, "threads": side.threads, "times": count, "seconds": measure.spread(seconds)}
        for side, count, seconds in zip(sides, (1, times), samples, strict=True)
    ]
    return (
        [a / (times * b) for a, b in zip(*samples, strict=True)],
        {"over": details[0], "under": details[1], "rounds": len(peaks), "peak_gflops": measure.spread(peaks)},
    )


def _tape_share(
    ours: Ours, case: Case, peak: Peak, pace: measure.Pace
) -> tuple[list[float], dict[str, Any]]:
    """What a tape keeps, over G + 3 values for every hidden unit of every step."""
    _, _, tape = ours.layer(case).forward(Problem.draw(case).x)
    values = (case.cell.gates + 3) * case.T * case.B * case.H
    return [tape.nbytes / (values * case.dtype.itemsize)], {"bytes": tape.nbytes}


IMPORT = """
import numpy, time
start = time.perf_counter()
import fusedrnn
print(time.perf_counter() - start)
"""


def _import_seconds(peak: Peak, pace: measure.Pace) -> tuple[list[float], dict[str, Any]]:
    """The time to import fusedrnn after NumPy, each in a process of its own; the first is not counted."""
    command = [sys.executable, "-c", IMPORT]
    outputs = [
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        for _ in range(1 + pace.least)
    ]
    return list(map(float, outputs[1:])), {}
