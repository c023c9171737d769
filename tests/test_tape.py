"""Tapes are used once, by their layer, on what its forward saw; gradients by wrt, and accumulated."""

import copy
import gc
import inspect
import pickle
import threading
import warnings
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
from bound import as_tuple
from devices import every_device, host, put, shares_memory, sized

import fusedrnn as fr
from fusedrnn import _stack

T, B, I, H = 5, 3, 4, 6


@pytest.fixture
def run(cell, device, make_layer, normal):
    """A layer, its input, the tape of its forward and a gradient of y."""
    layer = make_layer(cell, I, H, 2, bidirectional=True, device=device)
    x = put(device, normal(T, B, I))
    *_, tape = layer.forward(x)
    return layer, x, tape, put(device, normal(T, B, 2 * H))


def edit(array, index, value):
    """Writes into an array anywhere; gives what it held."""
    was = host(array).copy()
    edited = was.copy()
    edited[index] = value
    array[...] = edited
    return was


def assert_equal(got, want):
    np.testing.assert_array_equal(host(got), host(want))


def test_a_tape_is_used_once(run):
    layer, _, tape, dy = run
    assert tape.nbytes > 0 and "nbytes" in repr(tape)
    layer.backward(tape, dy)
    assert tape.nbytes == 0 and repr(tape) == "Tape(used)"
    with pytest.raises(RuntimeError, match="tape was used already; retain=True keeps it"):
        layer.backward(tape, dy)


def test_a_used_tape_lets_go_of_its_input(run, device):
    layer, _, _, dy = run
    x = put(device, np.ones((T, B, I), np.float32))
    gone = weakref.ref(x)
    *_, tape = layer.forward(x)
    del x
    assert gone() is not None
    layer.backward(tape, dy)
    gc.collect()
    assert gone() is None


def test_a_retained_tape_gives_the_same_again(run):
    layer, _, tape, dy = run
    first = layer.backward(tape, dy, retain=True)
    second = layer.backward(tape, dy)
    assert_equal(first.flat, second.flat)
    assert_equal(first.x, second.x)
    assert not shares_memory(first.flat, second.flat)


def test_a_retaining_backward_survives_one_that_uses_the_tape_up_meanwhile(run, monkeypatch):
    layer, _, tape, dy = run
    want = layer.backward(tape, dy, retain=True)
    wanted, calls = _stack._wanted, []

    def meanwhile(*args):
        calls.append(args)
        if len(calls) == 1:
            layer.backward(tape, dy)
        return wanted(*args)

    monkeypatch.setattr(_stack, "_wanted", meanwhile)
    assert_equal(layer.backward(tape, dy, retain=True).flat, want.flat)
    assert repr(tape) == "Tape(used)"


