"""Timing: slots, rounds, the choice of each engine's best setting, and the check that comes before all of it.

A shared machine drifts, so nothing here compares two times taken far apart. Candidates take turns in short
slots; a round gives each one slot (the order rotates), a ratio is taken within each round, and its median is
reported. Before a slot the process waits until no thread of the last candidate spins, and a few calls warm
caches and threads up: the figures are those of a warm cache and an awake pool.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from .engines import Candidate, Engine, Problem
from .shapes import Case


class BenchmarkError(Exception):
    """A result that must not be timed: two engines disagree about the answer."""


@dataclass(frozen=True)
class Pace:
    """How long to measure: seconds per slot, least and most rounds, seconds for all rounds of a case."""

    slot: float
    least: int
    most: int
    seconds: float


def spread(samples: list[float] | np.ndarray) -> dict[str, float]:
    """Median, quartiles, extremes."""
    low, q1, median, q3, high = np.percentile(samples, (0, 25, 50, 75, 100))
    return {"median": float(median), "q1": float(q1), "q3": float(q3), "min": float(low), "max": float(high)}


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def settle(limit: float = 0.05) -> None:
    """Wait until the process stands still: workers spin for a while after a call and slow the next one."""
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        wall, busy = time.perf_counter(), time.process_time()
        time.sleep(1e-3)
        if time.process_time() - busy < 0.2 * (time.perf_counter() - wall):
            return


def timed(candidate: Candidate, calls: int) -> float:
    """Seconds per step, the mean over one slot of `calls` calls."""
    call = candidate.call
    settle()
    with candidate.within(), _no_collection():
        if calls > 1:  # a single call fills the slot alone: too long for caches and wake-ups to matter
            for _ in repeat(None, 1 + calls // 10):
                call()
        start = time.perf_counter_ns()
        for _ in repeat(None, calls):
            call()
        elapsed = time.perf_counter_ns() - start
    return elapsed * 1e-9 / (calls * candidate.steps)


def calibrated(candidate: Candidate, slot: float) -> tuple[int, float]:
    """How many calls fill a slot, and the seconds per step seen on the way."""
    calls = 1
    while True:
        seconds = timed(candidate, calls)
        elapsed = seconds * candidate.steps * calls
        if elapsed >= slot / 4:
            return max(1, round(calls * slot / elapsed)), seconds
        calls *= 8


SLOW = 0.1  # seconds: a call this long is told from another setting's without being repeated


def choose(candidates: list[Candidate], pace: Pace) -> tuple[Candidate, int, list[dict]]:
    """The fastest of one engine's settings, its calls per slot, and what each setting took."""
    calls, times = map(
        list, zip(*(calibrated(candidate, pace.slot) for candidate in candidates), strict=True)
    )
    if len(candidates) > 1 and min(times) < SLOW:
        for _ in range(pace.least):
            times = [min(best, timed(*pair)) for best, *pair in zip(times, candidates, calls, strict=True)]
    best = times.index(min(times))
    tried = [
        {"setting": c.setting, "threads": c.threads, "seconds": t}
        for c, t in zip(candidates, times, strict=True)
    ]
    return candidates[best], calls[best], tried


def rounds(
    entrants: list[tuple[Candidate, int]], peak: Callable[[], float], pace: Pace
) -> tuple[list[list[float]], list[float]]:
    """Seconds per step of every entrant in every round, and the machine's FMA peak (GFLOP/s) in each."""
    samples: list[list[float]] = [[] for _ in entrants]
    peaks: list[float] = []
    end = time.perf_counter() + pace.seconds
    while len(peaks) < pace.least or (len(peaks) < pace.most and time.perf_counter() < end):
        turn = len(peaks)
        settle()
        peaks.append(peak())
        for i in range(len(entrants)):
            at = (i + turn) % len(entrants)
            samples[at].append(timed(*entrants[at]))
    return samples, peaks


def bound(case: Case, output: str) -> float:
    """The largest norm-relative difference that rounding on both sides explains.

    4 max(4, ceil(log2(K T))) eps for values and twice that for gradients, K the longest reduction of a
    product (T B for parameters' gradients); doubled because neither side is exact.
    """
    gradient = output.startswith("d")
    k = {"dx": case.cell.gates * case.H}.get(output, case.T * case.B) if gradient else case.I + case.H
    return (
        2
        * 4
        * (2 if gradient else 1)
        * max(4, math.ceil(math.log2(max(k * case.T, 1))))
        * np.finfo(case.dtype).eps
    )


