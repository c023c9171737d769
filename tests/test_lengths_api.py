"""lengths: each sequence is computed as if it were alone, padding is not read, and any integers do."""

from functools import partial

import numpy as np
import pytest
from bound import as_tuple

import fusedrnn as fr

T, B, I, H = 7, 5, 3, 6
LENGTHS = [4, 7, 0, 1, 4]


@pytest.fixture
def layer(cell, device, make_layer):
    return make_layer(cell, I, H, 2, bidirectional=True, device=device)


def states(layer, normal, batch=B):
    return tuple(normal(4, batch, H) for _ in range(2 if isinstance(layer, fr.LSTM) else 1))


def given(state):
    return state if len(state) > 1 else state[0]


def padding(array, value):
    padded = array.copy()
    for b, n in enumerate(LENGTHS):
        padded[n:, b] = value
    return padded


def test_the_reference_agrees(layer, normal, reference_of, close):
    x, dy = normal(T, B, I), normal(T, B, 2 * H)
    state, dstate = states(layer, normal), states(layer, normal)
    y, final, tape = layer.forward(x, given(state), LENGTHS)
    grads = layer.backward(tape, dy, given(dstate))
    want_y, want_final, want_tape = reference_of(layer, x, state, LENGTHS)
    want = fr.reference.stack_backward(want_tape, dy, dstate)
    n = 2 * T * (I + 2 * H)
    close(y, want_y, n)
    close(grads.x, want.x, n, backward=True)
    for got, expected in zip(as_tuple(final), want_final, strict=True):
        close(got, expected, n)
    for got, expected in zip(as_tuple(grads.state), want.state, strict=True):
        close(got, expected, n, backward=True)
    for got, expected in zip(grads.params.values(), want.params, strict=True):
        close(got, expected, n * T * B, np.sqrt(T * B), backward=True)


def test_each_sequence_is_computed_as_if_alone(layer, normal):
    # On a GPU another batch may take another path, whose sums are in another order.
    rounding = 0 if layer.device == "cpu" else 1e-5
    same = partial(np.testing.assert_allclose, rtol=rounding, atol=rounding)
    x, state = normal(T, B, I), states(layer, normal)
    y, final = layer(x, given(state), LENGTHS)
    for b, n in enumerate(LENGTHS):
        alone = tuple(s[:, b].copy() for s in state)
        y_alone, final_alone = layer(x[:n, b], given(alone))
        same(y[:n, b], y_alone)
        np.testing.assert_array_equal(y[n:, b], np.zeros((T - n, 2 * H)))
        for got, want in zip(as_tuple(final), as_tuple(final_alone), strict=True):
            same(got[:, b], want)
        if n == 0:
            for got, want in zip(as_tuple(final), state, strict=True):
                np.testing.assert_array_equal(got[:, b], want[:, b])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_padding_is_never_read(layer, value, normal):
    x, dy = normal(T, B, I), normal(T, B, 2 * H)
    y, final, tape = layer.forward(x, None, LENGTHS)
    grads = layer.backward(tape, dy)
    y_padded, final_padded, tape_padded = layer.forward(padding(x, value), None, LENGTHS)
    grads_padded = layer.backward(tape_padded, padding(dy, value))
    np.testing.assert_array_equal(y_padded, y)
    np.testing.assert_array_equal(as_tuple(final_padded), as_tuple(final))
    np.testing.assert_array_equal(grads_padded.x, grads.x)
    np.testing.assert_array_equal(grads_padded.flat, grads.flat)
    np.testing.assert_array_equal(grads.x, padding(grads.x, 0))
    np.testing.assert_array_equal(layer.freeze()(padding(x, value), None, LENGTHS)[0], y)


def test_out_is_zeroed_beyond_the_ends(layer, normal):
    x, buffer = normal(T, B, I), np.full((T, B, 2 * H), np.nan, np.float32)
    layer(x, None, LENGTHS, out=buffer)
    np.testing.assert_array_equal(buffer, layer(x, None, LENGTHS)[0])


KINDS = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64, np.intp, ">i4"]


@pytest.mark.parametrize("kind", KINDS)
def test_any_integer_array(kind, normal):
    layer, x = fr.GRU(I, H, seed=0), normal(T, B, I)
    want, _ = layer(x, None, LENGTHS)
    array = np.array(LENGTHS, kind)
    gapped = np.repeat(array, 3)[::3]
    gapped.flags.writeable = False
    for lengths in (
        array,
        gapped,
        tuple(LENGTHS),
        [kind(n) if isinstance(kind, type) else n for n in LENGTHS],
    ):
        np.testing.assert_array_equal(layer(x, lengths=lengths)[0], want)
    np.testing.assert_array_equal(array, LENGTHS)


def test_lengths_of_all_steps_change_nothing(layer, normal):
    x = normal(T, B, I)
    y, final = layer(x)
    y_full, final_full = layer(x, lengths=[T] * B)
    np.testing.assert_array_equal(y_full, y)
    np.testing.assert_array_equal(as_tuple(final_full), as_tuple(final))


def test_lengths_of_no_steps(layer, normal):
    x, dy, state = normal(T, B, I), normal(T, B, 2 * H), states(layer, normal)
    y, final, tape = layer.forward(x, given(state), np.zeros(B, int))
    assert not y.any()
    np.testing.assert_array_equal(as_tuple(final), state)
    grads = layer.backward(tape, dy, given(state))
    assert not grads.x.any() and not grads.flat.any()
    np.testing.assert_array_equal(as_tuple(grads.state), state)


def test_lengths_with_an_empty_batch_or_sequence(layer, normal):
    for lengths in ([], (), np.zeros(0, np.int32)):
        assert layer(normal(T, 0, I), lengths=lengths)[0].shape == (T, 0, 2 * H)
    assert layer(normal(0, B, I), lengths=[0] * B)[0].shape == (0, B, 2 * H)


@pytest.mark.parametrize("length", [4, np.int64(4), np.array(4)])
def test_an_unbatched_sequence_takes_one_number(length, normal):
    layer, x = fr.LSTM(I, H, seed=0), normal(T, I)
    y, (h, _) = layer(x, lengths=length)
    want, (h_want, _) = layer(x[:4])
    np.testing.assert_array_equal(y[:4], want)
    np.testing.assert_array_equal(y[4:], np.zeros((3, H)))
    np.testing.assert_array_equal(h, h_want)


def test_batch_first_keeps_lengths_by_sequence(normal):
    first, major = (fr.LSTM(I, H, batch_first=b, seed=0) for b in (True, False))
    x = normal(T, B, I)
    y, _ = first(x.swapaxes(0, 1), None, LENGTHS)
    np.testing.assert_array_equal(y.swapaxes(0, 1), major(x, None, LENGTHS)[0])


@pytest.mark.parametrize("reverse", [False, True])
def test_functional_forms_take_lengths(reverse, normal, close):
    w_ih, w_hh, x = normal(4 * H, I), normal(4 * H, H), normal(T, B, I)
    results = fr.lstm(x, w_ih, w_hh, lengths=np.array(LENGTHS), reverse=reverse)
    want = fr.reference.lstm(x, w_ih, w_hh, lengths=LENGTHS, reverse=reverse)
    for got, expected in zip(results, want, strict=True):
        close(got, expected, T * (I + H))