def test_the_callers_array_may_change_its_shape(normal):
    layer, x, dy = fr.GRU(I, H, seed=0), normal(T, B, I), normal(T, B, H)
    want = layer.backward(layer.forward(x)[-1], dy)
    *_, tape = layer.forward(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of numpy, which would rather not
        x.shape = (T * B, I)
    assert_equal(layer.backward(tape, dy).x, want.x)


def test_another_layers_tape(run, device):
    layer, x, tape, dy = run
    for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(
            ValueError, match="tape must come from this layer's own forward, got another layer's"
        ):
            other.backward(tape, dy)
    weights = (put(device, np.ones((H, width), np.float32)) for width in (I, H))
    *_, function_tape = fr.rnn_forward(x, *weights)
    with pytest.raises(ValueError, match="tape must come from this layer's own forward"):
        layer.backward(function_tape, dy)
    for backward, name in ((fr.lstm_backward, "lstm"), (fr.gru_backward, "gru")):
        for foreign in (tape, function_tape):
            with pytest.raises(
                ValueError, match=f"{name}: tape must come from {name}_forward, got another's"
            ):
                backward(foreign, dy)
    layer.backward(tape, dy)


def test_a_changed_input_is_an_error(run):
    layer, x, tape, dy = run
    was = edit(x, (T - 1, B - 1, I - 1), 7)
    with pytest.raises(RuntimeError, match="changed"):
        layer.backward(tape, dy)
    x[...] = was
    layer.backward(tape, dy)


def test_changed_parameters_are_an_error(run):
    layer, _, tape, dy = run
    for view in layer.params.values():
        last = tuple(n - 1 for n in view.shape)
        was = edit(view, last, np.nextafter(host(view)[last], np.float32(1)))
        with pytest.raises(RuntimeError, match="changed"):
            layer.backward(tape, dy)
        view[...] = was
    layer.backward(tape, dy)


@every_device
@pytest.mark.parametrize("transposed", [False, True])
def test_changed_weights_of_a_function_are_an_error(transposed, device, normal):
    w_ih, w_hh = normal(4 * H, I), normal(4 * H, H)
    if transposed:
        w_ih, w_hh = np.asfortranarray(w_ih), np.asfortranarray(w_hh)
    x, dy, w_ih, w_hh = (put(device, a) for a in (normal(T, B, I), normal(T, B, H), w_ih, w_hh))
    *_, tape = fr.lstm_forward(x, w_ih, w_hh)
    edit(w_hh, (1, 2), 7)
    with pytest.raises(RuntimeError, match="changed"):
        fr.lstm_backward(tape, dy)


def test_padding_may_change(run):
    layer, x, _, dy = run
    lengths = [T, 0, 2]
    *_, tape = layer.forward(x, None, lengths)
    want = layer.backward(tape, dy, retain=True)
    for array in (x, dy):
        edit(array, np.s_[:, 1], np.nan)
        edit(array, np.s_[2:, 2], np.inf)
    got = layer.backward(tape, dy)
    assert_equal(got.flat, want.flat)
    assert_equal(got.x, want.x)


def test_results_may_be_overwritten_before_backward(run, device):
    layer, x, tape, dy = run
    want = layer.backward(tape, dy)
    buffer = put(device, np.zeros((T, B, 2 * H), np.float32))
    _, final, tape = layer.forward(x, out=buffer)
    for result in (buffer, *as_tuple(final)):
        edit(result, ..., np.nan)
    assert_equal(layer.backward(tape, dy).flat, want.flat)


def test_tapes_cannot_be_copied(run):
    *_, tape, _ = run
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a Tape cannot be copied or pickled"):
            copied(tape)


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrt",
    [("x",), ["state"], {"params"}, ("x", "params"), ("params", "state"), "x", ("x", "state", "params")],
)
def test_wrt_leaves_out_the_rest_and_changes_nothing_else(wrt, run):
    layer, _, tape, dy = run
    full = layer.backward(tape, dy, retain=True)
    grads = layer.backward(tape, dy, wrt=wrt)
    names = {wrt} if isinstance(wrt, str) else set(wrt)
    assert repr(grads) == f"Grads({', '.join(n for n in ('x', 'state', 'params') if n in names)})"
    assert (grads.x is None, grads.state is None) == ("x" not in names, "state" not in names)
    assert (grads.flat is None, grads.params is None) == ("params" not in names,) * 2
    for name in names - {"params"}:
        for got, want in zip(as_tuple(getattr(grads, name)), as_tuple(getattr(full, name)), strict=True):
            assert_equal(got, want)
    if "params" in names:
        assert_equal(grads.flat, full.flat)


def test_gradients_of_parameters_are_views_in_their_order(run):
    layer, _, tape, dy = run
    grads = layer.backward(tape, dy)
    assert list(grads.params) == list(layer.params)
    assert [g.shape for g in grads.params.values()] == [p.shape for p in layer.params.values()]
    assert_equal(np.concatenate([host(g).ravel() for g in grads.params.values()]), grads.flat)
    assert grads.flat.shape == layer.flat_params.shape and grads.flat.flags.writeable
    edit(grads.flat, ..., 3)
    assert all((host(g) == 3).all() for g in grads.params.values())


