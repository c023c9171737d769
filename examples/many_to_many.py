"""Many to many: a prediction at every step. A GRU learns to add binary numbers of any length.

Step t sees bit t of both numbers, lowest first, and answers bit t of their sum; the carry has to live in the
state. It trains on numbers of 16 bits and is tested on numbers of 500, where one wrong bit in 500 makes a sum
wrong.
"""

from __future__ import annotations

import argparse

import numpy as np

import fusedrnn as fr
from fusedrnn.demo import Adam

HIDDEN, BATCH = 16, 32
TRAIN_BITS, TEST_BITS = 16, 500


def draw(rng: np.random.Generator, bits: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits of two numbers (T, B, 2), lowest first, and of their sum (T, B), which fits: the highest are 0."""
    x = rng.integers(2, size=(bits, batch, 2))
    x[-1] = 0
    total, carry = np.empty((bits, batch), int), 0
    for t in range(bits):
        column = x[t].sum(axis=-1) + carry
        total[t], carry = column % 2, column // 2
    return x.astype(np.float32), total.astype(np.float32)


def bits_of(number: int, bits: int) -> list[int]:
    return [number >> t & 1 for t in range(bits)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(".")[0])
    parser.add_argument("--quick", action="store_true", help="test on fewer sums")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    gru = fr.GRU(2, HIDDEN, seed=0)
    weight = rng.uniform(-1, 1, HIDDEN).astype(np.float32) / np.float32(HIDDEN**0.5)
    bias = np.zeros(1, np.float32)
    adam = Adam([gru.flat_params, weight, bias], lr=1e-2)

    for update in range(3000):
        x, target = draw(rng, TRAIN_BITS, BATCH)
        y, _, tape = gru.forward(x)
        logits = y @ weight + bias  # (T, B)
        loss = np.mean(np.logaddexp(0, logits) - target * logits)
        dlogits = (1 / (1 + np.exp(-logits)) - target) / np.float32(target.size)
        grads = gru.backward(tape, dlogits[..., None] * weight, wrt=("params",))
        all_grads = [grads.flat, np.tensordot(dlogits, y), dlogits.sum(keepdims=True)[0]]
        fr.clip_grad_norm(all_grads, 1.0)
        adam.step(all_grads)
        if update % 200 == 0:
            print(f"update {update:5}  loss {loss:.5f}", flush=True)
        if loss < 2e-4:
            break

    sums = 50 if args.quick else 500
    x, target = draw(np.random.default_rng(1), TEST_BITS, sums)
    y, _ = gru(x)
    right = np.mean(np.all((y @ weight + bias > 0) == target, axis=0))
    print(f"\n{update + 1} updates on sums of {TRAIN_BITS} bits")
    print(f"{right:.1%} of {sums} sums of {TEST_BITS} bits right in every bit")

    a, b = 123_456_789_012_345, 987_654_321_098_765
    stream, answer = gru.freeze().stream(), 0
    for t, pair in enumerate(zip(bits_of(a, 60), bits_of(b, 60), strict=True)):
        answer |= int(stream.step(np.array(pair, np.float32)) @ weight + bias[0] > 0) << t
    print(f"streamed bit by bit: {a:,} + {b:,} = {answer:,}")


if __name__ == "__main__":
    main()
