"""The demo's model and optimiser in NumPy around a fused layer: one-hot characters, softmax, cross-entropy
and Adam.

Shapes: T time steps, B streams of text, H hidden size, V vocabulary size, N = T * B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fusedrnn as fr

CELLS = {"rnn": fr.RNN, "gru": fr.GRU, "lstm": fr.LSTM}
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # stands for every character outside the vocabulary


def softmax_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean of -log softmax(logits)[targets], and its gradient, written over logits (N, V); targets (N,)."""
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
        if cell == "lstm":
            # Gates that start open remember from the start (Jozefowicz et al. 2015, section 2.2).
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

    def loss(self, ids: np.ndarray, state: Any) -> tuple[float, Any]:
        """Mean loss in nats of ids[1:] given ids[:-1], and the state after; ids (T + 1, B)."""
        y, state = self.rnn(self.one_hot[ids[:-1]], state)
        loss, _ = softmax_cross_entropy(self.logits(y), ids[1:].ravel())
        return loss, state

    def loss_and_gradients(self, ids: np.ndarray, state: Any) -> tuple[float, Any, list[np.ndarray]]:
        """Likewise, with the gradients of `params` in their order. They stop at the window's first step."""
        y, state, tape = self.rnn.forward(self.one_hot[ids[:-1]], state)
        loss, dlogits = softmax_cross_entropy(self.logits(y), ids[1:].ravel())
        dy = (dlogits @ self.weight).reshape(y.shape)
        grads = self.rnn.backward(tape, dy, wrt=("params",))
        return loss, state, [grads.flat, dlogits.T @ y.reshape(len(dlogits), -1), dlogits.sum(axis=0)]

    def logits(self, y: np.ndarray) -> np.ndarray:
        """(..., H) to (N, V)."""
        logits: np.ndarray = y.reshape(-1, y.shape[-1]) @ self.weight.T
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


def sample(
    model: CharModel, prompt: str, length: int, temperature: float, rng: np.random.Generator
) -> Iterator[str]:
    """Continues the prompt (not empty) by characters drawn one by one, each fed back as the next input."""
    stream = model.rnn.freeze().stream()
    h = np.empty(model.rnn.hidden_size, model.weight.dtype)
    for index in model.encode(prompt):
        stream.step(model.one_hot[index], out=h)
    for _ in range(length):
        logits = model.logits(h)[0].astype(np.float64)
        if temperature == 0:
            index = int(logits.argmax())
        else:
            odds = np.exp((logits - logits.max()) / temperature)
            index = int(rng.choice(len(odds), p=odds / odds.sum()))
        yield model.vocabulary[index]
        stream.step(model.one_hot[index], out=h)
