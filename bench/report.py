"""The benchmark on a terminal: a heading, one aligned line per case as it is measured, and the summary."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

WORK_LABELS = {"forward": "forward", "train": "fwd+bwd", "stream": "step"}
LARGE = "B >= 16, H >= 256"


def duration(seconds: float) -> str:
    """Three digits and a unit: '0.85 µs', '12.3 ms'."""
    units = (("µs", 1e-6), ("ms", 1e-3))
    unit, scale = next(((unit, scale) for unit, scale in units if seconds < 999.5 * scale), ("s", 1.0))
    return f"{digits(seconds / scale)} {unit}"


def digits(value: float) -> str:
    """Three significant digits, never an exponent."""
    places = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 2
    return f"{value:.{min(places, 2)}f}"


def half_range(spread: dict[str, float]) -> float:
    """Half the distance between the quartiles."""
    return (spread["q3"] - spread["q1"]) / 2


def threads_label(entry: dict[str, Any]) -> str:
    return "auto" if entry["threads"] is None else str(entry["threads"])


class Table:
    """Lines of fixed columns; the heading is known before the first row is measured."""

    def __init__(self, peers: dict[str, str]) -> None:
        self.peers = peers
        self.columns = [
            ("cell", -16),
            ("work", -7),
            ("B,T,I,H", -16),
            ("time", 8),
            ("±%", 3),
            ("thr", 3),
            ("GFLOP/s", 7),
            ("peak", 5),
        ]
        self.groups = [sum(abs(width) + 2 for _, width in self.columns)]
        for _ in peers:
            self.columns += [("|", 1), ("time", 8), ("thr", 4), ("ratio", 5), ("±", 4)]

    def heading(self) -> str:
        group = " " * self.groups[0]
        for label in self.peers.values():
            group += f"|  {label:<27}"
        return f"{group.rstrip()}\n{self._line(name for name, _ in self.columns)}"

    def row(self, row: dict[str, Any]) -> str:
        ours = row["ours"]
        seconds = ours["seconds"]
        shape = ",".join(str(row[k]) for k in "BTIH")
        cells = [
            row["cell"],
            WORK_LABELS[row["work"]],
            shape,
            duration(seconds["median"]),
            f"{100 * half_range(seconds) / seconds['median']:.0f}",
            threads_label(ours),
            digits(ours["gflops"]),
            f"{100 * row['peak_share']['median']:.0f} %",
        ]
        for name in self.peers:
            cells.append("|")
            entry = row["peers"].get(name)
            if entry is None:
                cells += ["", "", "-", ""]
            else:
                cells += [
                    duration(entry["seconds"]["median"]),
                    threads_label(entry),
                    digits(entry["ratio"]["median"]),
                    digits(half_range(entry["ratio"])),
                ]
        return self._line(cells)

    def _line(self, cells: Iterable[str]) -> str:
        return _aligned(self.columns, cells)


def _aligned(columns: list[tuple[str, int]], cells: Iterable[str]) -> str:
    """Cells under (name, width) columns; a negative width aligns to the left."""
    padded = (
        f"{text:<{-width}}" if width < 0 else f"{text:>{width}}"
        for text, (_, width) in zip(cells, columns, strict=True)
    )
    return "  ".join(padded).rstrip()


RATIO_COLUMNS = [
    ("of our own times", -26),
    ("cell", -16),
    ("work", -7),
    ("B,T,I,H", -16),
    ("dtype", -7),
    ("thr", 3),
    ("time", 8),
    ("over", 12),
    ("ratio", 7),
    ("±", 7),
    ("goal", 9),
    ("met", 3),
]


def ratio_cells(row: dict[str, Any]) -> list[str]:
    """A row of ratios.py under RATIO_COLUMNS."""
    show = duration if row["unit"] == "s" else digits
    cells = [row["title"], *["-"] * 4, *[""] * 3]
    if row["cell"]:
        shape = ",".join(str(row[k]) for k in "BTIH")
        cells[1:5] = [row["cell"], WORK_LABELS[row["work"]], shape, row["dtype"]]
    if "over" in row:
        over, under = row["over"], row["under"]
        times = f"{under['times']} × " if under["times"] > 1 else ""
        cells[5:] = [
            "/".join(dict.fromkeys(map(threads_label, (over, under)))),
            duration(over["seconds"]["median"]),
            times + duration(under["seconds"]["median"]),
        ]
    goal = row["goal"]
    return [
        *cells,
        show(row["value"]["median"]),
        show(half_range(row["value"])),
        f"{goal['sense']} {show(goal['limit'])}",
        "yes" if row["met"] else "NO",
    ]


def ratio_heading() -> str:
    return _aligned(RATIO_COLUMNS, (name for name, _ in RATIO_COLUMNS))


def ratio_line(row: dict[str, Any]) -> str:
    return _aligned(RATIO_COLUMNS, ratio_cells(row))


GOAL_COLUMNS = [
    ("held against", -26),
    ("cell", -16),
    ("work", -7),
    ("at", -16),
    ("value", 7),
    ("goal", 9),
    ("met", 3),
    ("at the roof", 11),
]


def goal_cells(row: dict[str, Any]) -> list[str]:
    """A row of goals.py under GOAL_COLUMNS."""
    return [
        row["title"],
        row["cell"],
        WORK_LABELS[row["work"]],
        row["at"],
        digits(row["value"]),
        f"{row['goal']['sense']} {digits(row['goal']['limit'])}",
        "yes" if row["met"] else "NO",
        digits(row["roof"]),
    ]


def goal_lines(rows: list[dict[str, Any]]) -> list[str]:
    heading = _aligned(GOAL_COLUMNS, (name for name, _ in GOAL_COLUMNS))
    return [heading, *(_aligned(GOAL_COLUMNS, goal_cells(row)) for row in rows)]


def goals_met(rows: list[dict[str, Any]]) -> str:
    return f"{sum(row['met'] for row in rows)} of {len(rows)} goals met"


def absences(rows: list[dict[str, Any]], labels: dict[str, str]) -> list[str]:
    """What a "-" in the table stands for: each peer's reasons, once."""
    found = ((name, reason) for row in rows for name, reason in row["absent"].items())
    return [f"-: {labels[name]} {reason}" for name, reason in dict.fromkeys(found)]


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per cell and work: geometric mean and least of the ratio to each peer and to the best peer of each
    case, and the least share of the peak among large cases. Sweeps are left out."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["series"] in ("standard", "given"):
            groups.setdefault((row["cell"], row["work"]), []).append(row)

    found = []
    for (cell, work), members in groups.items():
        names = list(dict.fromkeys(name for row in members for name in row["peers"]))
        ratios = {
            name: [(row["peers"][name]["ratio"]["median"], row) for row in members if name in row["peers"]]
            for name in names
        }
        ratios = {
            "best": [
                (row["peers"][row["best_peer"]]["ratio"]["median"], row)
                for row in members
                if row["best_peer"]
            ]
        } | ratios
        entry: dict[str, Any] = {"cell": cell, "work": work, "cases": len(members), "against": {}}
        for name, pairs in ratios.items():
            if pairs:
                worst, row = min(pairs, key=lambda pair: pair[0])
                entry["against"][name] = {
                    "cases": len(pairs),
                    "geometric_mean": geometric_mean([ratio for ratio, _ in pairs]),
                    "worst": worst,
                    "worst_shape": [row[k] for k in "BTIH"],
                }
        shares = [row["peak_share"]["median"] for row in members if row["B"] >= 16 and row["H"] >= 256]
        entry["large_peak_share"] = min(shares) if shares else None
        found.append(entry)
    return found


