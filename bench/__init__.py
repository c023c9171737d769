"""`fusedrnn bench`: forward, forward + backward and a streaming step, timed against peak, peers and goals.

    shapes    which cases there are, and the arithmetic of each
    engines   what is compared: fusedrnn and its reference; peers   PyTorch, ONNX Runtime, JAX
    measure   checks, slots, rounds, ratios;                machine  cores, caches, versions, bandwidths
    ratios    our own times over each other, against goals;   goals   peers' times and the peak, likewise
    report    the terminal;                                 page, plots   files
    merge     several runs as one result

Every figure is a median over rounds in which all candidates take turns, each on its best thread count; every
ratio is taken within a round. Results are compared before they are timed: a disagreement ends the run with
status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fusedrnn import _check, _core
from fusedrnn._cli import CommandError, natural, positive_float, writable_folder

from . import goals, machine, measure, merge, ratios, report
from .engines import Engine, Ours, Problem
from .peers import DEFAULT_PEERS, PEERS
from .shapes import CELLS, DEFAULT_CELLS, DEFAULT_WORK, WORK, Case, cases, largest

SCHEMA = 1

Todo = TypeVar("Todo")


def _names(known: tuple[str, ...] | list[str], text: str) -> list[str]:
    """A comma-separated choice among `known`, in the order given."""
    chosen = list(dict.fromkeys(text.split(",")))
    for name in chosen:
        if name not in known:
            raise argparse.ArgumentTypeError(f"must be among {','.join(known)}, got {name!r}")
    return chosen


def _shape(text: str) -> tuple[int, int, int, int]:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"must be B,T,I,H, four positive integers, got {text!r}")
    b, t, i, h = map(int, parts)
    if largest(b, t, i, h) * 8 > sys.maxsize:  # all are drawn in float64
        raise argparse.ArgumentTypeError(
            f"must be B,T,I,H whose arrays take at most {sys.maxsize} bytes each, got {text!r}"
        )
    return b, t, i, h


def _threads(text: str) -> int:
    n = 0 if text == "auto" else natural(text)
    if n > _check.MAX_THREADS:
        raise argparse.ArgumentTypeError(f"must be at most {_check.MAX_THREADS}, got {text!r}")
    return n


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fusedrnn bench` to `parser`."""
    add = parser.add_argument
    add(
        "--cell",
        type=partial(_names, list(CELLS)),
        default=list(DEFAULT_CELLS),
        metavar="NAMES",
        help=f"comma-separated, of {','.join(CELLS)} (default: {','.join(DEFAULT_CELLS)})",
    )
    add(
        "--shape",
        type=_shape,
        action="append",
        metavar="B,T,I,H",
        help="may be given several times; a step uses B, I and H (default: ten standard shapes)",
    )
    add(
        "--what",
        type=partial(_names, list(WORK)),
        default=list(DEFAULT_WORK),
        metavar="WORK",
        help="comma-separated, of forward, train (forward + backward), stream (one step from Python), "
        "sweep (forward of the first cell over T, B and H one at a time) and ratios (of our own times, "
        "against goals) "
        f"(default: {','.join(DEFAULT_WORK)})",
    )
    add("--dtype", choices=("float32", "float64"), default="float32", help="(default: float32)")
    add(
        "--threads",
        type=_threads,
        default=0,
        metavar="N",
        help="threads of every engine; 0 or auto: each tries 1 and all cores and keeps its best (default)",
    )
    add(
        "--peers",
        type=partial(_names, [*PEERS, "none"]),
        metavar="NAMES",
        help=f"comma-separated, of {','.join(PEERS)}, or none (default: {','.join(DEFAULT_PEERS)})",
    )
    add(
        "--unfrozen",
        action="store_true",
        help="forward calls the layer, which packs its weights every time, in place of a frozen one",
    )
    add(
        "--seconds",
        type=positive_float,
        default=300.0,
        metavar="S",
        help="for all timed rounds together; every case gets at least five rounds, and preparing and "
        "checking it come on top (default: 300)",
    )
    add(
        "--quick",
        action="store_true",
        help="a few short rounds of small shapes: whether all works, not how fast",
    )
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    add(
        "--plot",
        type=Path,
        metavar="DIR",
        help="write figures (SVG; needs matplotlib) and a page that shows them",
    )
    add(
        "--from",
        dest="source",
        type=Path,
        action="append",
        metavar="FILE",
        help="measure nothing: read a file that --json wrote; given several times, each case is taken from "
        "the run with the median ratio to its best peer",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark; 0, or 1 where two engines disagree about a result."""
    if args.plot:
        _require_matplotlib()
        writable_folder("--plot", args.plot)
    if args.json:
        _require_writable(args.json)
    if args.source:
        try:
            result = merge.merged([_read(path) for path in args.source])
        except merge.MergeError as error:
            raise CommandError(f"--from: {error}") from error
    else:
        try:
            result = _measure(args)
        except measure.BenchmarkError as error:
            print(f"fusedrnn bench: {error}", file=sys.stderr)
            return 1
    labels = {name: peer["label"] for name, peer in result["peers"].items()}
    summary = report.summary_lines(result["summary"], labels)
    if summary:
        print("", *summary, sep="\n")
    judged = [] if result["settings"]["quick"] else goals.rows(result["cases"], result["roofs"])
    if judged:
        print("", *report.goal_lines(judged), sep="\n")
        print(f"\nAgainst peers and the peak: {report.goals_met(judged)}")
    if result.get("ratios"):  # a result may be older than they are
        if args.source:
            print("", report.ratio_heading(), *map(report.ratio_line, result["ratios"]), sep="\n")
        print(f"\nRatios of our own times: {report.goals_met(result['ratios'])}")

    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        from . import page, plots

        figures = plots.draw(result, args.plot)
        written = page.write(result, judged, figures, args.plot)
        print(f"\nwritten: {', '.join(sorted([*figures, written]))}")
    return 0


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise CommandError("--plot needs matplotlib: pip install 'fusedrnn[plot]'") from error


def _require_writable(path: Path) -> None:
    """Found out now, not after the measuring. What the file holds stays; none is left that was not there."""
    if not path.parent.is_dir():
        raise CommandError(f"--json: there is no folder {path.parent}")
    try:
        if path.is_fifo():  # its reader would take the end of this for the end of the result
            return
        new = not os.path.lexists(path)
        path.open("ab").close()
    except OSError as error:
        raise CommandError(f"--json {path}: {error.strerror}") from None
    if new:
        path.unlink()


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CommandError(f"--from: {path} is no JSON: {error}") from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise CommandError(f"--from: {path} is not a result of fusedrnn bench --json (schema {SCHEMA})")
    return result


def _peers(named: list[str] | None) -> tuple[list[Engine], list[str]]:
    """The peers to measure, and the labels of those left out because they are not installed."""
    if named and "none" in named:
        if len(named) > 1:
            raise CommandError(f"--peers: none goes with no other name, got {','.join(named)}")
        return [], []
    found: list[Engine] = []
    absent: list[str] = []
    for name in named or DEFAULT_PEERS:
        peer = PEERS[name]
        missing = peer.missing()
        if not missing:
            found.append(peer)
        elif named:
            raise CommandError(
                f"--peers: {name} needs {' and '.join(missing)}: pip install 'fusedrnn[peers]'"
            )
        else:
            absent.append(peer.label)
    return found, absent


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    peers, absent = _peers(args.peers)
    dtype, cells = np.dtype(args.dtype), [CELLS[name] for name in args.cell]
    todo = cases(cells, args.what, args.shape, dtype, args.quick)
    if not todo:
        peers, absent = [], []  # ratios need none
    threads = (args.threads,) if args.threads else tuple(dict.fromkeys((1, machine.cores())))
    ours = Ours(frozen=not args.unfrozen)
    own = (
        ratios.rows(cells, args.shape, dtype, max(threads), args.quick, ours) if "ratios" in args.what else []
    )
    if args.quick:
        pace = measure.Pace(slot=5e-4, least=3, most=3, seconds=0, quiet=0)
    else:
        pace = measure.Pace(slot=2.5e-2, least=5, most=101, seconds=args.seconds / len([*todo, *own]))

    versions = {module: v for peer in peers for module, v in peer.versions().items()}
    result: dict[str, Any] = {"schema": SCHEMA, "machine": machine.describe(versions)}
    result["settings"] = {
        "dtype": args.dtype,
        "threads_tried": list(threads),
        "frozen": not args.unfrozen,
        "seconds": args.seconds,
        "quick": args.quick,
    }
    result["peers"] = {peer.name: {"label": peer.label} for peer in peers}
    result["roofs"] = machine.roofs(max(threads)) if args.json or args.plot else []
    peak = _Highest(partial(_core.fma_peak, dtype, max(threads)))
    print(_preface(result, absent, peak(), bool(todo), bool(own)))

    table = report.Table({peer.name: peer.label for peer in peers})

    def run_case(case: Case) -> dict[str, Any]:
        return measure.run_case(Problem.draw(case), ours, peers, PEERS["reference"], peak, threads, pace)

    result["cases"] = _in_turn(todo, run_case, table.heading, table.row)
    for reason in report.absences(result["cases"], table.peers):
        print(reason)
    if todo and own:
        print()
    result["ratios"] = _in_turn(
        own, lambda row: row.measure(peak, pace), report.ratio_heading, report.ratio_line
    )
    result["summary"] = report.summarise(result["cases"])
    return result


def _in_turn(
    todo: list[Todo],
    measured: Callable[[Todo], dict[str, Any]],
    heading: Callable[[], str],
    line: Callable[[dict[str, Any]], str],
) -> list[dict[str, Any]]:
    """Measures one after the other and prints each as a line of a table."""
    rows = []
    start = time.perf_counter()
    for done, item in enumerate(todo):
        if not done:
            print(heading(), flush=True)
        _status(f"{done + 1} of {len(todo)}: {item}  ({time.perf_counter() - start:.0f} s)")
        rows.append(measured(item))
        _status("")
        print(line(rows[-1]), flush=True)
    return rows


class _Highest:
    """The highest value so far: the machine's peak is not what a disturbed moment leaves of it."""

    def __init__(self, measure: Callable[[], float]) -> None:
        self.measure, self.value = measure, 0.0

    def __call__(self) -> float:
        self.value = max(self.value, self.measure())
        return self.value


def _preface(result: dict[str, Any], absent: list[str], peak: float, cases: bool, own: bool) -> str:
    m, s = result["machine"], result["settings"]
    tried = " and ".join(map(str, s["threads_tried"]))
    lines = [
        f"{m['cpu']}, {m['cores']} cores, {m['isa']}; {s['dtype']}; FMA peak {peak:.0f} GFLOP/s on "
        f"{max(s['threads_tried'])} threads",
        ", ".join(f"{name} {v}" for name, v in m["versions"].items()),
    ]
    if cases:
        several = len(s["threads_tried"]) > 1
        lines += [
            f"threads: each engine's best of {tried}" if several else f"threads: {tried}",
            "time: median over rounds, ±% half its interquartile range",
            "GFLOP/s: matrix products only; peak: the share of the FMA peak",
            "ratio: the peer's time over ours within each round, median ± half its interquartile range",
        ]
    if own:
        lines.append(
            "of our own times: one over the other within each round, median ± half its interquartile range; "
            "the median meets the goal or does not"
        )
    if absent:
        lines.append(f"not installed: {', '.join(absent)} (pip install 'fusedrnn[peers]')")
    if s["quick"]:
        lines.append("--quick: too short to judge speed by")
    return "\n".join(lines) + "\n"


def _status(text: str) -> None:
    """One line that the next overwrites, where someone is watching."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
