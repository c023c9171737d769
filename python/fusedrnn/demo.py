"""A character-level language model trained through the fused kernels: `fusedrnn demo`.

The recurrent layer is fusedrnn's; the one-hot input, the softmax layer and Adam are NumPy, written out below, so that
this file is also an example of training without a framework. It tunes nothing and keeps no checkpoints.

Shapes: T time steps, B parallel streams of text, H hidden size, V vocabulary size.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import signal
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import fusedrnn as fr
from fusedrnn._cli import CommandError, natural, nonnegative_float, positive_float, positive_int

CELLS = {"rnn": fr.RNN, "gru": fr.GRU, "lstm": fr.LSTM}
LEARNING_RATES = {"rnn": 2e-3, "gru": 5e-3, "lstm": 8e-3}
MAX_GRADIENT_NORM = 0.5
STEPS = 32  # time steps per update: how far back a gradient reaches
VOCABULARY_LIMIT = 96  # printable ASCII and the line feed are 96 characters
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # stands for every character outside the vocabulary
HELD_OUT_SHARE = 0.03
MAX_HELD_OUT = 200_000  # characters
MIN_TEXT = 1_000  # characters
BITS = 1 / math.log(2)  # nats to bits


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
        default=32,
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
        default=0.5,
        help="of the sample: 0 takes the likeliest character, 1 the model's own odds "
        "(default: %(default)g)",
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


def run(args: argparse.Namespace) -> int:
    """Train, report, save, reload, sample and plot; returns the exit status."""
    args.out.mkdir(parents=True, exist_ok=True)
    text = read_text(args.text, args.seed)
    model = CharModel(args.cell, args.hidden, args.layers, text.vocabulary, np.dtype(args.dtype), args.seed)
    train_ids = in_streams(model.encode(text.train), args.batch)
    held_out_ids = in_streams(model.encode(text.held_out), args.batch)
    baseline = order0_entropy(held_out_ids)
    say("text", f"{text.name}: {len(text.train):,} characters to learn, {len(text.held_out):,} held out")
    say(
        "model",
        f"{args.cell.upper()}, {args.layers} x {args.hidden}, {model.size:,} parameters, {args.dtype}, "
        f"vocabulary {len(model.vocabulary)}, {threads()}",
    )

    history = train(
        model,
        train_ids,
        held_out_ids,
        args.seconds,
        args.updates,
        args.learning_rate or LEARNING_RATES[args.cell],
    )
    loss = evaluate(model, held_out_ids)
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

    say("sample", f"{args.sample} characters at temperature {args.temperature:g}, one stream.step() each\n")
    for char in sample(reloaded, args.sample, args.temperature, np.random.default_rng(args.seed)):
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
    """The text, its last part held out; without a path the standard library's files, in an order drawn from the seed."""
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
    """Cuts ids (N,) into B <= batch consecutive streams and lays them side by side: (N // B, B), time-major."""
    batch = max(1, min(batch, len(ids) // (STEPS + 1)))
    length = len(ids) // batch
    return np.ascontiguousarray(ids[: length * batch].reshape(batch, length).T)


def windows(streams: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive windows (T + 1, B): each one's last row is the next one's first, so every step has its target."""
    for start in range(0, len(streams) - 1, STEPS):
        yield streams[start : start + STEPS + 1]


def order0_entropy(ids: np.ndarray) -> float:
    """Bits per character of a model that knows how frequent each character is and nothing else."""
    p = np.bincount(ids.ravel()) / ids.size
    p = p[p > 0]
    return float(-p @ np.log2(p))


# Model


def softmax_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean of -log softmax(logits)[target] in nats, and its gradient, which replaces logits (N, V); targets (N,)."""
    rows = np.arange(len(targets))
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[rows, targets].astype(np.float64)
    np.exp(logits, out=logits)
    total = logits.sum(axis=1, keepdims=True)
    loss = float(np.mean(np.log(total[:, 0], dtype=np.float64) - chosen))
    logits /= total * len(targets)
    logits[rows, targets] -= 1 / len(targets)
    return loss, logits


class Adam:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1), in place on a list of arrays."""

    def __init__(
        self,
        params: Sequence[np.ndarray],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.params, self.lr, self.betas, self.eps = list(params), lr, betas, eps
        self.moments = [(np.zeros_like(p), np.zeros_like(p)) for p in self.params]
        self.scratch = [np.empty_like(p) for p in self.params]
        self.count = 0

    def step(self, grads: Sequence[np.ndarray]) -> None:
        self.count += 1
        b1, b2 = self.betas
        correction1, correction2 = 1 - b1**self.count, 1 - b2**self.count
        for p, g, (m, v), scratch in zip(self.params, grads, self.moments, self.scratch, strict=True):
            m *= b1
            m += np.multiply(g, 1 - b1, out=scratch)
            v *= b2
            np.multiply(g, g, out=scratch)
            scratch *= 1 - b2
            v += scratch
            np.divide(v, correction2, out=scratch)
            np.sqrt(scratch, out=scratch)
            scratch += self.eps
            np.divide(m, scratch, out=scratch)
            scratch *= self.lr / correction1
            p -= scratch


class CharModel:
    """One-hot characters -> recurrent layers -> softmax over the next character."""

    def __init__(
        self, cell: str, hidden: int, layers: int, vocabulary: str, dtype: np.dtype, seed: int
    ) -> None:
        self.cell, self.vocabulary = cell, vocabulary
        self.rnn = CELLS[cell](len(vocabulary), hidden, layers, dtype=dtype, seed=seed)
        bound = hidden**-0.5
        self.weight = (
            np.random.default_rng(seed).uniform(-bound, bound, (len(vocabulary), hidden)).astype(dtype)
        )
        self.bias = np.zeros(len(vocabulary), dtype)
        self.one_hot = np.eye(len(vocabulary), dtype=dtype)
        if (
            cell == "lstm"
        ):  # gates that start open remember from the start (Jozefowicz et al. 2015, section 2.2)
            for layer in range(layers):
                self.rnn.params[f"bias_ih_l{layer}"][hidden : 2 * hidden] = 1

    @property
    def params(self) -> list[np.ndarray]:
        return [self.rnn.flat_params, self.weight, self.bias]

    @property
    def size(self) -> int:
        return sum(p.size for p in self.params)

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        known, ids = np.unique(np.array([ord(c) for c in self.vocabulary], np.uint32), return_index=True)
        at = np.searchsorted(known, codes).clip(max=len(known) - 1)
        return np.where(known[at] == codes, ids[at], self.vocabulary.index(UNKNOWN))

    def loss(self, ids: np.ndarray, state):
        """Mean loss in nats of ids[1:] given ids[:-1], and the state after; ids (T + 1, B)."""
        y, state = self.rnn(self.one_hot[ids[:-1]], state)
        loss, _ = softmax_cross_entropy(self.logits(y), ids[1:].ravel())
        return loss, state

    def loss_and_gradients(self, ids: np.ndarray, state):
        """Likewise, with the gradients of `params` in their order. They stop at the window's first step."""
        y, state, tape = self.rnn.forward(self.one_hot[ids[:-1]], state)
        loss, dlogits = softmax_cross_entropy(self.logits(y), ids[1:].ravel())
        dy = (dlogits @ self.weight).reshape(y.shape)
        grads = self.rnn.backward(tape, dy, wrt=("params",))
        return loss, state, [grads.flat, dlogits.T @ y.reshape(len(dlogits), -1), dlogits.sum(axis=0)]

    def logits(self, y: np.ndarray) -> np.ndarray:
        """(..., H) to (N, V)."""
        logits = y.reshape(-1, y.shape[-1]) @ self.weight.T
        logits += self.bias
        return logits

    def save(self, path: Path) -> None:
        np.savez(
            path,
            cell=self.cell,
            layers=self.rnn.num_layers,
            vocabulary=np.array([ord(c) for c in self.vocabulary]),
            weight=self.weight,
            bias=self.bias,
            **{f"{self.cell}.{key}": array for key, array in self.rnn.state_dict().items()},
        )

    @classmethod
    def load(cls, path: Path) -> CharModel:
        with np.load(path) as file:
            arrays = dict(file)
        cell = str(arrays["cell"])
        model = cls(
            cell,
            arrays["weight"].shape[1],
            int(arrays["layers"]),
            "".join(map(chr, arrays["vocabulary"])),
            arrays["weight"].dtype,
            seed=0,
        )
        model.weight[:], model.bias[:] = arrays["weight"], arrays["bias"]
        prefix = f"{cell}."
        model.rnn.load_state_dict(
            {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
        )
        return model


def evaluate(model: CharModel, streams: np.ndarray) -> float:
    """Bits per character over streams (N, B), the state carried from window to window."""
    total, state = 0.0, None
    for ids in windows(streams):
        loss, state = model.loss(ids, state)
        total += loss * (len(ids) - 1)
    return total * BITS / (len(streams) - 1)


def sample(model: CharModel, length: int, temperature: float, rng: np.random.Generator) -> Iterator[str]:
    """Characters drawn one by one, each fed back as the next step's input; the first follows a line feed."""
    stream = model.rnn.freeze().stream()
    h = np.empty(model.rnn.hidden_size, model.weight.dtype)
    index = int(model.encode("\n")[0])
    for _ in range(length):
        stream.step(model.one_hot[index], out=h)
        logits = model.logits(h)[0].astype(np.float64)
        if temperature == 0:
            index = int(logits.argmax())
        else:
            odds = np.exp((logits - logits.max()) / temperature)
            index = int(rng.choice(len(odds), p=odds / odds.sum()))
        yield model.vocabulary[index]


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


def train(
    model: CharModel,
    train_ids: np.ndarray,
    held_out_ids: np.ndarray,
    seconds: float,
    updates: int | None,
    learning_rate: float,
) -> History:
    """Truncated back-propagation through time: the state is carried across windows, gradients are not.

    The step size warms up over the first fiftieth and falls along a cosine, over `updates` or else over `seconds`.
    """
    history, adam = History(), Adam(model.params, betas=(0.9, 0.99))
    probe = held_out_ids[: 8 * STEPS + 1]
    checks, done, smooth = 0, 0.0, None
    start = time.perf_counter()
    with ending_on_ctrl_c() as ended, blas_on_one_thread(), progress_bar() as show:
        while done < 1 and not ended.is_set():
            state = None
            for ids in windows(train_ids):
                begun = time.perf_counter()
                adam.lr = learning_rate * min(done / 0.02 + 0.01, 0.5 + 0.5 * math.cos(math.pi * done))
                loss, state, grads = model.loss_and_gradients(ids, state)
                fr.clip_grad_norm(grads, MAX_GRADIENT_NORM)
                adam.step(grads)
                history.seconds += time.perf_counter() - begun

                bits = loss * BITS
                smooth = bits if smooth is None else 0.98 * smooth + 0.02 * bits
                history.characters += ids[1:].size
                history.train.append((history.characters, bits))
                done = len(history.train) / updates if updates else (time.perf_counter() - start) / seconds
                if done * 15 >= checks + 1 and done < 1:
                    checks = int(done * 15)
                    history.held_out.append((history.characters, evaluate(model, probe)))
                show(done, f"{smooth:.2f} bits/char, {history.speed:,.0f} chars/s")
                if done >= 1 or ended.is_set():
                    break
    return history


@contextlib.contextmanager
def ending_on_ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second acts as ever. Only a main thread gets signals."""
    ended = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield ended
        return

    def end(signum, frame):
        ended.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, end)
    try:
        yield ended
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def blas_on_one_thread() -> Iterator[None]:
    """Threads of NumPy's BLAS go on spinning after a product, on the very cores that the recurrent kernels need next."""
    if importlib.util.find_spec("threadpoolctl"):
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1, "blas"):
            yield
    else:
        yield


@contextlib.contextmanager
def progress_bar():
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
                bar.update(min(done, 1.0) - bar.n)

            yield show
    else:
        shown = -1

        def show(done: float, message: str) -> None:
            nonlocal shown
            if int(done * 10) > shown:
                shown = int(done * 10)
                print(f"{min(done, 1.0):4.0%}  {message}", file=sys.stderr, flush=True)

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
    ax.annotate(f"{baseline:.2f}: frequencies of characters alone (order-0 entropy)", (end, baseline), (0, 4),
                textcoords="offset points", ha="right", color=ink, fontsize=9)
    ax.annotate(f"{held_out[-1]:.2f}\nheld-out text", (end, held_out[-1]), (8, 0), textcoords="offset points",
                ha="left", va="center", color=strong, fontsize=10, fontweight="bold", annotation_clip=False)
    middle = len(bits) // 3
    ax.annotate("training, each update", (seen[middle] / 1e6, bits[middle:middle + len(bits) // 10 + 1].max()), (0, 6),
                textcoords="offset points", ha="left", color="#4a90c2", fontsize=9)
    ax.set(xlim=(0, end), ylim=(0, max(bits[0], baseline) * 1.05))
    ax.set_xlabel("characters seen, millions", fontsize=10, color=ink)
    ax.tick_params(colors=ink, labelsize=9, length=3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(grey)
    fig.savefig(path)
