"""What the standard cases are held against: peers' times and the peak. Meant for float32 on AVX-512.

Each row has one value and its goal, as those of ratios.py have, but measures nothing: it judges cases that
were measured already. Beside the value stands what it would be at the roof: the machine's peak, or the rate
of the cache that holds the weights of a step, whichever takes longer. A goal above that cannot be met there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .ratios import Goal
from .report import geometric_mean
from .shapes import CELLS

GRU = (1.8, 1.1)
# (cell, work): geometric mean and worst case of the best peer's time over ours
AGAINST_BEST = {
    "forward": {"lstm": (1.3, 1.0), "gru": GRU, "gru_reset_before": GRU, "rnn": (2.0, 1.1)},
    "train": {"lstm": (2.0, 1.08), "gru": (5.0, 1.5), "gru_reset_before": (5.0, 1.5), "rnn": (4.0, 1.3)},
}
# a step from Python, B = 1: ONNX Runtime's time over ours at H up to 64, at 128, 256, 512 and 1024
STEP_SIZES = (64, 128, 256, 512, 1024)
AGAINST_STEP = {
    "lstm": (5.0, 4.0, 3.5, 2.0, 1.2),
    "gru": (6.0, 3.5, 2.8, 1.5, 1.1),
    "gru_reset_before": (6.0, 3.5, 2.8, 1.5, 1.1),
    "rnn": (6.0, 4.0, 2.5, 1.5, 1.0),
}
STEP_PEER = "onnxruntime"
PEAK_SHARE = {"forward": 0.90, "train": 0.85}  # of B >= 16, H >= 256


def roof_seconds(case: dict[str, Any], roofs: list[dict[str, Any]]) -> float:
    """The least time that the roofs of machine.py allow for a measured case; see shapes.Case.traffic."""
    arithmetic = float(case["flops"] / case["peak_gflops"]["max"] * 1e-9)
    if not roofs:
        return arithmetic
    depth = case["H"] + (case["I"] if case["work"] == "stream" else 0)  # of the products of a step
    itemsize = np.dtype(case["dtype"]).itemsize
    share = CELLS[case["cell"]].gates * case["H"] * depth * itemsize / roofs[0]["threads"]
    holds = [roof for roof in roofs if 2 * roof["bytes"] >= share]  # roofs are of half a cache
    rate = float((holds or roofs[-1:])[0]["gb_per_s"])
    return max(arithmetic, float(case["flops"] / case["intensity"] / rate * 1e-9))


def rows(cases: list[dict[str, Any]], roofs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals that the standard cases among `cases` let one judge."""
    standard = [case for case in cases if case["series"] == "standard"]
    found: list[dict[str, Any]] = []

    def add(title: str, case: dict[str, Any], at: str, value: float, limit: float, roof: float) -> None:
        goal = Goal(">=", limit)
        found.append(
            {
                "title": title,
                "cell": case["cell"],
                "work": case["work"],
                "at": at,
                "value": value,
                "roof": roof,
                "goal": {"sense": goal.sense, "limit": limit},
                "met": goal.met(value),
            }
        )

    def headroom(case: dict[str, Any]) -> float:
        """How many times faster we would be at the roof."""
        return float(case["ours"]["seconds"]["median"] / roof_seconds(case, roofs))

    def shape(case: dict[str, Any]) -> str:
        return ",".join(str(case[k]) for k in "BTIH")

    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in standard:
        groups.setdefault((case["cell"], case["work"]), []).append(case)
    for (cell, work), members in groups.items():
        judged = [(c["peers"][c["best_peer"]]["ratio"]["median"], c) for c in members if c["best_peer"]]
        mean, worst = AGAINST_BEST.get(work, {}).get(cell, (None, None))
        if judged and mean and worst:
            ratio, case = min(judged, key=lambda pair: pair[0])
            shapes = f"{len(judged)} shapes"
            at_roof = geometric_mean([r * headroom(c) for r, c in judged])
            ours = geometric_mean([r for r, _ in judged])
            add("best peer, geometric mean", case, shapes, ours, mean, at_roof)
            add("best peer, worst shape", case, shape(case), ratio, worst, ratio * headroom(case))
        large = [c for c in members if c["B"] >= 16 and c["H"] >= 256]
        if large and work in PEAK_SHARE:
            case = min(large, key=lambda c: float(c["peak_share"]["median"]))
            share = case["peak_share"]["median"]
            add("share of the peak", case, shape(case), share, PEAK_SHARE[work], share * headroom(case))
        if work == "stream" and cell in AGAINST_STEP:
            for case in members:
                entry = case["peers"].get(STEP_PEER)
                limits = zip(STEP_SIZES, AGAINST_STEP[cell], strict=True)
                limit = next((limit for size, limit in limits if case["H"] <= size), None)
                if limit and entry:
                    ratio = entry["ratio"]["median"]
                    add("ONNX Runtime's step", case, f"H = {case['H']}", ratio, limit, ratio * headroom(case))
    return found
