"""The figures of a benchmark result, as SVG at the width of a README column. Nothing else needs matplotlib.

    roofline.svg        GFLOP/s over arithmetic intensity under the machine's peak and bandwidth lines
    bars_forward.svg    GFLOP/s of every engine, shape by shape; bars_train.svg likewise
    stream.svg          microseconds per streaming step over H
    growth.svg          forward time over T, over B and over H
A figure whose cases were not measured is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .report import digits

WIDTH = 8.6  # inches
INK, FAINT, GRID = "#222222", "#6b6b6b", "#e2e2e2"
# Okabe and Ito's palette, told apart with any colour vision; every line also has a marker of its own.
ENGINE_STYLES = {
    "ours": ("#0072B2", "o"),
    "torch": ("#D55E00", "s"),
    "onnxruntime": ("#009E73", "^"),
    "jax": ("#CC79A7", "D"),
    "reference": ("#999999", "v"),
}
CELL_STYLES = {
    "lstm": ("#0072B2", "o"),
    "gru": ("#D55E00", "s"),
    "gru_reset_before": ("#E69F00", "D"),
    "rnn": ("#009E73", "^"),
    "rnn_relu": ("#CC79A7", "v"),
}
CELL_LABELS = {
    "lstm": "LSTM",
    "gru": "GRU",
    "gru_reset_before": "GRU, reset before",
    "rnn": "RNN",
    "rnn_relu": "RNN, relu",
}
STYLE: Any = {  # matplotlib names every key in its type
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.hashsalt": "fusedrnn",
    "svg.fonttype": "path",
}


def draw(result: dict[str, Any], folder: Path, suffix: str = "svg") -> dict[str, str]:
    """Writes every figure that `result` has cases for; file name -> caption."""
    drawn = {}
    with mpl.rc_context(STYLE):
        for name, (make, caption) in FIGURES.items():
            figure = make(result)
            if figure is not None:
                metadata = {"Date": None} if suffix == "svg" else {}
                figure.savefig(folder / f"{name}.{suffix}", dpi=150, facecolor="white", metadata=metadata)
                drawn[f"{name}.{suffix}"] = caption
    return drawn


def roofline(result: dict[str, Any]) -> Figure | None:
    rows = [row for row in _standard(result) if row["work"] != "stream"]
    if not rows or not result["roofs"]:
        return None
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    ax = figure.add_subplot()
    peak = _peak(rows)
    points = [row["intensity"] for row in rows]
    knees = [peak / roof["gb_per_s"] for roof in result["roofs"]]
    low, high = min(*points, *knees) / 4, max(*points, *knees) * 1.6
    floor, ceiling = min(peak / 4, *(row["ours"]["gflops"] for row in rows)) / 2, peak * 1.7

    threads = result["roofs"][0]["threads"]
    plural = "s" if threads > 1 else ""
    ax.plot((low, high), (peak, peak), color=INK, lw=1.2)
    ax.text(
        high, peak * 1.05, f"FMA peak, {threads} thread{plural}: {peak:.0f} GFLOP/s ", ha="right", va="bottom"
    )
    top = ceiling / floor
    slope = np.degrees(
        np.arctan((4.0 / np.log10(top)) / (7.6 / np.log10(high / low)))
    )  # of axes about 7.6 by 4 inches
    for at, (roof, knee) in enumerate(zip(result["roofs"], knees, strict=True)):
        rate = roof["gb_per_s"]
        start = max(low, floor / rate)
        ax.plot((start, knee), (start * rate, peak), color=FAINT, lw=1)
        x = start * (knee / start) ** (0.12 + 0.2 * at)  # each label further up its line: lines may lie close
        ax.text(
            x,
            x * rate * 1.04,
            f"{roof['level']} {rate:.0f} GB/s",
            color=FAINT,
            fontsize=8,
            rotation=slope,
            rotation_mode="anchor",
            va="bottom",
        )

    for cell, (colour, marker) in CELL_STYLES.items():
        mine = [row for row in rows if row["cell"] == cell]
        if mine:
            ax.plot([], [], marker, color=colour, label=CELL_LABELS[cell])
        for row in mine:
            ax.plot(
                row["intensity"],
                row["ours"]["gflops"],
                marker,
                color=colour,
                mew=1.4,
                mfc=colour if row["work"] == "forward" else "white",
            )
    ax.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        ylim=(floor, ceiling),
        ylabel="GFLOP/s (matrix products)",
        xlabel="arithmetic intensity: operations per byte when every step reads its weights anew",
    )
    _plain_ticks(ax)
    ax.text(
        1,
        1.02,
        "filled: forward;  open: forward + backward",
        transform=ax.transAxes,
        ha="right",
        va="bottom",
        fontsize=8,
        color=FAINT,
    )
    _legend(figure, ax)
    return figure


def _bars(work: str, result: dict[str, Any]) -> Figure | None:
    rows = [row for row in _standard(result) if row["work"] == work]
    if not rows:
        return None
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    shapes = list(dict.fromkeys(_shape(row) for row in rows))
    engines = _engines(result, rows)
    figure = Figure(figsize=(WIDTH, 1.0 + 1.75 * len(cells)), layout="constrained")
    axes = figure.subplots(len(cells), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.84 / len(engines)
    for ax, cell in zip(axes, cells, strict=True):
        mine = {_shape(row): row for row in rows if row["cell"] == cell}
        for at, (engine, label) in enumerate(engines.items()):
            heights = [_entry(mine.get(shape), engine, "gflops") for shape in shapes]
            ax.bar(
                np.arange(len(shapes)) + (at - (len(engines) - 1) / 2) * width,
                heights,
                width * 0.92,
                label=label,
                color=ENGINE_STYLES[engine][0],
            )
        for at, shape in enumerate(shapes):
            row = mine.get(shape)
            if row and row["best_peer"]:
                ratio = row["peers"][row["best_peer"]]["ratio"]["median"]
                tallest = max(_entry(row, engine, "gflops") for engine in engines)
                ax.text(at, tallest, f"{digits(ratio)}×", ha="center", va="bottom", fontsize=8)
        peak = _peak(list(mine.values()))
        ax.axhline(peak, color=INK, lw=1, ls=(0, (4, 3)))
        ax.set_title(CELL_LABELS[cell])
        ax.set_ylim(0, 1.16 * max(peak, ax.dataLim.y1))
        ax.set_xlim(-0.6, len(shapes) - 0.4)
        ax.grid(axis="x", visible=False)
        ax.tick_params(axis="x", length=0)
    axes[0].text(
        1,
        1.02,
        "dashed: FMA peak;  number: times faster than the best peer",
        transform=axes[0].transAxes,
        ha="right",
        va="bottom",
        fontsize=8,
        color=FAINT,
    )
    axes[-1].set_xticks(range(len(shapes)), [f"{b}, {t}\n{i}, {h}" for b, t, i, h in shapes])
    axes[-1].set_xlabel("B, T over I, H")
    figure.supylabel("GFLOP/s", fontsize=9)
    _legend(figure, axes[0])
    return figure


def stream(result: dict[str, Any]) -> Figure | None:
    rows = [
        row for row in _standard(result) if row["work"] == "stream" and row["B"] == 1 and row["I"] == row["H"]
    ]
    cells = [
        cell
        for cell in dict.fromkeys(row["cell"] for row in rows)
        if len({row["H"] for row in rows if row["cell"] == cell}) > 1
    ]
    if not cells:
        return None
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    axes = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
    for ax, cell in zip(axes, cells, strict=True):
        _lines(result, ax, [row for row in rows if row["cell"] == cell], "H", 1e6)
        ax.set_title(CELL_LABELS[cell])
        ax.set_xlabel("H (= I)")
        ax.set_xticks([16, 64, 256, 1024])
    axes[0].set_ylabel("µs per step, B = 1, called from Python")
    _legend(figure, axes[0])
    return figure


def growth(result: dict[str, Any]) -> Figure | None:
    rows = [row for row in result["cases"] if row["series"] in "TBH"]
    if not rows:
        return None
    cell = rows[0]["cell"]
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    axes = figure.subplots(1, 3)
    for ax, letter in zip(axes, "TBH", strict=True):
        chosen = [row for row in rows if row["series"] == letter and row["cell"] == cell]
        _lines(result, ax, chosen, letter, 1e3)
        fixed = ", ".join(f"{k} = {chosen[0][k]}" for k in "BT" if k != letter)
        fixed += ", I = H" if letter == "H" else f", I = H = {chosen[0]['H']}"
        ax.set_title(f"over {letter}")
        ax.set_xlabel(f"{letter}   ({fixed})")
    axes[0].set_ylabel(f"ms, {CELL_LABELS[cell]} forward")
    _legend(figure, axes[0])
    return figure


def _standard(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["cases"] if row["series"] in ("standard", "given")]


def _peak(rows: list[dict[str, Any]]) -> float:
    return float(np.median([row["peak_gflops"]["max"] for row in rows]))


def _shape(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(row[k] for k in "BTIH")


def _engines(result: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, str]:
    """Engines that at least one row has, in the order of the result; key -> label."""
    found = {"ours": "fusedrnn"}
    for name, peer in result["peers"].items():
        if any(name in row["peers"] for row in rows):
            found[name] = peer["label"]
    return found


def _entry(row: dict[str, Any] | None, engine: str, field: str) -> float:
    """0 where there is none, so that a bar is missing."""
    if row is None:
        return 0.0
    entry = row["ours"] if engine == "ours" else row["peers"].get(engine)
    return entry[field] if entry else 0.0


def _lines(result: dict[str, Any], ax: Any, rows: list[dict[str, Any]], letter: str, scale: float) -> None:
    rows = sorted(rows, key=lambda row: row[letter])
    for engine, label in reversed(_engines(result, rows).items()):  # ours last, on top
        colour, marker = ENGINE_STYLES[engine]
        points = [
            (row[letter], row["ours"] if engine == "ours" else row["peers"][engine])
            for row in rows
            if engine == "ours" or engine in row["peers"]
        ]
        x = [at for at, _ in points]
        ax.plot(
            x,
            [scale * entry["seconds"]["median"] for _, entry in points],
            color=colour,
            marker=marker,
            label=label,
        )
        ax.fill_between(
            x,
            [scale * entry["seconds"]["q1"] for _, entry in points],
            [scale * entry["seconds"]["q3"] for _, entry in points],
            color=colour,
            alpha=0.18,
            lw=0,
        )
    ax.set(xscale="log", yscale="log")
    _plain_ticks(ax)


def _plain_ticks(ax: Any) -> None:
    """1, 10, 100 in place of powers, with 2 and 5 between where the range is short, and no small ticks."""
    for axis in (ax.xaxis, ax.yaxis):
        low, high = axis.get_view_interval()
        if high < 100 * low:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())


def _legend(figure: Figure, ax: Any) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if "fusedrnn" in labels[1:]:  # drawn last, named first
        handles, labels = handles[::-1], labels[::-1]
    figure.legend(
        handles, labels, loc="outside upper left", ncols=len(labels), columnspacing=1.6, handletextpad=0.5
    )


FIGURES = {
    "roofline": (
        roofline,
        "Measured rate against arithmetic intensity, under the machine's peak and its caches' "
        "bandwidths. Above a line: what one step reads is kept nearer than that level.",
    ),
    "bars_forward": (
        lambda result: _bars("forward", result),
        "Forward, each engine on its best thread count.",
    ),
    "bars_train": (
        lambda result: _bars("train", result),
        "Forward and backward, with the gradients of x and of all parameters.",
    ),
    "stream": (stream, "One step of a stream, called from Python; bands are the quartiles."),
    "growth": (
        growth,
        "How the forward time grows with each size; sizes that fill no vector are among them.",
    ),
}
