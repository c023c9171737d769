"""Denormals are flushed to zero inside the kernels, and only there."""

import numpy as np
import pytest
from bound import assert_same_bits

import fusedrnn as fr

STEPS, B, H = 200, 8, 48
TINY = np.float32(1e-40)


def halving() -> tuple[fr.RNN, np.ndarray]:
    """A layer that halves its state at each step, and an input of nothing."""
    layer = fr.RNN(H, H, nonlinearity="relu")
    for name, array in layer.params.items():
        array[...] = 0.5 * np.eye(H) if name == "weight_hh_l0" else 0
    return layer, np.zeros((STEPS, B, H), np.float32)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_state_that_decays_ends_at_zero_and_never_is_denormal(threads):
    layer, x = halving()
    with fr.num_threads(threads):
        y, _ = layer(x, np.ones((1, B, H), np.float32))
    halves = np.float32(0.5) ** np.arange(1, STEPS + 1, dtype=np.float32)
    want = np.where(halves >= np.finfo(np.float32).tiny, halves, 0)
    np.testing.assert_array_equal(y, np.broadcast_to(want[:, None, None], y.shape))


def test_gradients_have_the_same_bits_on_any_number_of_threads():
    layer, x = halving()
    found = []
    for threads in (1, 2, 3):
        with fr.num_threads(threads):
            y, _, tape = layer.forward(x, np.ones((1, B, H), np.float32))
            grads = layer.backward(tape, np.full_like(y, TINY), None)
        found.append({"flat": grads.flat, "x": grads.x})
    for other in found[1:]:
        assert_same_bits(other, found[0])


def test_the_callers_own_arithmetic_keeps_its_denormals():
    layer, x = halving()
    layer(x)
    assert TINY * np.float32(1) == TINY
    assert np.all(np.full(B, TINY) + np.full(B, TINY) > TINY)
