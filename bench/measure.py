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
from dataclasses import dataclass, replace
from itertools import repeat
from operator import itemgetter
from typing import Any

import numpy as np

from .engines import Candidate, Engine, Outputs, Problem
from .shapes import Case


class BenchmarkError(Exception):
    """A result that must not be timed: two engines disagree about the answer."""


@dataclass(frozen=True)
class Pace:
    """How long to measure: seconds per slot, least and most rounds, seconds for all rounds of a case.

    quiet: seconds that a slot waits at most until the process stands still.
    """

    slot: float
    least: int
    most: int
    seconds: float
    quiet: float = 1.0


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


QUIET = 0.012  # seconds: three ticks of a 250 Hz kernel, which counts another thread's time at ticks only


def settle(limit: float) -> None:
    """Wait until the process stands still: workers spin after a call, some for 0.1 s, and slow the next."""
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        wall, busy = time.perf_counter(), time.process_time()
        time.sleep(QUIET)
        if time.process_time() - busy < 0.1 * (time.perf_counter() - wall):
            return


SLOW = 0.1  # seconds: in a call this long caches and wake-ups do not matter


def timed(candidate: Candidate, calls: int, quiet: float) -> float:
    """Seconds per step, the mean over one slot of `calls` calls; `quiet`: see Pace."""
    call, clock = candidate.call, candidate.clock
    settle(quiet)
    with candidate.within(), _no_collection():
        start = time.perf_counter()
        for _ in repeat(None, 2 + calls // 10):  # the slot before, or the wait, left caches cold
            call()
            if time.perf_counter() - start > SLOW:
                break
        begin = clock()
        for _ in repeat(None, calls):
            call()
        elapsed = clock() - begin
    return elapsed * 1e-9 / (calls * candidate.steps)


def calibrated(candidate: Candidate, pace: Pace) -> tuple[int, float]:
    """How many calls fill a slot, and the seconds per step seen on the way."""
    calls = 1
    while True:
        seconds = timed(candidate, calls, pace.quiet)
        elapsed = seconds * candidate.steps * calls
        if elapsed >= pace.slot / 4:
            return max(1, round(calls * pace.slot / elapsed)), seconds
        calls *= 8


def turns(pace: Pace) -> Iterator[int]:
    """The numbers of the rounds that `pace` allows."""
    end = time.perf_counter() + pace.seconds
    for turn in range(max(pace.least, pace.most)):
        if turn >= pace.least and time.perf_counter() >= end:
            return
        yield turn


def one_round(turn: int, entrants: list[tuple[Candidate, int]], pace: Pace) -> list[float]:
    """One round: seconds per step of every entrant. The order rotates from turn to turn."""
    order = [(i + turn) % len(entrants) for i in range(len(entrants))]
    taken = {at: timed(*entrants[at], pace.quiet) for at in order}
    return [taken[at] for at in range(len(entrants))]


CONTEST = 15  # rounds at most between settings of one engine that cannot be told apart


def choose(candidates: list[Candidate], pace: Pace) -> tuple[Candidate, int, list[dict[str, Any]]]:
    """The setting of one engine whose median is least, its calls per slot, and what each setting took.

    Settings take turns; those whose quartiles overlap the fastest's go on with it after the others are out.
    """
    trials = [calibrated(candidate, pace) for candidate in candidates]
    entrants = [(candidate, calls) for candidate, (calls, _) in zip(candidates, trials, strict=True)]
    samples = [[seconds] for _, seconds in trials]
    least = min(seconds for _, seconds in trials)
    # Slow calls are not repeated where one is enough to tell them apart.
    racing = [at for at, (_, seconds) in enumerate(trials) if least < SLOW or seconds < 2 * least]
    for turn in turns(replace(pace, most=CONTEST)):
        if len(racing) == 1:
            break
        taken = one_round(turn, [entrants[at] for at in racing], pace)
        for at, seconds in zip(racing, taken, strict=True):
            samples[at].append(seconds)
        if turn + 1 >= pace.least:
            found = {at: spread(samples[at]) for at in racing}
            limit = min(found.values(), key=itemgetter("median"))["q3"]
            racing = [at for at in racing if found[at]["q1"] <= limit]
    medians = [spread(own)["median"] for own in samples]
    best = min(racing, key=medians.__getitem__)
    tried = [
        {"setting": c.setting, "threads": c.threads, "seconds": t}
        for c, t in zip(candidates, medians, strict=True)
    ]
    return *entrants[best], tried


def rounds(
    entrants: list[tuple[Candidate, int]], peak: Callable[[], float], pace: Pace
) -> tuple[list[list[float]], list[float]]:
    """Seconds per step of every entrant in every round, and the machine's FMA peak (GFLOP/s) in each."""
    samples: list[list[float]] = [[] for _ in entrants]
    peaks: list[float] = []
    for turn in turns(pace):
        settle(pace.quiet)
        peaks.append(peak())
        for own, seconds in zip(samples, one_round(turn, entrants, pace), strict=True):
            own.append(seconds)
    return samples, peaks


def bound(case: Case, output: str) -> float:
    """The largest norm-relative difference that rounding on both sides explains.

    4 max(4, ceil(log2(K T))) eps for values and twice that for gradients, K the longest reduction of a
    product (T B for parameters' gradients); doubled because neither side is exact.
    """
    gradient = output.startswith("d")
    k = {"dx": case.cell.gates * case.H}.get(output, case.T * case.B) if gradient else case.I + case.H
    chain = max(4, math.ceil(math.log2(max(k * case.T, 1))))
    return 2 * 4 * (2 if gradient else 1) * chain * float(np.finfo(case.dtype).eps)


NATURAL_SCALE = 0.1  # of a hidden state under N(0, 1) inputs and U(+-1/sqrt(H)) weights


def check(
    problem: Problem, label: str, setting: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]
) -> dict[str, float]:
    """Norm-relative difference of every output, or a BenchmarkError naming the one that is out of bounds."""
    case = problem.case
    found: dict[str, float] = {}
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
    """An engine in one case, its settings, and how far its outputs are from the first engine's."""

    engine: Engine
    candidates: list[Candidate]
    difference: dict[str, float]


def admit(
    problem: Problem, engines: list[Engine], threads: tuple[int, ...]
) -> tuple[list[Entrant], dict[str, str]]:
    """The engines that can do the case, their outputs checked against the first's; and why others cannot."""
    entrants: list[Entrant] = []
    absent: dict[str, str] = {}
    expected: Outputs | None = None
    for engine in engines:
        reason = engine.unsupported(problem.case, threads)
        if reason:
            absent[engine.name] = reason
            continue
        candidates = list(engine.candidates(problem, threads))
        difference: dict[str, float] = {}
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
) -> dict[str, Any]:
    """Checks and times one case: its row of the result. Where no peer can, `reference` checks it, untimed."""
    case = problem.case
    entrants, absent = admit(problem, [ours, *peers], threads)
    checked = entrants if len(entrants) > 1 else admit(problem, [ours, reference], threads)[0]
    chosen = [choose(entrant.candidates, pace) for entrant in entrants]
    samples, peaks = rounds([(candidate, calls) for candidate, calls, _ in chosen], peak, pace)
    times = np.array(samples)

    entries: dict[str, dict[str, Any]] = {}
    for entrant, (candidate, _, tried), seconds in zip(entrants, chosen, times, strict=True):
        entries[entrant.engine.name] = {
            "setting": candidate.setting,
            "threads": candidate.threads,
            "seconds": spread(seconds),
            "gflops": case.flops / float(np.median(seconds)) * 1e-9,
            "ratio": spread(seconds / times[0]),
            "tried": tried,
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
