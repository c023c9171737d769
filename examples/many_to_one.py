"""Many to one: a class from the last hidden state of sequences of different lengths.

The temporal order problem of Hochreiter and Schmidhuber (1997), task 6a: a sequence of noise symbols holds
two marked ones, each X or Y, one in its first half and one in its second. Which of XX, XY, YX and YY was it?
Guessing is right one time in four; a layer has to carry the first mark over some 20 distracting steps.
"""

from __future__ import annotations

import argparse

import numpy as np

import fusedrnn as fr
from fusedrnn.demo import Adam, softmax_cross_entropy

NOISE = X = 4  # symbols 0..3 are noise, 4 is X and 5 is Y
SYMBOLS, CLASSES = 6, 4
SHORTEST, LONGEST = 30, 50
HIDDEN, BATCH = 48, 64


def draw(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One-hot sequences (T, B, 6), their lengths (B,) and classes (B,); past its end a sequence holds NaN."""
    lengths = rng.integers(SHORTEST, LONGEST + 1, batch)
    ids = rng.integers(NOISE, size=(LONGEST, batch))
    marks = rng.integers(2, size=(2, batch))
    first = (lengths * rng.uniform(0.1, 0.4, batch)).astype(int)
    second = (lengths * rng.uniform(0.5, 0.9, batch)).astype(int)
    ids[first, np.arange(batch)] = X + marks[0]
    ids[second, np.arange(batch)] = X + marks[1]
    x = np.eye(SYMBOLS, dtype=np.float32)[ids]
    x[np.arange(LONGEST)[:, None] >= lengths] = np.nan  # never read
    return x, lengths, 2 * marks[0] + marks[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="stop as soon as a batch is nearly all right, for a test"
    )
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    lstm = fr.LSTM(SYMBOLS, HIDDEN, seed=0)
    lstm.params["bias_ih_l0"][HIDDEN : 2 * HIDDEN] = 2  # forget gates start open
    weight = rng.uniform(-1, 1, (CLASSES, HIDDEN)).astype(np.float32) / np.float32(HIDDEN**0.5)
    bias = np.zeros(CLASSES, np.float32)
    adam = Adam([lstm.flat_params, weight, bias], lr=5e-3)

    updates = 1500
    for update in range(updates):
        x, lengths, target = draw(rng, BATCH)
        _, (h, c), tape = lstm.forward(x, lengths=lengths)
        last = h[-1]  # (B, H): each sequence's state at its own last step
        loss, dlogits = softmax_cross_entropy(last @ weight.T + bias, target)
        dh = (dlogits @ weight)[None]
        grads = lstm.backward(tape, None, (dh, None), wrt=("params",))
        all_grads = [grads.flat, dlogits.T @ last, dlogits.sum(axis=0)]
        fr.clip_grad_norm(all_grads, 1.0)
        adam.step(all_grads)
        if update % 100 == 0:
            print(f"update {update:5}  loss {loss:.4f}", flush=True)
        if loss < (0.05 if args.quick else 0.002):
            break

    x, lengths, target = draw(np.random.default_rng(1), 2000)
    _, (h, _) = lstm(x, lengths=lengths)
    right = np.mean(np.argmax(h[-1] @ weight.T + bias, axis=1) == target)
    print(f"\n{update + 1} updates; {right:.1%} of 2,000 new sequences classified right (guessing: 25.0%)")


if __name__ == "__main__":
    main()
