"""`python -m fusedrnn.bench.gpu`: layers on a GPU against cuDNN through PyTorch, in the same process.

Both are given the same weights and PyTorch's tensors, on PyTorch's stream. Forward is that of a frozen layer,
whose weights are packed once, as PyTorch's are by `flatten_parameters`. Each case first compares the two
answers. Then they take turns, in slots of many calls between two CUDA events; a row has each one's median
over the rounds and the ratio of these, theirs over ours. PyTorch runs in every setting that may suit it best,
CUDA graphs among them, and the best is what counts. It has no GRU that resets before its product, and its
packed sequences stand for our `lengths`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from math import ceil, exp, log, log2
from pathlib import Path
from typing import Any

import fusedrnn as fr
from fusedrnn import _cuda_module

Call = Callable[[], Any]
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
TF32_EPS = 2.0**-10


@dataclass(frozen=True)
class Case:
    group: str
    cell: str
    dtype: str
    B: int
    T: int
    I: int
    H: int
    L: int = 1
    D: int = 1
    ragged: bool = False
    tf32: bool = False
    train: bool = False

    def __str__(self) -> str:
        extra = [f"L={self.L}"] * (self.L > 1) + ["two directions"] * (self.D > 1)
        extra += ["lengths"] * self.ragged + ["TF32"] * self.tf32
        sizes = f"B={self.B} T={self.T} I={self.I} H={self.H}"
        return " ".join([f"{self.cell} {self.dtype}", sizes, *extra, "fwd+bwd" if self.train else "forward"])


# What is to be reached, as a ratio of times (theirs over ours): by group, forward and forward+backward.
GOALS = {
    "headline": (1.0, 1.0),
    "bf16": (2.0, 1.8),
    "float32": (1.3, 1.3),
    "float32, TF32": (1.3, 1.3),
    "GRU": (2.0, 2.0),
    "two directions": (2.0, 2.0),
    "two layers": (2.0, 2.0),
    "lengths": (2.0, 2.0),
}
PROJECTED = ("before", "beside", "within")
STEP_GOAL_US = 1.0  # a time step of LSTM bf16, H=512, B=16, forward


def cases(quick: bool) -> Iterator[Case]:
    both = (False,) if quick else (False, True)
    batches, widths = ((16,), (512,)) if quick else ((1, 16, 64), (128, 256, 512, 768, 1024))
    for train in both:
        for dtype in ("float16", "bfloat16"):
            yield Case("headline", "lstm", dtype, 16, 1024, 768, 768, train=train)
        for group, dtype, tf32 in (
            ("bf16", "bfloat16", False), ("float32", "float32", False), ("float32, TF32", "float32", True),
        ):  # fmt: skip
            for cell in ("lstm", "gru"):
                for B in batches:
                    for H in widths:
                        yield Case(group, cell, dtype, B, 512, H, H, tf32=tf32, train=train)
        usual = Case("GRU", "gru", "bfloat16", 16, 512, 512, 512, train=train)
        yield usual
        for cell in ("lstm", "gru"):
            one = replace(usual, cell=cell)
            yield replace(one, group="two directions", D=2)
            yield replace(one, group="two layers", L=2)
            yield replace(one, group="lengths", ragged=True, B=64)


class Pair:
    """A case's two layers with the same weights, and its input."""

    def __init__(self, case: Case) -> None:
        import torch

        self.case, self.torch = case, torch
        dtype, device = getattr(torch, case.dtype), torch.device("cuda")
        draw = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Any:
            return torch.randn(*shape, generator=draw, device=device).to(dtype)

        kinds = {"lstm": (fr.LSTM, torch.nn.LSTM), "gru": (fr.GRU, torch.nn.GRU)}
        ours, theirs = kinds[case.cell]
        options: Any = {"num_layers": case.L, "bidirectional": case.D == 2}
        self.ours = ours(case.I, case.H, **options, dtype=case.dtype, seed=0, device="cuda")
        self.frozen = self.ours.freeze()
        self.theirs = theirs(case.I, case.H, **options, dtype=dtype, device=device)
        adopt: Any = getattr(torch, "from_dlpack")  # noqa: B009  its stubs do not export it
        state = {name: adopt(p) for name, p in self.ours.state_dict().items()}
        self.theirs.load_state_dict(state)
        self.theirs.flatten_parameters()
        self.x, self.dy = normal(case.T, case.B, case.I), normal(case.T, case.B, case.D * case.H)
        self.lengths: list[int] | None = None
        if case.ragged:  # half of the steps, on the average
            spread = torch.randint(1, case.T + 1, (case.B,), generator=torch.Generator().manual_seed(0))
            self.lengths = [case.T, *map(int, spread[1:])]

    def run_ours(self) -> tuple[Any, Any]:
        x = self.x
        with fr.tf32(self.case.tf32):
            if not self.case.train:
                return self.frozen(x, lengths=self.lengths)[0], None
            y, _, tape = self.ours.forward(x, lengths=self.lengths)
            return y, self.ours.backward(tape, self.dy).flat

    def run_theirs(self) -> tuple[Any, Any]:
        torch, rnn = self.torch, self.torch.nn.utils.rnn
        x = self.x.detach().requires_grad_(self.case.train)
        given = x
        if self.lengths is not None:
            given = rnn.pack_padded_sequence(x, torch.tensor(self.lengths), enforce_sorted=False)
        with torch.inference_mode(not self.case.train):
            y, _ = self.theirs(given)
        if self.lengths is not None:
            y, _ = rnn.pad_packed_sequence(y, total_length=self.case.T)
        if not self.case.train:
            return y, None
        return y, torch.autograd.grad(y, [x, *self.theirs.parameters()], self.dy)[1:]

    def settings(self) -> Iterator[tuple[str, Call]]:
        """Theirs in each setting: cuDNN choosing by its rules, and by its own measurement, and each of these
        as a CUDA graph, which spares the host the launch of every kernel."""
        backends, torch = self.torch.backends, self.torch

        def within(measured: bool) -> Call:
            def call() -> Any:
                backends.cudnn.benchmark = measured
                backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = self.case.tf32
                return self.run_theirs()

            return call

        for name, call in (("cuDNN", within(False)), ("cuDNN, benchmark", within(True))):
            yield name, call
            side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            try:
                with torch.cuda.stream(side):
                    for _ in range(3):
                        call()
                with torch.cuda.graph(graph, stream=side):
                    call()
            except RuntimeError:  # not every call can be captured
                torch.cuda.synchronize()
                continue
            yield f"{name}, graph", graph.replay

    def disagreement(self) -> float:
        """The largest distance of the two answers over its bound; above 1 one of them is wrong."""
        (y, flat), (theirs, grads) = self.run_ours(), next(self.settings())[1]()
        case = self.case
        eps = TF32_EPS if case.tf32 else EPS[case.dtype]
        pairs, terms = [(y, theirs, 4)], case.T * (case.I + case.H)
        if case.train:
            pairs.append((flat, self.torch.cat([g.reshape(-1) for g in grads]), 8))
        worst = 0.0
        for got, expected, factor in pairs:
            want = expected.detach().double()
            # Both are off from the truth, so twice the bound of one.
            bound = 2 * factor * max(4, ceil(log2(terms * case.B))) * eps * float(want.norm())
            worst = max(worst, float((got.detach().double() - want).norm()) / bound)
        return worst


