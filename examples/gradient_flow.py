"""Why gates: how a loss at step 200 reaches back through an RNN, an LSTM and a GRU, ||dL/dh_t|| over t.

A layer returns dL/dx_t for every step but dL/dh_t only for its initial state. So the sequence is run as 200
forward calls of one step, the state carried, and their tapes are walked backwards: the state gradient that
one step's backward returns is the `dstate` of the step before, and its h part is dL/dh_t.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill

import numpy as np

import fusedrnn as fr

T, B, H = 200, 16, 64
SCALES = (1, 2, 4, 8)  # times PyTorch's initial weights, U(-1/sqrt(H), 1/sqrt(H))
OPEN = 5.0  # bias of the gate that keeps the state: sigmoid(5) = 0.993

EXPLANATION = """\
RNN: every step back multiplies by the same matrix: small, it makes the gradient vanish; large, explode.
LSTM, GRU: the state also passes by that matrix, through a gate; half-open, it halves the gradient each step.
Gates held open (bias 5, sigmoid 0.993) let it through: it arrives {steps} steps back at every scale.
"""


def gradient_norms(layer, steps: int) -> np.ndarray:
    """||dL/dh_t||, t = 0..steps, of L = u . h_T, u a random unit vector; root mean square over B."""
    x = np.random.default_rng(0).normal(size=(steps, B, layer.input_size))
    tapes, state = [], None
    for t in range(steps):
        _, state, tape = layer.forward(x[t : t + 1], state)
        tapes.append(tape)

    dh = np.random.default_rng(1).normal(size=(1, B, H))
    dh /= np.linalg.norm(dh, axis=-1, keepdims=True)
    has_cell_state = isinstance(state, tuple)
    dstate = (dh, None) if has_cell_state else dh
    norms = [1.0]
    for tape in reversed(tapes):
        dstate = layer.backward(tape, None, dstate, wrt=("state",)).state
        dh = dstate[0] if has_cell_state else dstate
        norms.append(np.sqrt(np.mean(np.sum(dh**2, axis=-1))))
    return np.array(norms[::-1])


def layers() -> Iterator[tuple[str, int, fr.RNN | fr.LSTM | fr.GRU]]:
    """(panel, weight scale, layer): five panels at every scale."""
    for panel, cls, bias in (
        ("RNN (tanh)", fr.RNN, 0.0),
        ("LSTM", fr.LSTM, 0.0),
        ("GRU", fr.GRU, 0.0),
        ("LSTM, forget gate open", fr.LSTM, OPEN),
        ("GRU, update gate open", fr.GRU, OPEN),
    ):
        for scale in SCALES:
            # float64: a float32 would underflow where the gradient vanishes.
            layer = cls(8, H, dtype=np.float64, seed=0)
            layer.flat_params[:] *= scale
            for name in ("bias_ih_l0", "bias_hh_l0"):
                layer.params[name][:] = 0
            if bias:  # the second gate is the one that keeps the state: f of i, f, g, o and z of r, z, n
                layer.params["bias_ih_l0"][H : 2 * H] = bias
            yield panel, scale, layer


def plot(path: Path, norms: dict[str, dict[int, np.ndarray]]) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    ink, grey = "#222222", "#999999"
    low, high = 1e-20, 1e20
    colours = dict(zip(SCALES, ("#2b6cb0", "#3f9b6c", "#dd8a1d", "#b5243c"), strict=True))
    fig = Figure(figsize=(10, 6.4), dpi=150, layout="constrained")
    fig.get_layout_engine().set(w_pad=0.08, h_pad=0.08, hspace=0.05)
    fig.suptitle(
        "How the gradient of a loss at the last step reaches earlier ones:  ‖∂L/∂hₜ‖ over t",
        x=0.01,
        ha="left",
        fontsize=13,
        fontweight="bold",
        color=ink,
    )
    grid = fig.subplots(2, 3, sharex=True, sharey=True)
    for ax, (panel, curves) in zip((*grid[0], *grid[1, 1:]), norms.items(), strict=True):
        ax.set_title(panel, loc="left", fontsize=11, color=ink)
        ax.axhline(1, color=grey, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        for scale, curve in curves.items():
            ax.plot(curve, color=colours[scale], linewidth=1.8)
        last = len(curve) - 1
        ax.set(yscale="log", ylim=(low, high), xlim=(0, last), xticks=np.linspace(0, last, 5))
        ax.yaxis.set_major_locator(LogLocator(numticks=5))
        ax.minorticks_off()
        ax.tick_params(colors=ink, labelsize=9, length=3, labelbottom=True, labelleft=True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(grey)
    for ax in (grid[0, 0], *grid[1, 1:]):
        ax.set_xlabel(f"time step t (the loss is at {last})", fontsize=10, color=ink)
    for ax, curves in zip(grid[0], norms.values(), strict=False):
        for scale, curve in curves.items():  # named where the line enters the frame
            at = int(np.argmax((30 * low < curve) & (curve < high / 30)))
            beside = at > last // 8
            at = max(at, last // 50)
            ax.annotate(
                f"×{scale}",
                (at, curve[at]),
                (-6, 0) if beside else (0, 5),
                textcoords="offset points",
                color=colours[scale],
                fontsize=10,
                ha="right" if beside else "left",
                va="center" if beside else "bottom",
            )

    key = grid[1, 0]
    key.set_axis_off()
    key.text(
        0, 1, "Weights, as multiples of U(±1/√H)", transform=key.transAxes, fontsize=10, color=ink, va="top"
    )
    for i, scale in enumerate(SCALES):
        key.text(
            0.24 * i,
            0.89,
            f"━ ×{scale}",
            transform=key.transAxes,
            fontsize=11,
            color=colours[scale],
            va="top",
        )
    explanation = EXPLANATION.format(steps=len(norms["LSTM"][1]) - 1)
    key.text(
        0,
        0.76,
        "\n\n".join(fill(line, 45) for line in explanation.splitlines()),
        transform=key.transAxes,
        fontsize=9,
        color=ink,
        va="top",
        linespacing=1.35,
    )
    for text in key.texts:  # it may be wider than its column
        text.set_in_layout(False)
    fig.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(",")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("gradient_flow.png"), help="picture (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="60 steps, for a test")
    args = parser.parse_args()
    steps = 60 if args.quick else T

    norms: dict[str, dict[int, np.ndarray]] = {}
    for panel, scale, layer in layers():
        norms.setdefault(panel, {})[scale] = gradient_norms(layer, steps)

    print(f"||dL/dh_0|| of a loss at step {steps}, by weight scale (1 = PyTorch's initial weights)\n")
    print(f"{'':24}" + "".join(f"{f'x{scale}':>10}" for scale in SCALES))
    for panel, curves in norms.items():
        print(f"{panel:24}" + "".join(f"{curves[scale][0]:10.0e}" for scale in SCALES))
    print("\n" + EXPLANATION.format(steps=steps))
    if importlib.util.find_spec("matplotlib"):
        plot(args.out, norms)
        print(f"picture: {args.out}")
    else:
        print("picture: not drawn, matplotlib is not installed")


if __name__ == "__main__":
    main()
