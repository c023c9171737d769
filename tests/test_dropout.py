"""Dropout between layers: its masks by their formula, their statistics, and the gradients through them."""

from math import floor, sqrt

import numpy as np
import pytest
from bound import (
    OFFERED,
    Case,
    as_tuple,
    assert_same_bits,
    assert_within_bound,
    draw,
    make_layer,
    run,
    run_reference,
)  # fmt: skip
from devices import every_device, every_place

import fusedrnn as fr

every_cell = pytest.mark.parametrize("cell", OFFERED)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])
every_lengths = pytest.mark.parametrize("ragged", [False, True], ids=["full", "lengths"])


def mask(seed, p, layer, shape):
    """The mask of what a layer (from 1 on) takes, of the whole array's shape (T, B, D*H), padding included.

    Element k of n draws number layer * n + k of SplitMix64 from the seed; it is dropped where the upper 32
    bits are below p 2**32.
    """
    n = int(np.prod(shape))
    index = np.arange(layer * n, (layer + 1) * n, dtype=np.uint64)
    z = index * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    kept = (z >> np.uint64(32)) >= np.uint64(floor(p * 2**32))
    return (kept / (1 - p)).reshape(shape)


def masks(case, seed):
    shape = case.T, case.B, case.D * case.H
    return [mask(seed, case.dropout, layer, shape) for layer in range(1, case.L)]


def identity_stack(p, size, layers=2, bidirectional=False, dtype=np.float64, device="cpu"):
    """A stack whose y is x times all its masks for x >= 0; with two directions, both in turn hold x."""
    layer = fr.RNN(
        size, size, layers, False, dropout=p, bidirectional=bidirectional, nonlinearity="relu", dtype=dtype
    )
    for name, view in layer.params.items():
        view[...] = 0
        if name.startswith("weight_ih"):
            start = size if name.endswith("_reverse") and view.shape[1] > size else 0
            view[:, start : start + size] = np.eye(size)
    return layer.to(device)


# --- Masks --------------------------------------------------------------------------------------------------


@every_device
@every_dtype
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 12345, 2**64 - 1])
def test_masks_are_the_documented_ones_and_scaled_by_the_inverse(device, dtype, bidirectional, p, seed):
    T, B, size = 9, 7, 37
    layer = identity_stack(p, size, bidirectional=bidirectional, dtype=dtype, device=device)
    y, _, tape = layer.forward(np.ones((T, B, size), dtype), seed=seed)
    want = mask(seed, p, 1, y.shape)
    assert set(np.unique(y)) == {0, np.dtype(dtype).type(1 / (1 - p))}
    np.testing.assert_array_equal(y, want.astype(dtype))
    assert tape.seed == seed


@pytest.mark.parametrize("p", [0.02, 0.3, 0.75])
@pytest.mark.parametrize("layers", [2, 4])
def test_rate(p, layers):
    """The share of n elements that is kept is the product of the layers', within 5 standard deviations."""
    T, B, size = 50, 40, 64
    y, _, _ = identity_stack(p, size, layers).forward(np.ones((T, B, size)), seed=99)
    keep = (1 - p) ** (layers - 1)
    sd = sqrt(keep * (1 - keep) / y.size)
    assert abs((y != 0).mean() - keep) < 5 * sd
    # No unit, sequence or step is singled out: the largest of so many means, too.
    for axes, n in (((0, 1), T * B), ((0, 2), T * size), ((1, 2), B * size)):
        assert np.abs((y != 0).mean(axis=axes) - keep).max() < 5 * sqrt(keep * (1 - keep) / n)


def test_masks_of_different_calls_seeds_and_layers_are_independent():
    """Two such masks at p = 1/2 agree on half of the n elements, within 5 standard deviations, sqrt(1/4n)."""
    shape = 30, 20, 32
    layer, n = identity_stack(0.5, 32), int(np.prod(shape))
    x = np.ones((30, 20, 32))
    kept = [layer.forward(x, seed=seed)[0] != 0 for seed in (0, 1, 2, 2**32, 2**63)]
    kept += [layer.forward(x)[0] != 0 for _ in range(3)]
    kept += [mask(0, 0.5, k, shape) != 0 for k in (2, 3)]
    for k, a in enumerate(kept):
        for b in kept[:k]:
            assert abs((a == b).mean() - 0.5) < 5 * sqrt(0.25 / n)
        assert abs((a[1:] == a[:-1]).mean() - 0.5) < 5 * sqrt(0.25 / n), "steps"
        assert abs((a[..., 1:] == a[..., :-1]).mean() - 0.5) < 5 * sqrt(0.25 / n), "units"


