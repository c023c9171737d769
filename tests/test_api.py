"""Layers and functional forms: every option gives what the reference does, in the promised shapes."""

import inspect
import re
import tracemalloc
from array import array
from itertools import product, repeat

import numpy as np
import pytest
from bound import as_tuple
from devices import host

import fusedrnn as fr
from fusedrnn import _core

T, B, I, H = 6, 3, 5, 7
STACKS = list(product((1, 2), (False, True)))


def terms(layer, steps=T):
    return steps * layer.num_layers * (layer.input_size + 2 * layer.hidden_size)


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("num_layers", "bidirectional"), STACKS)
def test_layer_and_its_gradients_are_the_reference(
    cell, dtype, device, num_layers, bidirectional, bias, make_layer, normal, reference_of, close
):
    layer = make_layer(cell, I, H, num_layers, bias, bidirectional=bidirectional, dtype=dtype, device=device)
    rows, width = num_layers * (1 + bidirectional), (1 + bidirectional) * H
    x, dy = normal(T, B, I, dtype=dtype), normal(T, B, width, dtype=dtype)
    count = 2 if cell == "lstm" else 1
    state = tuple(normal(rows, B, H, dtype=dtype) for _ in range(count))
    dstate = tuple(normal(rows, B, H, dtype=dtype) for _ in range(count))
    as_given = (lambda s: s) if count == 2 else (lambda s: s[0])

    y, final, tape = layer.forward(x, as_given(state))
    grads = layer.backward(tape, dy, as_given(dstate))
    want_y, want_final, want_tape = reference_of(layer, x, state)
    want = fr.reference.stack_backward(want_tape, dy, dstate)

    n = terms(layer)
    assert y.dtype == grads.flat.dtype == dtype
    close(y, want_y, n)
    for got, expected in zip(as_tuple(final), want_final, strict=True):
        close(got, expected, n)
    close(grads.x, want.x, n, backward=True)
    for got, expected in zip(as_tuple(grads.state), want.state, strict=True):
        close(got, expected, n, backward=True)
    for got, expected in zip(grads.params.values(), want.params, strict=True):
        close(got, expected, n * T * B, np.sqrt(T * B), backward=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_functional_forms_are_the_reference(cell, dtype, bias, reverse, functions, normal, close):
    ours, reference = functions(cell, fr), functions(cell, fr.reference)
    row = next(row for row in _core.CELLS if row["name"] == cell)
    rows = row["gates"] * H
    weights = [normal(rows, I, dtype=dtype) / 2, normal(rows, H, dtype=dtype) / 2]
    weights += [normal(rows, dtype=dtype), normal(rows, dtype=dtype)] if bias else [None, None]
    states = [normal(B, H, dtype=dtype) for _ in range(row["states"])]
    x, dy = normal(T, B, I, dtype=dtype), normal(T, B, H, dtype=dtype)
    args = (x, *weights, *states, [T, 0, 3], reverse)
    n = T * (I + H)

    results = ours[""](*args)
    *trained, tape = ours["_forward"](*args)
    *want, want_tape = reference["_forward"](*args)
    for got, again, expected in zip(results, trained, want, strict=True):
        close(got, expected, n)
        np.testing.assert_array_equal(got, again)

    dstates = [normal(B, H, dtype=dtype) for _ in states]
    grads = ours["_backward"](tape, dy, *dstates)
    expected = reference["_backward"](want_tape, dy, *dstates)
    for name, want_grad in expected._asdict().items():
        got = getattr(grads, name)
        if want_grad is None:
            assert got is None, name
        else:
            close(got, want_grad, n * T * B, np.sqrt(T * B), backward=True)
    assert grads.flat.size == sum(w.size for w in weights if w is not None)
    np.testing.assert_array_equal(grads.params["w_hh"], grads.w_hh)

    stepped = ours["_cell"](x[0], *states, *weights)
    want_step = reference["_cell"](x[0], *states, *weights)
    for got, expected in zip(as_tuple(stepped), as_tuple(want_step), strict=True):
        close(got, expected, I + H)
    alone = ours["_cell"](x[0, 1], *(s[1] for s in states), *weights)
    for got, expected in zip(as_tuple(alone), as_tuple(stepped), strict=True):
        np.testing.assert_array_equal(got, expected[1])


@pytest.mark.parametrize("missing", ["state", "h", "c"])
def test_missing_states_are_zeros(missing, device, normal):
    layer = fr.LSTM(I, H, 2, seed=0, device=device)
    x, h, zeros = normal(T, B, I), normal(2, B, H), np.zeros((2, B, H), np.float32)
    given, full = {
        "state": (None, (zeros, zeros)),
        "h": ((None, h), (zeros, h)),
        "c": ([h, None], (h, zeros)),
    }[missing]
    np.testing.assert_array_equal(layer(x, given)[0], layer(x, full)[0])


# --- Shapes and layouts ---------------------------------------------------------------------------


def test_batch_first_transposes_x_y_and_their_gradients(cell, device, make_layer, normal):
    options = dict(num_layers=2, bidirectional=True, device=device)
    first, major = make_layer(cell, I, H, batch_first=True, **options), make_layer(cell, I, H, **options)
    x, dy = normal(B, T, I), normal(B, T, 2 * H)
    y, state, tape = first.forward(x)
    want_y, want_state, want_tape = major.forward(x.swapaxes(0, 1))
    assert y.shape == (B, T, 2 * H) and y.flags.c_contiguous
    np.testing.assert_array_equal(y, want_y.swapaxes(0, 1))
    np.testing.assert_array_equal(as_tuple(state), as_tuple(want_state))
    grads, want = first.backward(tape, dy), major.backward(want_tape, dy.swapaxes(0, 1))
    assert grads.x.shape == x.shape
    np.testing.assert_array_equal(grads.x, want.x.swapaxes(0, 1))
    np.testing.assert_array_equal(grads.flat, want.flat)


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_input_is_a_batch_of_one(cell, device, batch_first, make_layer, normal):
    layer = make_layer(cell, I, H, 2, batch_first=batch_first, bidirectional=True, device=device)
    x, dy = normal(T, I), normal(T, 2 * H)
    axis = 0 if batch_first else 1

    def one(a):
        return np.expand_dims(a, axis)

    state = tuple(normal(4, H) for _ in range(2 if cell == "lstm" else 1))

    def as_given(s):
        return tuple(s) if cell == "lstm" else next(iter(s))

    y, final, tape = layer.forward(x, as_given(state))
    want_y, want_final, want_tape = layer.forward(one(x), as_given(s[:, None] for s in state))
    assert y.shape == (T, 2 * H)
    np.testing.assert_array_equal(one(y), want_y)
    for got, want in zip(as_tuple(final), as_tuple(want_final), strict=True):
        np.testing.assert_array_equal(got[:, None], want)
    grads, want = layer.backward(tape, dy, as_given(state)), layer.backward(
        want_tape, one(dy), as_given(s[:, None] for s in state)
    )
    np.testing.assert_array_equal(one(grads.x), want.x)
    np.testing.assert_array_equal(grads.flat, want.flat)
    for got, expected in zip(as_tuple(grads.state), as_tuple(want.state), strict=True):
        np.testing.assert_array_equal(got[:, None], expected)


def strided(a):
    """The same numbers, read-only, backwards in memory and with gaps."""
    wide = np.full((*a.shape[:-1], 2 * a.shape[-1]), np.nan, a.dtype)
    view = wide[..., ::2][::-1]
    view[...] = a
    view.flags.writeable = False
    return view


def unaligned(a):
    raw = np.zeros(a.nbytes + 1, np.uint8)
    view = raw[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    assert not view.flags.aligned
    return view


def mapped(a, path):
    view = np.memmap(path / "array", a.dtype, "w+", shape=a.shape)
    view[...] = a
    return view


@pytest.mark.parametrize("lay_out", [strided, unaligned, np.asfortranarray, mapped])
def test_any_layout_of_the_inputs_gives_the_same_bits(cell, lay_out, functions, normal, unchanged, tmp_path):
    forms = functions(cell, fr)
    row = next(row for row in _core.CELLS if row["name"] == cell)
    rows = row["gates"] * H
    plain = [normal(T, B, I), normal(rows, I), normal(rows, H), normal(rows), normal(rows)]
    plain += [normal(B, H) for _ in range(row["states"])]
    dy = normal(T, B, H)
    folders = [tmp_path / str(k) for k in range(len(plain) + 1)]
    for folder in folders:
        folder.mkdir()
    arrange = (lambda a, folder: lay_out(a, folder)) if lay_out is mapped else (lambda a, _: lay_out(a))
    laid_out = [arrange(a, folder) for a, folder in zip(plain, folders, strict=False)]

    with unchanged(*laid_out):
        *got, tape = forms["_forward"](*laid_out)
        grads = forms["_backward"](tape, arrange(dy, folders[-1]))
    *want, want_tape = forms["_forward"](*plain)
    want_grads = forms["_backward"](want_tape, dy)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(grads.x, want_grads.x)
    np.testing.assert_array_equal(grads.flat, want_grads.flat)


@pytest.mark.parametrize("steps,batch", [(0, B), (T, 0), (0, 0)])
def test_empty_sequences_and_batches(cell, device, steps, batch, make_layer, normal):
    layer = make_layer(cell, I, H, 2, bidirectional=True, device=device)
    state = tuple(normal(4, batch, H) for _ in range(2 if cell == "lstm" else 1))
    given = state if cell == "lstm" else state[0]
    x, dy = normal(steps, batch, I), normal(steps, batch, 2 * H)
    y, final, tape = layer.forward(x, given)
    assert y.shape == (steps, batch, 2 * H)
    np.testing.assert_array_equal(as_tuple(final), state)
    np.testing.assert_array_equal(as_tuple(layer(x, given)[1]), state)
    grads = layer.backward(tape, dy, given)
    assert grads.x.shape == x.shape
    np.testing.assert_array_equal(as_tuple(grads.state), state)
    np.testing.assert_array_equal(grads.flat, np.zeros(layer.flat_params.shape))


@pytest.mark.parametrize("batch_first", [False, True])
def test_out_is_written_and_returned(cell, device, batch_first, make_layer, normal):
    layer = make_layer(cell, I, H, batch_first=batch_first, device=device)
    x = normal(T, B, I)
    want, _ = layer(x)
    for call in (layer, layer.forward, layer.freeze()):
        frame = np.full((T, B + 2, 2 * H), np.nan, np.float32)
        buffer = frame[:, 1:-1, :H]
        assert call(x, out=buffer)[0] is buffer
        np.testing.assert_array_equal(buffer, want)
        frame[:, 1:-1, :H] = np.nan
        assert np.isnan(frame).all(), "written beyond out"
    alone = np.empty((T, H), np.float32)
    assert layer(x[:, 0], out=alone)[0] is alone
    np.testing.assert_array_equal(alone, layer(x[:, 0])[0])


def test_functional_out(cell, functions, normal):
    forms = functions(cell, fr)
    rows = next(row["gates"] for row in _core.CELLS if row["name"] == cell) * H
    args = normal(T, B, I), normal(rows, I), normal(rows, H)
    buffer = np.empty((T, B, H), np.float32)
    for form in forms[""], forms["_forward"]:
        buffer[...] = np.nan
        assert form(*args, out=buffer)[0] is buffer
        np.testing.assert_array_equal(buffer, forms[""](*args)[0])


# --- Parameters -----------------------------------------------------------------------------------


def test_parameters_have_pytorchs_names_shapes_and_order():
    layer = fr.LSTM(I, H, 2, bidirectional=True)
    assert {name: view.shape for name, view in layer.params.items()} == {
        "weight_ih_l0": (4 * H, I), "weight_hh_l0": (4 * H, H),
        "bias_ih_l0": (4 * H,), "bias_hh_l0": (4 * H,),
        "weight_ih_l0_reverse": (4 * H, I), "weight_hh_l0_reverse": (4 * H, H),
        "bias_ih_l0_reverse": (4 * H,), "bias_hh_l0_reverse": (4 * H,),
        "weight_ih_l1": (4 * H, 2 * H), "weight_hh_l1": (4 * H, H),
        "bias_ih_l1": (4 * H,), "bias_hh_l1": (4 * H,),
        "weight_ih_l1_reverse": (4 * H, 2 * H), "weight_hh_l1_reverse": (4 * H, H),
        "bias_ih_l1_reverse": (4 * H,), "bias_hh_l1_reverse": (4 * H,),
    }  # fmt: skip
    np.testing.assert_array_equal(
        np.concatenate([v.ravel() for v in layer.params.values()]), layer.flat_params
    )
    assert list(fr.GRU(I, H, bias=False).params) == ["weight_ih_l0", "weight_hh_l0"]


def test_parameters_are_views_of_one_buffer(make_layer, cell, normal):
    layer = make_layer(cell, I, H)
    buffer, x = layer.flat_params, normal(T, B, I)
    before, _ = layer(x)
    layer.params["weight_hh_l0"][...] = 0
    layer.params["weight_ih_l0"] = np.zeros_like(layer.params["weight_ih_l0"])
    layer.flat_params *= 0.5  # in place, through the property
    assert layer.flat_params is buffer
    weights = layer.params["weight_ih_l0"]
    np.testing.assert_array_equal(weights.ravel(), buffer[: weights.size])
    with pytest.raises(ValueError, match="flat_params must have shape"):
        layer.flat_params = buffer[:-1]
    assert np.count_nonzero(buffer) == 2 * layer.params["bias_ih_l0"].size
    assert not np.array_equal(layer(x)[0], before)
    buffer[:] = 0
    np.testing.assert_array_equal(layer(x)[0], np.zeros((T, B, H)))


def test_initial_parameters_are_uniform_and_seeded(cell, dtype, make_layer):
    layer, again = (make_layer(cell, 20, 64, seed=5, dtype=dtype) for _ in range(2))
    other = make_layer(cell, 20, 64, seed=6, dtype=dtype)
    np.testing.assert_array_equal(layer.flat_params, again.flat_params)
    assert not np.array_equal(layer.flat_params, other.flat_params)
    bound = 1 / np.sqrt(64)
    n = layer.flat_params.size
    assert np.abs(layer.flat_params).max() <= bound
    assert abs(layer.flat_params.astype(np.float64).mean()) < 5 * bound / np.sqrt(3 * n)
    assert abs(layer.flat_params.astype(np.float64).var() / (bound**2 / 3) - 1) < 5 / np.sqrt(n)


def test_state_dict_round_trip(cell, device, make_layer):
    layer, other = (make_layer(cell, I, H, 2, seed=s, device=device) for s in (1, 9))
    state = layer.state_dict()
    assert list(state) == list(layer.params)
    other.load_state_dict(state)
    np.testing.assert_array_equal(host(other.flat_params), host(layer.flat_params))
    state["weight_hh_l0"][...] = np.zeros(state["weight_hh_l0"].shape, np.float32)
    assert host(layer.params["weight_hh_l0"]).any(), "a state dict holds copies"


def test_load_state_dict_takes_its_own_views_in_any_order():
    layer = fr.RNN(H, H, 2, seed=0)
    first, second = layer.state_dict(), dict(layer.params)
    swapped = {k: second[k.replace("l0", "l2").replace("l1", "l0").replace("l2", "l1")] for k in second}
    layer.load_state_dict(swapped)
    np.testing.assert_array_equal(layer.params["weight_ih_l0"], first["weight_ih_l1"])
    np.testing.assert_array_equal(layer.params["weight_ih_l1"], first["weight_ih_l0"])


# --- Dropout --------------------------------------------------------------------------------------


def test_dropout_zeroes_between_layers_and_scales_the_rest():
    p, size, steps = 0.3, 50, 40
    layer = fr.RNN(size, size, 2, dropout=p, nonlinearity="relu", bias=False, dtype=np.float64)
    for name, view in layer.params.items():
        view[...] = np.eye(size) if name.startswith("weight_ih") else 0
    x = np.ones((steps, 4, size))
    y, _, tape = layer.forward(x, seed=3)
    assert tape.seed == 3
    dropped = y == 0
    np.testing.assert_allclose(y[~dropped], 1 / (1 - p), rtol=1e-15)
    assert abs(dropped.mean() - p) < 5 * np.sqrt(p * (1 - p) / y.size)
    np.testing.assert_array_equal(layer(x)[0], x)
    np.testing.assert_array_equal(layer.freeze()(x)[0], x)
    np.testing.assert_array_equal(layer.backward(tape, np.ones_like(y)).x, y)  # the same mask, once more


def test_dropout_masks_follow_from_the_seed(normal):
    layer, same = (fr.LSTM(I, H, 3, dropout=0.5, seed=4) for _ in range(2))
    x = normal(T, B, I)
    first, _, tape = layer.forward(x)
    second, _, _ = layer.forward(x)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(layer.forward(x, seed=tape.seed)[0], first)
    np.testing.assert_array_equal(same.forward(x)[0], first)
    for seed in (0, 2**64 - 1, np.uint64(7)):
        np.testing.assert_array_equal(layer.forward(x, seed=seed)[0], same.forward(x, None, None, seed)[0])


def test_dropout_of_a_single_layer_warns():
    with pytest.warns(UserWarning, match="num_layers=1, dropout=0.5 does nothing") as caught:
        layer = fr.GRU(I, H, dropout=0.5)
    assert caught[0].filename == __file__
    _, _, tape = layer.forward(np.zeros((T, B, I), np.float32))
    assert tape.seed is None


# --- Clipping, threads, configuration -------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0])
def test_clip_grad_norm_scales_to_the_norm(dtype, max_norm, normal):
    flat = normal(10_001, dtype=dtype)
    before = flat.astype(np.float64)
    norm = fr.clip_grad_norm(flat, max_norm)
    assert norm == pytest.approx(np.linalg.norm(before), rel=1e-14)
    factor = min(1.0, max_norm / (norm + 1e-6))
    np.testing.assert_array_equal(flat, (before.astype(dtype) * dtype.type(factor)) if factor < 1 else before)


def test_clip_grad_norm_takes_grads_and_several_arrays_as_one(normal):
    layer = fr.LSTM(I, H)
    y, _, tape = layer.forward(normal(T, B, I))
    grads, more = layer.backward(tape, normal(T, B, H)), normal(4, 6)[:, ::2]
    before = np.concatenate([grads.flat, more.ravel()]).astype(np.float64)
    norm = fr.clip_grad_norm([grads, more], 0.1)
    assert norm == pytest.approx(np.linalg.norm(before), rel=1e-14)
    after = np.concatenate([grads.flat, more.ravel()])
    assert np.linalg.norm(after) == pytest.approx(0.1, rel=1e-5)
    np.testing.assert_array_equal(grads.params["bias_hh_l0"], grads.flat[-4 * H :])


def test_clip_grad_norm_takes_no_masks():
    masked = np.ma.masked_array(np.ones(3), [True, False, False])
    with pytest.raises(TypeError, match="grads must be a plain numpy.ndarray, got its subclass MaskedArray"):
        fr.clip_grad_norm(masked, 1.0)
    np.testing.assert_array_equal(masked.data, np.ones(3))


def test_clip_grad_norm_uses_float64():
    huge = np.full(1000, 1e30, np.float32)
    assert fr.clip_grad_norm(huge, 1.0) == pytest.approx(np.sqrt(1000) * float(np.float32(1e30)), rel=1e-12)
    assert np.linalg.norm(huge) == pytest.approx(1.0, rel=1e-5)


def test_num_threads_is_local_to_the_context():
    from contextvars import copy_context

    before = fr.get_num_threads()
    with fr.num_threads(3):
        assert fr.get_num_threads() == 3
        inside = copy_context()
        with fr.num_threads(1):
            assert fr.get_num_threads() == 1
            assert inside.run(fr.get_num_threads) == 3
        assert fr.get_num_threads() == 3
    assert fr.get_num_threads() == before
    assert inside.run(fr.get_num_threads) == 3
    fr.set_num_threads(2)
    try:
        assert fr.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError), fr.num_threads(5):
            raise ZeroDivisionError
        assert fr.get_num_threads() == 2
    finally:
        fr.set_num_threads(before)


def test_show_config(capsys):
    config = fr.show_config(mode="dict")
    assert config["version"] == fr.__version__
    assert config["isa"] in config["available_isas"]
    assert config["num_threads"] == fr.get_num_threads()
    assert fr.show_config() is None
    printed = capsys.readouterr().out
    assert {"numpy", "cuda", "compiler"} < set(config)
    for name, value in config.items():
        assert re.search(rf"^{name} +\S", printed, re.MULTILINE), name
        assert ", ".join(value) in printed if isinstance(value, list) else str(value) in printed, name


# --- What the package offers ----------------------------------------------------------------------


def test_attributes_and_repr(cell, make_layer):
    layer = make_layer(cell, I, H, 2, False, True, 0.25, True, dtype=np.float64)
    for thing in layer, layer.freeze():
        assert (thing.cell, thing.input_size, thing.hidden_size, thing.num_layers) == (cell, I, H, 2)
        assert (thing.bias, thing.batch_first, thing.dropout, thing.bidirectional) == (
            False,
            True,
            0.25,
            True,
        )
        assert (thing.proj_size, thing.dtype) == (0, np.float64)
        for attribute in ("hidden_size", "params", "dtype"):
            with pytest.raises(AttributeError):
                setattr(thing, attribute, None)
    assert eval(repr(layer), {**vars(fr), "float64": np.float64}).cell == cell
    assert (repr(layer).count("reset_after"), repr(layer).count("relu")) == (
        cell == "gru_reset_before",
        cell == "rnn_relu",
    )


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("suffix", ["", "_forward", "_cell", "_backward"])
def test_reference_is_called_the_same_way(name, suffix):
    ours, reference = (
        list(inspect.signature(getattr(m, name + suffix)).parameters.values()) for m in (fr, fr.reference)
    )
    extra = {"out", "wrt", "retain", "accumulate_into"}
    got = [(p.name, p.kind, p.default) for p in ours if p.name not in extra]
    assert got == [(p.name, p.kind, p.default) for p in reference]


@pytest.mark.parametrize("steps, batch", [(0, 2), (3, 0)])
def test_empty_results_are_written_and_added_to(steps, batch, device, make_layer):
    layer = make_layer("gru", 3, 4, device=device)
    x, out = np.empty((steps, batch, 3), np.float32), np.empty((steps, batch, 4), np.float32)
    y, _ = layer(x, out=out)
    assert y is out
    y, _, tape = layer.forward(x, out=out)
    grads = layer.backward(tape, y, retain=True)
    assert layer.backward(tape, y, accumulate_into=grads) is grads


@pytest.mark.parametrize("steps", [10, 9000])
def test_results_are_ordinary_arrays(steps, make_layer, normal):
    y, _ = make_layer("gru", 3, 64)(normal(steps, 1, 3))
    y.flags.writeable = False
    y.flags.writeable = True
    y[-1] = 0


@pytest.mark.parametrize("lengths", [range(1, 4), array("q", [1, 2, 3]), [np.int64(1), 2, 3], (1, 2, 3)])
def test_lengths_are_any_sequence_of_integers(lengths, make_layer, normal):
    layer, x = make_layer("gru", 3, 4), normal(3, 3, 3)
    np.testing.assert_array_equal(layer(x, lengths=lengths)[0], layer(x, lengths=[1, 2, 3])[0])


def test_a_step_into_out_allocates_no_array(normal):
    stream, x_t, h = fr.GRU(9, 500, seed=0).freeze().stream(), normal(9), np.empty(500, np.float32)
    stream.step(x_t, out=h)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in repeat(None, 20):
            stream.step(x_t, out=h)
        after, peak = tracemalloc.get_traced_memory()
        assert after == before and peak - before < h.nbytes // 4
        tracemalloc.reset_peak()
        stream.step(x_t)
        assert tracemalloc.get_traced_memory()[1] - before >= h.nbytes, "a new array is seen"
    finally:
        tracemalloc.stop()


def test_every_public_name_is_documented():
    for name in fr.__all__:
        thing = getattr(fr, name)
        assert inspect.getdoc(thing), name
        methods = vars(thing).items() if thing in (fr.Layer, fr.Frozen, fr.Stream) else ()
        for member, value in methods:
            if member == "__call__" or (not member.startswith("_") and member != "cells"):
                assert inspect.getdoc(value), (name, member)


def test_functions_document_what_they_take_give_and_raise():
    families = ("lstm", "gru", "rnn")
    for name in [f + form for f in families for form in ("", "_forward", "_backward", "_cell")]:
        lines = inspect.getdoc(getattr(fr, name)).splitlines()
        assert {"Parameters", "Returns", "Raises"} <= set(lines), name
        for argument in inspect.signature(getattr(fr, name)).parameters:
            assert any(re.match(rf"(\w+, )*{argument}\b", line) for line in lines), (name, argument)


def test_load_state_dict_takes_what_converts_to_an_array():
    class Tensor:
        def __init__(self, data):
            self.data = data

        def __array__(self, dtype=None, copy=None):
            return self.data

    source, target = fr.LSTM(3, 4, seed=1), fr.LSTM(3, 4, seed=2)
    target.load_state_dict({name: Tensor(value) for name, value in source.state_dict().items()})
    np.testing.assert_array_equal(target.flat_params, source.flat_params)
