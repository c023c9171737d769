"""A character-level language model trained through the fused kernels: `fusedrnn demo`.

With `_charmodel.py`, the model and Adam in NumPy, it is also an example of training without a framework. It
tunes nothing and keeps no checkpoints.

Shapes: T time steps, B parallel streams of text, N characters.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import math
import signal
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import numpy as np

import fusedrnn as fr
from fusedrnn._charmodel import CELLS, UNKNOWN, Adam, CharModel, sample, softmax_cross_entropy
from fusedrnn._cli import (
    CommandError,
    natural,
    nonnegative_float,
    positive_float,
    positive_int,
    writable_folder,
)

__all__ = ["Adam", "add_arguments", "run", "softmax_cross_entropy"]  # the examples train with the same Adam

LEARNING_RATES = {"rnn": 2e-3, "gru": 5e-3, "lstm": 8e-3}
MAX_GRADIENT_NORM = 0.5
CHECKS = 15  # of the held-out text while training
STEPS = 32  # time steps per update: how far back a gradient reaches
VOCABULARY_LIMIT = 96  # printable ASCII and the line feed are 96 characters
HELD_OUT_SHARE = 0.03
MAX_HELD_OUT = 200_000  # characters
PROMPT = 400  # characters of the held-out text that the sample continues
MIN_TEXT = 1_000  # characters
BITS = 1 / math.log(2)  # nats to bits
QUIETLY = np.errstate(over="ignore", invalid="ignore")  # where training diverges, one error says it all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text to learn (default: the sources of Python's standard library)",
    )
    parser.add_argument("--cell", choices=CELLS, default="lstm", help="recurrent cell (default: %(default)s)")
    parser.add_argument("--hidden", type=positive_int, default=256, help="hidden size (default: %(default)s)")
    parser.add_argument(
        "--layers", type=positive_int, default=1, help="stacked layers (default: %(default)s)"
    )
    parser.add_argument(
        "--batch",
        type=positive_int,
        default=16,
        help="streams of text learnt side by side (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=positive_float,
        default=60.0,
        help="training time (default: %(default)g); Ctrl-C ends it early",
    )
    parser.add_argument(
        "--updates", type=positive_int, metavar="N", help="train for N updates instead, which repeats exactly"
    )
    parser.add_argument(
        "--learning-rate",
        type=positive_float,
        metavar="RATE",
        help="Adam's highest step size (default: "
        + ", ".join(f"{rate:g} for {cell}" for cell, rate in LEARNING_RATES.items())
        + ")",
    )
    parser.add_argument(
        "--temperature",
        type=nonnegative_float,
        default=0.7,
        help="of the sample: 0 takes the likeliest character, 1 the model's own odds (default: %(default)g)",
    )
    parser.add_argument(
        "--sample", type=natural, default=600, metavar="N", help="characters to sample (default: %(default)s)"
    )
    parser.add_argument("--seed", type=natural, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("fusedrnn-demo"),
        metavar="DIR",
        help="folder of model.npz and loss.png (default: %(default)s)",
    )


@contextlib.contextmanager
def blas_on_one_thread() -> Iterator[None]:
    """Threads of NumPy's BLAS spin on after a product, on the very cores that the kernels need next."""
    if importlib.util.find_spec("threadpoolctl"):
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1, "blas"):
            yield
    else:
        yield


@blas_on_one_thread()
def run(args: argparse.Namespace) -> int:
    """Train, report, save, reload, sample and plot; returns the exit status."""
    writable_folder("--out", args.out)
    text = read_text(args.text, args.seed)
    try:
        model = CharModel(
            args.cell, args.hidden, args.layers, text.vocabulary, np.dtype(args.dtype), args.seed
        )
    except ValueError as error:  # sizes beyond the address space
        raise CommandError(str(error)) from None
    train_ids = in_streams(model.encode(text.train), args.batch)
    held_out_ids = in_streams(model.encode(text.held_out), args.batch)
    baseline = order0_entropy(held_out_ids)
    say("text", f"{text.name}: {len(text.train):,} characters to learn, {len(text.held_out):,} held out")
    say(
        "model",
        f"{args.cell.upper()}, {args.layers} x {args.hidden}, {model.size:,} parameters, {args.dtype}, "
        f"vocabulary {len(model.vocabulary)}, {threads()}",
    )

    rate = args.learning_rate or LEARNING_RATES[args.cell]
    history = train(model, train_ids, held_out_ids, args.seconds, args.updates, rate)
    loss = held_out_loss(model, held_out_ids, rate)
    history.held_out.append((history.characters, loss))
    say(
        "trained",
        f"{history.characters:,} characters in {history.seconds:.1f} s, {history.speed:,.0f} a second",
    )
    say("held-out", f"{loss:.3f} bits per character (characters alone, order-0 entropy: {baseline:.3f})")

    path = args.out / "model.npz"
    model.save(path)
    reloaded = CharModel.load(path)
    reloaded_loss = evaluate(reloaded, held_out_ids)
    if reloaded_loss != loss:
        raise CommandError(f"{path}: the reloaded model's held-out loss is {reloaded_loss!r}, not {loss!r}")
    say("saved", f"{path} ({path.stat().st_size / 1e6:.1f} MB); reloaded, its held-out loss is identical")
    if importlib.util.find_spec("matplotlib"):
        picture = args.out / "loss.png"
        plot_loss(
            picture, history, baseline, f"{args.cell.upper()}, {args.layers} x {args.hidden}, on {text.name}"
        )
        say("curve", str(picture))
    else:
        say("curve", "not drawn: matplotlib is not installed")

    prompt = text.held_out[:PROMPT]
    prompt = prompt[: prompt.rfind("\n") + 1] or prompt  # whole lines, if there are any
    start = "" if args.text else "def "
    how = f"temperature {args.temperature:g}, one stream.step() a character"
    say("sample", f"the held-out text, continued; {how}\n")
    print(start, end="")
    rng = np.random.default_rng(args.seed)
    for char in sample(reloaded, prompt + start, args.sample, args.temperature, rng):
        print(char, end="", flush=True)
    print()
    return 0