def test_extreme_rates():
    x = np.ones((40, 20, 16))
    assert (identity_stack(1e-12, 16).forward(x, seed=1)[0] == 1 / (1 - 1e-12)).all()
    y, _, _ = identity_stack(1 - 1e-9, 16).forward(x, seed=1)
    assert not y.any()


@every_cell
def test_layers_without_a_seed_draw_from_their_own(cell):
    case = Case(cell, "float32", L=3, dropout=0.5)
    x = draw(case).x
    layer, same, other = make_layer(case), make_layer(case), make_layer(case._replace(seed=1))
    other.flat_params[:] = layer.flat_params
    runs = [layer.forward(x) for _ in range(3)]
    assert len({tape.seed for *_, tape in runs}) == 3
    assert not any(np.array_equal(a[0], b[0]) for a, b in zip(runs, runs[1:], strict=False))
    for y, _, tape in runs:
        np.testing.assert_array_equal(same.forward(x)[0], y)
        np.testing.assert_array_equal(other.forward(x, seed=tape.seed)[0], y)
    assert not np.array_equal(other.forward(x)[0], runs[0][0])


# --- Training only, and nothing but the seed decides --------------------------------------------------------


@every_cell
@pytest.mark.parametrize("D", [1, 2])
def test_inference_drops_nothing(cell, D):
    case = Case(cell, "float32", L=3, D=D, dropout=0.6)
    call = draw(case)
    plain = draw(case._replace(dropout=0.0)).layer
    np.testing.assert_array_equal(plain.flat_params, call.layer.flat_params)
    want = plain(call.x, call.state)[0]
    for way in (call.layer, call.layer.freeze()):
        np.testing.assert_array_equal(way(call.x, call.state)[0], want)
    np.testing.assert_array_equal(plain.forward(call.x, call.state)[0], want)
    if D == 1:
        stream = call.layer.freeze().stream(case.B)
        stream.state = call.state
        np.testing.assert_array_equal(np.stack([stream.step(x_t) for x_t in call.x]), want)
    assert not np.array_equal(call.layer.forward(call.x, call.state, seed=1)[0], want)


@every_cell
@every_dtype
@every_lengths
@pytest.mark.parametrize("D", [1, 2])
def test_masks_do_not_depend_on_threads_or_layout(cell, dtype, ragged, D):
    case = Case(cell, dtype, 9, 13, 33, 72, 3, D, ragged=ragged, dropout=0.4)
    call = draw(case)
    with fr.num_threads(1):
        want = run(call, seed=5)
    for threads in (2, 3, 5):
        with fr.num_threads(threads):
            assert_same_bits(run(call, seed=5), want)
    first = run(draw(case._replace(batch_first=True)), seed=5)
    assert_same_bits({k: a.swapaxes(0, 1) if k in ("y", "dx") else a for k, a in first.items()}, want)


# --- Gradients ----------------------------------------------------------------------------------------------


@every_cell
@every_place
@every_lengths
@pytest.mark.parametrize("L, D, p", [(2, 1, 0.5), (2, 2, 0.3), (3, 1, 0.2), (3, 2, 0.5)])
def test_values_and_gradients_under_the_same_masks(cell, device, dtype, ragged, L, D, p):
    case = Case(cell, dtype, 6, 7, 5, 19, L, D, ragged=ragged, dropout=p, device=device)
    call, seed = draw(case), 2**63 + 11
    got = run(call, seed=seed)
    assert_within_bound(got, run_reference(call, masks(case, seed)), case)


@every_cell
def test_what_was_dropped_has_no_gradient(cell):
    B, size, p = 6, 24, 0.7
    layer = make_layer(Case(cell, I=size, H=size, L=2, dropout=p))
    x = np.random.default_rng(0).standard_normal((1, B, size))
    y, final, tape = layer.forward(x, seed=3)
    grads = layer.backward(tape, np.ones_like(y))
    kept = mask(3, p, 1, y.shape)[0] != 0
    assert not kept.any(axis=0).all(), "some unit must be dropped everywhere"
    below = kept & (as_tuple(final)[0][0] != 0)  # layer 0's only step, which relu may have set to zero
    np.testing.assert_array_equal(grads.params["weight_ih_l1"].any(axis=0), below.any(axis=0))
    db = grads.params["bias_ih_l0"].reshape(-1, size)
    assert not db[:, ~kept.any(axis=0)].any() and db[:, below.any(axis=0)].any(axis=0).all()