def summarises(summary: list[dict[str, Any]], labels: dict[str, str]) -> bool:
    """Whether the summary says anything."""
    return any(labels or entry["large_peak_share"] is not None for entry in summary)


def summary_lines(summary: list[dict[str, Any]], labels: dict[str, str]) -> list[str]:
    """The summary as text: how many times faster than the best peer of each case, then than each peer.

    Without peers only the shares of the peak are left, and nothing where no case is large.
    """
    if not summarises(summary, labels):
        return []
    against = ({"best": "best of peers"} | labels) if labels else {}
    top = f"{'':<16}  {'':<7}  {'':>5}"
    heading = f"{'cell':<16}  {'work':<7}  {'cases':>5}"
    for name, label in against.items():
        at = f"  {'at B,T,I,H':<16}" if name == "best" else ""
        top += f"  |  {label + ' ' * len(at):<12}"
        heading += f"  |  {'mean':>5}  {'worst':>5}{at}"
    lines = [f"{heading}  |  least peak, {LARGE}"]
    if labels:
        lines = ["How many times faster than the peers (geometric mean and worst case)", top.rstrip(), *lines]
    for entry in summary:
        line = f"{entry['cell']:<16}  {WORK_LABELS[entry['work']]:<7}  {entry['cases']:>5}"
        for name in against:
            found = entry["against"].get(name)
            mean, worst = (digits(found["geometric_mean"]), digits(found["worst"])) if found else ("-", "-")
            line += f"  |  {mean:>5}  {worst:>5}"
            if name == "best":
                line += f"  {','.join(map(str, found['worst_shape'])) if found else '':<16}"
        share = entry["large_peak_share"]
        lines.append(f"{line}  |  {'-' if share is None else f'{100 * share:.0f} %'}")
    return lines