def say(label: str, message: str) -> None:
    print(f"{label:<9} {message}", flush=True)


def threads() -> str:
    count = fr.get_num_threads()
    return f"{count} thread" + "s" * (count != 1)


# Text


@dataclass
class Text:
    name: str
    train: str
    held_out: str
    vocabulary: str


def read_text(path: Path | None, seed: int) -> Text:
    """The text, its last part held out; without a path, Python's library in an order drawn from the seed."""
    if path is None:
        name, parts = standard_library(seed)
    else:
        try:
            name, parts = path.name, [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise CommandError(
                f"--text {path}: not UTF-8 text (byte {error.start:,}: {error.reason})"
            ) from None
        except OSError as error:
            raise CommandError(f"--text {path}: {error.strerror}") from None
    whole = "".join(parts)
    if len(whole) < MIN_TEXT:
        raise CommandError(f"--text {path}: needs at least {MIN_TEXT:,} characters, has {len(whole):,}")
    cut = len(whole) - max(min(MAX_HELD_OUT, int(HELD_OUT_SHARE * len(whole))), MIN_TEXT // 10)
    train, held_out = whole[:cut], whole[cut:]
    common = Counter(train).most_common(VOCABULARY_LIMIT)
    return Text(
        name, train, held_out, UNKNOWN + "".join(sorted(char for char, _ in common if char != UNKNOWN))
    )


def standard_library(seed: int) -> tuple[str, list[str]]:
    root = Path(sysconfig.get_path("stdlib"))
    # Left out: what is not the library's own code, and tables and prose that happen to have a .py name.
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    paths = sorted(p for p in root.rglob("*.py") if not skipped.intersection(p.relative_to(root).parts))
    if not paths:
        raise CommandError(f"no Python sources in {root}: name a text of your own with --text FILE")
    order = np.random.default_rng(seed).permutation(len(paths))
    name = f"the standard library of Python {sys.version_info.major}.{sys.version_info.minor}"
    return name, [paths[i].read_text(encoding="utf-8", errors="replace") for i in order]


def in_streams(ids: np.ndarray, batch: int) -> np.ndarray:
    """Cuts ids (N,) into B <= batch consecutive streams, side by side and time-major: (N // B, B)."""
    batch = max(1, min(batch, len(ids) // (STEPS + 1)))
    length = len(ids) // batch
    return np.ascontiguousarray(ids[: length * batch].reshape(batch, length).T)


def windows(streams: np.ndarray) -> Iterator[np.ndarray]:
    """Windows (T + 1, B): each one's last row is the next one's first, so that every step has its target."""
    for start in range(0, len(streams) - 1, STEPS):
        yield streams[start : start + STEPS + 1]


def passes(streams: np.ndarray) -> Iterator[tuple[bool, np.ndarray]]:
    """Windows without end, and whether each one is the first of a pass over the text."""
    while True:
        for index, ids in enumerate(windows(streams)):
            yield index == 0, ids


def order0_entropy(ids: np.ndarray) -> float:
    """Bits per character of a model that knows how frequent each character is and nothing else."""
    p = np.bincount(ids.ravel()) / ids.size
    p = p[p > 0]
    return float(-p @ np.log2(p))


def evaluate(model: CharModel, streams: np.ndarray) -> float:
    """Bits per character over streams (N, B), the state carried from window to window."""
    total, state = 0.0, None
    for ids in windows(streams):
        loss, state = model.loss(ids, state)
        total += loss * (len(ids) - 1)
    return total * BITS / (len(streams) - 1)


@QUIETLY
def held_out_loss(model: CharModel, streams: np.ndarray, learning_rate: float) -> float:
    """Likewise, and an error where training has diverged."""
    loss = evaluate(model, streams)
    if math.isfinite(loss):
        return loss
    raise CommandError(
        f"training diverged: the held-out loss is {loss}; try a lower --learning-rate, got {learning_rate:g}"
    )


# Training


@dataclass
class History:
    train: list[tuple[int, float]] = field(default_factory=list)  # (characters seen, bits per character)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    characters: int = 0
    seconds: float = 0.0  # of training alone, held-out checks left out

    @property
    def speed(self) -> float:
        return self.characters / max(self.seconds, 1e-9)


@QUIETLY
def train(
    model: CharModel,
    train_ids: np.ndarray,
    held_out_ids: np.ndarray,
    seconds: float,
    updates: int | None,
    learning_rate: float,
) -> History:
    """Truncated back-propagation through time: the state is carried across windows, gradients are not.

    The step size warms up over the first fiftieth, then falls along a cosine, over `updates` or `seconds`.
    """
    history, adam = History(), Adam(model.params, betas=(0.9, 0.99))
    probe = held_out_ids[: 32 * STEPS + 1]  # the beginning of every stream
    done, smooth, state = 0.0, 0.0, None
    start = time.perf_counter()
    with ending_on_ctrl_c() as ended, progress_bar() as show:
        for first, ids in passes(train_ids):
            begun = time.perf_counter()
            adam.lr = learning_rate * min(done / 0.02 + 0.01, 0.5 + 0.5 * math.cos(math.pi * done))
            loss, state, grads = model.loss_and_gradients(ids, None if first else state)
            fr.clip_grad_norm(grads, MAX_GRADIENT_NORM)
            adam.step(grads)
            history.seconds += time.perf_counter() - begun

            bits = loss * BITS
            smooth = 0.98 * smooth + 0.02 * bits if history.train else bits
            history.characters += ids[1:].size
            history.train.append((history.characters, bits))
            done = len(history.train) / updates if updates else (time.perf_counter() - start) / seconds
            show(min(done, 1.0), f"{smooth:.2f} bits/char, {history.speed:,.0f} chars/s")
            if done >= 1 or ended.is_set():
                break
            if int(done * CHECKS) > len(history.held_out):
                history.held_out.append((history.characters, held_out_loss(model, probe, learning_rate)))
    return history


@contextlib.contextmanager
def ending_on_ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second acts as ever. Only a main thread gets signals."""
    ended = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield ended
        return

    def end(signum: int, frame: FrameType | None) -> None:
        ended.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, end)
    try:
        yield ended
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[float, str], None]]:
    """A function show(share done, message): tqdm's bar, or a plain line every tenth where tqdm is missing."""
    if importlib.util.find_spec("tqdm"):
        from tqdm import tqdm

        with tqdm(
            total=1.0,
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}",
            file=sys.stderr,
            mininterval=0.1 if sys.stderr.isatty() else 5.0,
            dynamic_ncols=True,
        ) as bar:

            def show(done: float, message: str) -> None:
                bar.set_postfix_str(message, refresh=False)
                bar.update(done - bar.n)

            yield show
    else:
        shown = -1

        def show(done: float, message: str) -> None:
            nonlocal shown
            if int(done * 10) > shown:
                shown = int(done * 10)
                print(f"{done:4.0%}  {message}", file=sys.stderr, flush=True)

        yield show


# Picture


def plot_loss(path: Path, history: History, baseline: float, title: str) -> None:
    from matplotlib.figure import Figure

    ink, grey, light, strong = "#222222", "#999999", "#9ecae1", "#c2410c"
    seen, bits = np.array(history.train).T
    checked, held_out = np.array(history.held_out).T
    fig = Figure(figsize=(8, 4.5), dpi=160, layout="constrained")
    ax = fig.subplots()
    fig.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=ink)
    ax.set_title("bits per character", loc="left", fontsize=10, color=ink)
    ax.plot(seen / 1e6, bits, color=light, linewidth=0.7)
    ax.plot(checked / 1e6, held_out, color=strong, linewidth=2, marker="o", markersize=4)
    ax.axhline(baseline, color=grey, linewidth=1, linestyle=(0, (5, 3)))
    end = seen[-1] / 1e6
    label = functools.partial(ax.annotate, textcoords="offset points", annotation_clip=False)
    text = f"{baseline:.2f}: frequencies of characters alone (order-0 entropy)"
    label(text, (end, baseline), (0, 4), ha="right", color=ink, fontsize=9)
    text = f"{held_out[-1]:.2f}\nheld-out text"
    label(text, (end, held_out[-1]), (8, 0), va="center", color=strong, fontsize=10, fontweight="bold")
    third = len(bits) // 3
    height = bits[third : third + len(bits) // 8 + 1].max()
    label("training, each update", (seen[third] / 1e6, height), (0, 6), color="#4a90c2", fontsize=9)
    ax.set(xlim=(0, end), ylim=(0, max(bits[0], baseline) * 1.05))
    ax.set_xlabel("characters seen, millions", fontsize=10, color=ink)
    ax.tick_params(colors=ink, labelsize=9, length=3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(grey)
    fig.savefig(path)