NATURAL_SCALE = 0.1  # of a hidden state under N(0, 1) inputs and U(+-1/sqrt(H)) weights


def check(
    problem: Problem, label: str, setting: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]
) -> dict[str, float]:
    """Norm-relative difference of every output, or a BenchmarkError naming the one that is out of bounds."""
    case, found = problem.case, {}
    if ours.keys() != theirs.keys():
        raise BenchmarkError(f"{case}: {label} gives {sorted(theirs)}, fusedrnn gives {sorted(ours)}")
    for name, a in ours.items():
        b = theirs[name]
        if a.shape != b.shape:
            raise BenchmarkError(
                f"{case}: {name} has shape {b.shape} in {label} ({setting}), {a.shape} in fusedrnn"
            )
        scale = max(float(np.linalg.norm(b)), NATURAL_SCALE * math.sqrt(b.size))
        found[name] = float(np.linalg.norm(a.astype(np.float64) - b)) / scale
        limit = bound(case, name)
        if not found[name] <= limit:
            raise BenchmarkError(
                f"{case}: {name} differs from {label} ({setting}): norm-relative difference "
                f"{found[name]:.2e}, expected at most {limit:.2e}"
            )
    return found


@dataclass
class Entrant:
    """An engine in one case: what it agreed on, and the setting it is timed in."""

    engine: Engine
    candidates: list[Candidate]
    difference: dict[str, float]
    chosen: Candidate | None = None
    calls: int = 0
    tried: list[dict] | None = None


def admit(
    problem: Problem, engines: list[Engine], threads: tuple[int, ...]
) -> tuple[list[Entrant], dict[str, str]]:
    """The engines that can do the case, their outputs checked against the first's; and why others cannot."""
    entrants, absent, expected = [], {}, None
    for engine in engines:
        reason = engine.unsupported(problem.case, threads)
        if reason:
            absent[engine.name] = reason
            continue
        candidates, difference = list(engine.candidates(problem, threads)), {}
        for candidate in candidates:
            with candidate.within():
                outputs = candidate.outputs()
            expected = outputs if expected is None else expected
            seen = check(problem, engine.label, candidate.setting, expected, outputs)
            difference = {name: max(seen[name], difference.get(name, 0.0)) for name in seen}
        entrants.append(Entrant(engine, candidates, difference))
    return entrants, absent


def run_case(
    problem: Problem,
    ours: Engine,
    peers: list[Engine],
    reference: Engine,
    peak: Callable[[], float],
    threads: tuple[int, ...],
    pace: Pace,
) -> dict:
    """Checks and times one case: its row of the result. Where no peer can, `reference` checks it, untimed."""
    case = problem.case
    entrants, absent = admit(problem, [ours, *peers], threads)
    checked = entrants if len(entrants) > 1 else admit(problem, [ours, reference], threads)[0]
    for entrant in entrants:
        entrant.chosen, entrant.calls, entrant.tried = choose(entrant.candidates, pace)
    samples, peaks = rounds([(entrant.chosen, entrant.calls) for entrant in entrants], peak, pace)
    times = np.array(samples)

    entries = {}
    for entrant, own in zip(entrants, times, strict=True):
        entries[entrant.engine.name] = {
            "setting": entrant.chosen.setting,
            "threads": entrant.chosen.threads,
            "seconds": spread(own),
            "gflops": case.flops / float(np.median(own)) * 1e-9,
            "ratio": spread(own / times[0]),
            "tried": entrant.tried,
        }
    own = entries.pop(ours.name)
    del own["ratio"]
    rivals = [name for name in entries if name != reference.name]
    return {
        "cell": case.cell.name,
        "work": case.work,
        "series": case.series,
        "B": case.B,
        "T": case.T,
        "I": case.I,
        "H": case.H,
        "dtype": str(case.dtype),
        "flops": case.flops,
        "intensity": case.intensity,
        "rounds": len(peaks),
        "peak_gflops": spread(peaks),
        # The highest peak seen: one that was disturbed must not make the share look better.
        "peak_share": spread(case.flops / times[0] * 1e-9 / max(peaks)),
        "ours": own,
        "peers": entries,
        "absent": absent,
        "best_peer": min(rivals, key=lambda name: entries[name]["ratio"]["median"], default=None),
        "difference": {entrant.engine.name: entrant.difference for entrant in checked[1:]},
    }
