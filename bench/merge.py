"""Several results of `fusedrnn bench --json` as one.

A shared machine has bad minutes, and a case that falls into one is measured wrong however many rounds it has.
So a page is made of runs taken some time apart, and each case counts as it was in the run whose ratio to the
best peer is the median (without peers: whose time is); of an even number of runs, in the worse middle one. It
is a whole row of one run, and never a mixture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import report

MACHINE = ("cpu", "cores", "caches", "system", "architecture", "isa")
SETTINGS = ("dtype", "threads_tried", "frozen", "quick")
CASE = ("cell", "work", "series", "B", "T", "I", "H", "dtype")
RATIO = ("name", "title", "cell", "work", "B", "T", "I", "H", "dtype")

Row = dict[str, Any]


class MergeError(Exception):
    """Results that cannot stand on one page."""


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of all; a single one as it is. MergeError where machines, settings or versions differ."""
    if len(results) == 1:
        return results[0]
    first = results[0]
    versions: dict[str, str] = {}
    for result in results:
        for part, names in (("machine", MACHINE), ("settings", SETTINGS)):
            for name in names:
                if result[part][name] != first[part][name]:
                    raise MergeError(
                        f"{part}'s {name} differs: {first[part][name]!r} and {result[part][name]!r}"
                    )
        for module, version in result["machine"]["versions"].items():
            if versions.setdefault(module, version) != version:
                raise MergeError(f"{module} differs: {versions[module]} and {version}")
    dates = sorted({result["machine"]["date"] for result in results})
    date = " to ".join(dates[:: len(dates) - 1 or 1])
    seconds = sum(result["settings"]["seconds"] for result in results)
    found = first | {
        "machine": first["machine"] | {"date": date, "versions": versions},
        "settings": first["settings"] | {"seconds": seconds},
        "peers": {name: peer for result in results for name, peer in result["peers"].items()},
        "roofs": _roofs([result["roofs"] for result in results]),
        "cases": _middle([result["cases"] for result in results], CASE, _merit),
        "ratios": _middle([result.get("ratios", []) for result in results], RATIO, _goodness),
    }
    return found | {"summary": report.summarise(found["cases"])}


def _middle(runs: list[list[Row]], key: tuple[str, ...], merit: Callable[[Row], float]) -> list[Row]:
    """Of the rows that are alike in `key` the one of median merit, and in how many runs there were such."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for rows in runs:
        for row in rows:
            groups.setdefault(tuple(row[name] for name in key), []).append(row)
    return [
        sorted(rows, key=merit)[(len(rows) - 1) // 2] | {"runs": sum(row.get("runs", 1) for row in rows)}
        for rows in groups.values()
    ]


def _merit(case: Row) -> float:
    if case["best_peer"]:
        ratio: float = case["peers"][case["best_peer"]]["ratio"]["median"]
        return ratio
    return -float(case["ours"]["seconds"]["median"])


def _goodness(ratio: Row) -> float:
    return float(ratio["value"]["median"]) * (1 if ratio["goal"]["sense"] == ">=" else -1)


def _roofs(runs: list[list[Row]]) -> list[Row]:
    """The highest rate seen of each level."""
    best: dict[str, Row] = {}
    for roofs in runs:
        for roof in roofs:
            if roof["gb_per_s"] > best.get(roof["level"], {"gb_per_s": 0})["gb_per_s"]:
                best[roof["level"]] = roof
    return list(best.values())