def slot(torch: Any, call: Call, count: int) -> float:
    """Microseconds of a call, over `count` of them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / count


def measured(pair: Pair, rounds: int, slot_ms: float) -> dict[str, list[float]]:
    """Microseconds of every candidate, a number per round; they take turns within a round."""
    torch = pair.torch
    candidates = {"fusedrnn": pair.run_ours, **dict(pair.settings())}
    counts = {}
    for name, call in candidates.items():
        for _ in range(3):  # graphs, plans and cuDNN's own measurements are made here
            call()
        torch.cuda.synchronize()
        counts[name] = max(1, ceil(slot_ms * 1e3 / slot(torch, call, 2)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            times[name].append(slot(torch, call, counts[name]))
    return times


def geometric_mean(values: list[float]) -> float:
    return exp(sum(map(log, values)) / len(values))


def machine(torch: Any) -> dict[str, str]:
    return {
        "card": torch.cuda.get_device_name(),
        "fusedrnn": f"{fr.__version__}, {_cuda_module.description()}",
        "PyTorch": f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
    }


def run(args: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available() or _cuda_module.module().EMULATED:
        print("bench.gpu: needs a GPU, and a PyTorch that can use it", file=sys.stderr)
        return 2
    if args.projected:
        _cuda_module.module().override_projected(PROJECTED.index(args.projected))
    about = machine(torch)
    for name, text in about.items():
        print(f"{name:<9} {text}")
    rows: list[dict[str, Any]] = []

    def keep(*row: dict[str, Any]) -> None:  # at once: the next case may not come to its end
        rows.extend(row)
        if args.json:
            args.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")

    keep()
    print(f"\n{'case':<78} {'ours µs':>10} {'spread':>7} {'theirs µs':>10} {'ratio':>6}  their best setting")
    for case in cases(args.quick):
        if args.only and args.only not in str(case) and args.only != case.group:
            continue
        pair = Pair(case)
        if (off := pair.disagreement()) > 1:
            print(f"{case!s:<78} WRONG: {off:.3g} times the bound apart")
            keep({**asdict(case), "disagreement": off})
            continue
        times = measured(pair, args.rounds, args.slot_ms)
        ours = sorted(times.pop("fusedrnn"))
        best, theirs = min(((n, statistics.median(t)) for n, t in times.items()), key=lambda item: item[1])
        median = statistics.median(ours)
        spread, ratio = (ours[-1] - ours[0]) / median, theirs / median
        print(f"{case!s:<78} {median:10.1f} {spread:7.1%} {theirs:10.1f} {ratio:6.2f}  {best}", flush=True)
        keep({**asdict(case), "ours": median, "theirs": theirs, "setting": best, "ratio": ratio})
    _summary(rows)
    return 1 if any("disagreement" in row for row in rows) else 0


def _summary(rows: list[dict[str, Any]]) -> None:
    timed = [row for row in rows if "ratio" in row]
    print(f"\n{'geometric mean of ratios':<34} {'here':>6} {'goal':>6}")
    for group, goals in GOALS.items():
        for train, goal in zip((False, True), goals, strict=True):
            ratios = [r["ratio"] for r in timed if r["group"] == group and r["train"] == train]
            if ratios:
                name = f"{group}, {'fwd+bwd' if train else 'forward'} ({len(ratios)})"
                print(f"{name:<34} {geometric_mean(ratios):6.2f} {goal:6.2f}")
    for row in timed:
        if [row[k] for k in ("group", "cell", "B", "H", "train")] == ["bf16", "lstm", 16, 512, False]:
            text = "µs per time step, lstm B=16 H=512"
            print(f"{text:<34} {row['ours'] / row['T']:6.2f} {STEP_GOAL_US:6.2f}")
    halves = {r["dtype"]: r["theirs"] if r["dtype"] == "float16" else r["ours"]
              for r in timed if r["group"] == "headline" and not r["train"]}  # fmt: skip
    if len(halves) == 2:
        text = "our bfloat16 over cuDNN's float16"
        print(f"{text:<34} {halves['bfloat16'] / halves['float16']:6.2f} {1.0:6.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fusedrnn.bench.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="forward passes of one size of each group")
    parser.add_argument("--only", help="cases of this group, or whose name has this in it")
    parser.add_argument("--rounds", type=int, default=7, help="turns that each candidate has (default: 7)")
    parser.add_argument("--slot-ms", type=float, default=20, help="milliseconds of a turn (default: 20)")
    parser.add_argument("--projected", choices=PROJECTED, help="when inputs are, where they can be so")
    parser.add_argument("--json", type=Path, help="where to write all of it")
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