def test_a_missing_gradient_is_zeros(run, device):
    layer, _, tape, dy = run
    zeros = put(device, np.zeros((4, B, H), np.float32))
    pair = isinstance(layer, fr.LSTM)
    plain = layer.backward(tape, dy, retain=True)
    explicit = layer.backward(tape, dy, (zeros, None) if pair else zeros, retain=True)
    assert_equal(plain.flat, explicit.flat)
    last = put(device, np.resize(host(dy), zeros.shape))
    state_only = layer.backward(tape, None, (last, None) if pair else last, retain=True)
    no_dy = put(device, np.zeros((T, B, 2 * H), np.float32))
    with_zeros = layer.backward(tape, no_dy, (last, zeros) if pair else last)
    assert_equal(state_only.flat, with_zeros.flat)
    assert_equal(state_only.x, with_zeros.x)


@every_device
@pytest.mark.parametrize("through", [lambda g: g, lambda g: pickle.loads(pickle.dumps(g))])
def test_accumulate_into_takes_numpys_gradients_however_they_lie(device, through, normal, close):
    layer = fr.LSTM(I, H, batch_first=True, seed=0, device=device)
    dy = normal(B, T, H)
    tapes = [layer.forward(normal(B, T, I))[-1] for _ in range(2)]
    first, second = (layer.backward(tape, dy, retain=True).x.copy() for tape in tapes)
    total = through(layer.backward(tapes[0], dy))
    assert layer.backward(tapes[1], dy, accumulate_into=total) is total
    close(total.x, first.astype(np.float64) + second, T * B * H, np.sqrt(T * B), backward=True)
    tape = layer.forward(normal(B, T, I))[-1]
    for x in (np.repeat(total.x, 2, axis=-1)[..., ::2], np.broadcast_to(total.x[:1], total.x.shape)):
        for where in ("cpu", device):  # numpy's, or what lies on the GPU
            total.x = put(where, x)
            with pytest.raises(ValueError, match="accumulate_into's gradient of x must be"):
                layer.backward(tape, put(where, dy), wrt="x", accumulate_into=total)


@pytest.mark.parametrize("batch_first", [False, True])
def test_accumulate_into_adds(cell, device, dtype, batch_first, make_layer, normal, close):
    layer = make_layer(cell, I, H, 2, batch_first=batch_first, dtype=dtype, device=device)
    shape = (B, T) if batch_first else (T, B)
    dy = put(device, normal(*shape, H, dtype=dtype))
    tapes = [layer.forward(put(device, normal(*shape, I, dtype=dtype)))[-1] for _ in range(2)]
    first, second = (layer.backward(tape, dy, retain=True) for tape in tapes)
    total = layer.backward(tapes[0], dy)
    assert layer.backward(tapes[1], dy, accumulate_into=total) is total
    for got, a, b in (
        (total.x, first.x, second.x),
        (total.flat, first.flat, second.flat),
        *zip(as_tuple(total.state), as_tuple(first.state), as_tuple(second.state), strict=True),
    ):
        close(host(got), host(a).astype(np.float64) + host(b), T * B * H, np.sqrt(T * B), backward=True)


def test_accumulate_into_adds_only_what_wrt_names(run, device, normal):
    layer, x, tape, dy = run
    total = layer.backward(tape, dy)
    x_was, flat_was = total.x.copy(), total.flat.copy()
    states_were = [s.copy() for s in as_tuple(total.state)]
    *_, longer = layer.forward(put(device, normal(T + 2, B, I)))  # whose x would not even fit
    layer.backward(longer, put(device, normal(T + 2, B, 2 * H)), wrt=("params",), accumulate_into=total)
    assert_equal(total.x, x_was)
    for state, was in zip(as_tuple(total.state), states_were, strict=True):
        assert_equal(state, was)
    assert not np.array_equal(host(total.flat), host(flat_was))


@every_device
def test_functions_accumulate(device, normal, close):
    w_ih, w_hh, dy = (put(device, a) for a in (normal(3 * H, I), normal(3 * H, H), normal(T, B, H)))
    x = put(device, normal(T, B, I))
    tapes = [fr.gru_forward(put(device, normal(T, B, I)), w_ih, w_hh)[-1] for _ in range(2)]
    first, second = (fr.gru_backward(tape, dy, retain=True) for tape in tapes)
    total = fr.gru_backward(tapes[0], dy)
    assert fr.gru_backward(tapes[1], dy, accumulate_into=total) is total
    want = host(first.w_ih).astype(np.float64) + host(second.w_ih)
    close(host(total.w_ih), want, T * B, np.sqrt(T * B), backward=True)
    assert total.c0 is None and total.b_ih is None
    assert fr.gru_backward(fr.gru_forward(x, w_ih, w_hh)[-1], dy, wrt="x").w_ih is None


