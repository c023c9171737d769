"""The cases a benchmark measures: which cell, which work, which shape, and the arithmetic each needs.

Only shapes and counts live here; nothing is timed and no peer is known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import fusedrnn as fr

# B, T, I, H
STANDARD = (
    (1, 100, 64, 64),
    (1, 100, 256, 256),
    (1, 100, 512, 512),
    (1, 50, 1024, 1024),
    (16, 100, 128, 128),
    (32, 100, 256, 256),
    (64, 100, 256, 256),
    (64, 50, 512, 512),
    (128, 30, 1024, 1024),
    (256, 50, 32, 64),
)
QUICK = ((1, 20, 64, 64), (16, 10, 96, 96))
STREAM_SIZES = (16, 32, 64, 128, 256, 512, 1024)

# One of T, B, H varies, the others stay: sizes that fill no vector are in it on purpose.
SWEEPS = {
    "T": [(16, t, 128, 128) for t in (5, 10, 20, 50, 100, 200, 500)],
    "B": [(b, 50, 256, 256) for b in (1, 2, 3, 4, 5, 6, 8, 12, 16, 20, 32, 64, 128)],
    "H": [(16, 50, h, h) for h in (16, 32, 48, 64, 96, 128, 200, 256, 384, 512, 800, 1024)],
}

LAYERS = 4  # of a stack, of which there are ratios

WORK = ("forward", "train", "stream", "sweep", "ratios")
DEFAULT_WORK = ("forward", "train", "stream")


@dataclass(frozen=True)
class Cell:
    """A cell by the benchmark's name: its name in fusedrnn.reference.CELLS, its layer's class and options."""

    name: str
    registered: str
    layer: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def gates(self) -> int:
        return fr.reference.CELLS[self.registered].gates

    @property
    def states(self) -> int:
        """1 (h) or 2 (h and c)."""
        return fr.reference.CELLS[self.registered].states


CELLS = {
    cell.name: cell
    for cell in (
        Cell("lstm", "lstm", "LSTM"),
        Cell("gru", "gru", "GRU", (("reset_after", True),)),
        Cell("gru_reset_before", "gru_reset_before", "GRU", (("reset_after", False),)),
        Cell("rnn", "rnn_tanh", "RNN", (("nonlinearity", "tanh"),)),
        Cell("rnn_relu", "rnn_relu", "RNN", (("nonlinearity", "relu"),)),
    )
}
DEFAULT_CELLS = ("lstm", "gru", "gru_reset_before", "rnn")


@dataclass(frozen=True)
class Case:
    """One row of the result. `work`: "forward", "train" (forward + backward) or "stream" (one step)."""

    cell: Cell
    work: str
    B: int
    T: int
    I: int  # noqa: E741  (the field's letter)
    H: int
    dtype: np.dtype
    series: str = "standard"  # or "given", or the letter of the sweep it belongs to

    @property
    def shape(self) -> str:
        return f"{self.B},{self.T},{self.I},{self.H}"

    def __str__(self) -> str:
        return f"{self.cell.name} {self.work} {self.shape} {self.dtype}"

    @property
    def flops(self) -> int:
        """Operations of the matrix products alone; forward + backward counts three forwards."""
        return (
            2
            * self.cell.gates
            * self.H
            * (self.I + self.H)
            * self.T
            * self.B
            * (3 if self.work == "train" else 1)
        )

    @property
    def traffic(self) -> int:
        """Bytes that must pass between cores and caches when no step keeps weights in registers for the next.

        Every step reads W_hh, x_t and the state and writes h; W_ih is read once, its product being hoisted.
        Training reads W_hh twice a step, W_ih in forward and for dx, writes both weight gradients once, and
        writes and reads a tape of G + 1 values per unit beside x, dx, h, dy and the state's gradient.
        """
        g, s = self.cell.gates, self.cell.states
        recurrent, projection = g * self.H * self.H, g * self.H * self.I
        row = self.I + (s + 1) * self.H
        if self.work == "train":
            row = 3 * self.I + (2 * (g + 1) + 2 * s + 2) * self.H
            values = self.T * (2 * recurrent + self.B * row) + recurrent + 3 * projection
        else:
            values = self.T * (recurrent + self.B * row) + projection
        return values * self.dtype.itemsize

    @property
    def intensity(self) -> float:
        """Operations per byte of `traffic`."""
        return self.flops / self.traffic


def largest(b: int, t: int, i: int, h: int) -> int:
    """Values of the largest array of any case of this shape: x, y, or the parameters of a stack."""
    gates, wide = max(cell.gates for cell in CELLS.values()), max(i, h)
    return max(t * b * wide, LAYERS * gates * h * (wide + h + 2))


def cases(
    cells: list[Cell],
    work: list[str],
    shapes: list[tuple[int, int, int, int]] | None,
    dtype: np.dtype,
    quick: bool,
) -> list[Case]:
    """The cases of a run, cell by cell; `shapes` None means the standard set (a small one with `quick`).

    A sweep shows how cost grows, for which the first cell will do. "ratios" is no work of single cases:
    see ratios.py.
    """
    series = "standard" if shapes is None else "given"
    sequences = shapes or list(QUICK if quick else STANDARD)
    if shapes is None:
        sizes = [(1, 1, h, h) for h in (STREAM_SIZES[:3] if quick else STREAM_SIZES)]
    else:
        sizes = list(dict.fromkeys((b, 1, i, h) for b, _, i, h in shapes))

    found = []
    for cell in cells:
        for kind in work:
            if kind == "ratios":
                continue
            if kind == "sweep":
                if cell is not cells[0]:
                    continue
                for letter, sweep in SWEEPS.items():
                    points = sweep[:2] if quick else sweep
                    found += [Case(cell, "forward", *shape, dtype, letter) for shape in points]
            else:
                base = Case(cell, kind, 1, 1, 1, 1, dtype, series)
                for b, t, i, h in sizes if kind == "stream" else sequences:
                    found.append(replace(base, B=b, T=t, I=i, H=h))
    return found