def test_a_failed_backward_leaves_accumulated_gradients_alone(run, unchanged):
    layer, x, tape, dy = run
    total = layer.backward(tape, dy, retain=True)
    edit(x, (0, 0, 0), 7)
    with (
        unchanged(total.x, total.flat, *as_tuple(total.state)),
        pytest.raises(RuntimeError, match="changed"),
    ):
        layer.backward(tape, dy, accumulate_into=total)


@pytest.fixture
def interrupt(run, monkeypatch):
    """interrupt(before): a block whose backward passes are interrupted, before the kernels or after them.

    A signal's handler, as Ctrl-C's, raises on the way back to Python.
    """
    on = run[0]._stack.on
    place = on if inspect.ismodule(on) else type(on)
    kernels = place.backward

    @contextmanager
    def block(before: bool):
        def interrupted(*args):
            if not before:
                kernels(*args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(place, "backward", interrupted)
            yield

    return block


@pytest.mark.parametrize("retain", [False, True])
def test_an_interrupted_backward_adds_nothing_twice(run, retain, interrupt):
    layer, _, tape, dy = run
    total = layer.backward(tape, dy, retain=True)
    with interrupt(before=False), pytest.raises(KeyboardInterrupt):
        layer.backward(tape, dy, retain=retain, accumulate_into=total)
    with pytest.raises(RuntimeError, match="tape was used up by .* that failed or was interrupted"):
        layer.backward(tape, dy, accumulate_into=total)


@pytest.mark.parametrize("before", [False, True])
def test_an_interrupted_backward_that_added_nothing_leaves_its_tape(run, before, interrupt, unchanged):
    layer, _, tape, dy = run
    want = layer.backward(tape, dy, retain=True)
    into = want if before else None  # after the kernels, it would have been added to
    with unchanged(want.x, want.flat), interrupt(before), pytest.raises(KeyboardInterrupt):
        layer.backward(tape, dy, accumulate_into=into)
    assert_equal(layer.backward(tape, dy).flat, want.flat)


def test_grads_pickle_and_copy_with_their_views(run):
    layer, _, tape, dy = run
    grads = layer.backward(tape, dy)
    for copied in (copy.deepcopy(grads), pickle.loads(pickle.dumps(grads))):
        assert_equal(copied.x, grads.x)
        edit(copied.flat, ..., 1)
        assert (host(copied.params["weight_hh_l0"]) == 1).all() and not (host(grads.flat) == 1).all()


@every_device
def test_of_many_threads_with_one_tape_one_wins(device):
    layer = fr.LSTM(3, 5, seed=0, device=device)
    for _ in range(sized(device, 20, 5)):
        y, _, tape = layer.forward(np.ones((4, 2, 3), np.float32))
        start, outcomes = threading.Barrier(4), []

        def use(tape=tape, y=y, start=start, outcomes=outcomes):
            start.wait()
            try:
                outcomes.append(layer.backward(tape, y))
            except RuntimeError as error:
                outcomes.append(str(error))

        workers = [threading.Thread(target=use) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        refused = [o for o in outcomes if isinstance(o, str)]
        assert len(outcomes) == 4 and len(refused) == 3
        assert all("tape was used already" in text for text in refused)


def test_a_backward_that_fails_leaves_the_tape_usable():
    layer = fr.GRU(3, 5, seed=0)
    x = np.ones((4, 2, 3), np.float32)
    y, _, tape = layer.forward(x)
    x[0] = 2
    with pytest.raises(RuntimeError, match="x was changed"):
        layer.backward(tape, y)
    x[0] = 1
    assert layer.backward(tape, y).x.shape == x.shape
