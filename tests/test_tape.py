"""Tapes are used once, by their layer, on what its forward saw; gradients by wrt, and accumulated."""

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest
from bound import as_tuple

import fusedrnn as fr

T, B, I, H = 5, 3, 4, 6


@pytest.fixture
def run(cell, make_layer, normal):
    """A layer, its input, the tape of its forward and a gradient of y."""
    layer = make_layer(cell, I, H, 2, bidirectional=True)
    x = normal(T, B, I)
    *_, tape = layer.forward(x)
    return layer, x, tape, normal(T, B, 2 * H)


def test_a_tape_is_used_once(run):
    layer, _, tape, dy = run
    assert tape.nbytes > 0 and "nbytes" in repr(tape)
    layer.backward(tape, dy)
    assert tape.nbytes == 0 and repr(tape) == "Tape(used)"
    with pytest.raises(RuntimeError, match="tape was used already; retain=True keeps it"):
        layer.backward(tape, dy)


def test_a_used_tape_lets_go_of_its_input(run):
    layer, _, _, dy = run
    x = np.ones((T, B, I), np.float32)
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
    np.testing.assert_array_equal(first.flat, second.flat)
    np.testing.assert_array_equal(first.x, second.x)
    assert not np.shares_memory(first.flat, second.flat)


def test_another_layers_tape(run):
    layer, x, tape, dy = run
    for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(
            ValueError, match="tape must come from this layer's own forward, got another layer's"
        ):
            other.backward(tape, dy)
    *_, function_tape = fr.rnn_forward(x, np.ones((H, I), np.float32), np.ones((H, H), np.float32))
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
    was = x[T - 1, B - 1, I - 1]
    x[T - 1, B - 1, I - 1] += 1
    with pytest.raises(RuntimeError, match="changed"):
        layer.backward(tape, dy)
    x[T - 1, B - 1, I - 1] = was
    layer.backward(tape, dy)


def test_changed_parameters_are_an_error(run):
    layer, _, tape, dy = run
    for view in layer.params.values():
        was = view.flat[-1]
        view.flat[-1] = np.nextafter(was, np.float32(1))
        with pytest.raises(RuntimeError, match="changed"):
            layer.backward(tape, dy)
        view.flat[-1] = was
    layer.backward(tape, dy)


@pytest.mark.parametrize("transposed", [False, True])
def test_changed_weights_of_a_function_are_an_error(transposed, normal):
    w_ih, w_hh = normal(4 * H, I), normal(4 * H, H)
    if transposed:
        w_ih, w_hh = np.asfortranarray(w_ih), np.asfortranarray(w_hh)
    *_, tape = fr.lstm_forward(normal(T, B, I), w_ih, w_hh)
    w_hh[1, 2] += 1
    with pytest.raises(RuntimeError, match="changed"):
        fr.lstm_backward(tape, normal(T, B, H))


def test_padding_may_change(run, normal):
    layer, x, _, dy = run
    lengths = [T, 0, 2]
    *_, tape = layer.forward(x, None, lengths)
    want = layer.backward(tape, dy, retain=True)
    for array in (x, dy):
        array[:, 1] = np.nan
        array[2:, 2] = np.inf
    got = layer.backward(tape, dy)
    np.testing.assert_array_equal(got.flat, want.flat)
    np.testing.assert_array_equal(got.x, want.x)


def test_results_may_be_overwritten_before_backward(run):
    layer, x, tape, dy = run
    want = layer.backward(tape, dy)
    buffer = np.empty((T, B, 2 * H), np.float32)
    y, final, tape = layer.forward(x, out=buffer)
    buffer[...] = np.nan
    for state in as_tuple(final):
        state[...] = np.nan
    np.testing.assert_array_equal(layer.backward(tape, dy).flat, want.flat)


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
            np.testing.assert_array_equal(got, want)
    if "params" in names:
        np.testing.assert_array_equal(grads.flat, full.flat)


def test_gradients_of_parameters_are_views_in_their_order(run):
    layer, _, tape, dy = run
    grads = layer.backward(tape, dy)
    assert list(grads.params) == list(layer.params)
    assert [g.shape for g in grads.params.values()] == [p.shape for p in layer.params.values()]
    np.testing.assert_array_equal(np.concatenate([g.ravel() for g in grads.params.values()]), grads.flat)
    assert grads.flat.shape == layer.flat_params.shape and grads.flat.flags.writeable
    grads.flat[:] = 3
    assert all((g == 3).all() for g in grads.params.values())


def test_a_missing_gradient_is_zeros(run):
    layer, _, tape, dy = run
    zeros = np.zeros((4, B, H), np.float32)
    pair = isinstance(layer, fr.LSTM)
    plain = layer.backward(tape, dy, retain=True)
    explicit = layer.backward(tape, dy, (zeros, None) if pair else zeros, retain=True)
    np.testing.assert_array_equal(plain.flat, explicit.flat)
    last = dy[:2, :, :H].reshape(-1)[: zeros.size].copy()
    last = np.resize(last, zeros.shape)
    state_only = layer.backward(tape, None, (last, None) if pair else last, retain=True)
    with_zeros = layer.backward(tape, np.zeros_like(dy), (last, zeros) if pair else last)
    np.testing.assert_array_equal(state_only.flat, with_zeros.flat)
    np.testing.assert_array_equal(state_only.x, with_zeros.x)


@pytest.mark.parametrize("batch_first", [False, True])
def test_accumulate_into_adds(cell, dtype, batch_first, make_layer, normal, close):
    layer = make_layer(cell, I, H, 2, batch_first=batch_first, dtype=dtype)
    shape = (B, T) if batch_first else (T, B)
    dy = normal(*shape, H, dtype=dtype)
    tapes = [layer.forward(normal(*shape, I, dtype=dtype))[-1] for _ in range(2)]
    first, second = (layer.backward(tape, dy, retain=True) for tape in tapes)
    total = layer.backward(tapes[0], dy)
    assert layer.backward(tapes[1], dy, accumulate_into=total) is total
    for got, a, b in (
        (total.x, first.x, second.x),
        (total.flat, first.flat, second.flat),
        *zip(as_tuple(total.state), as_tuple(first.state), as_tuple(second.state), strict=True),
    ):
        close(got, a.astype(np.float64) + b, T * B * H, np.sqrt(T * B), backward=True)


def test_accumulate_into_adds_only_what_wrt_names(run, normal):
    layer, x, tape, dy = run
    total = layer.backward(tape, dy)
    x_was, flat_was = total.x.copy(), total.flat.copy()
    states_were = [s.copy() for s in as_tuple(total.state)]
    *_, longer = layer.forward(normal(T + 2, B, I))  # whose x would not even fit
    layer.backward(longer, normal(T + 2, B, 2 * H), wrt=("params",), accumulate_into=total)
    np.testing.assert_array_equal(total.x, x_was)
    np.testing.assert_array_equal(as_tuple(total.state), states_were)
    assert not np.array_equal(total.flat, flat_was)


def test_functions_accumulate(normal, close):
    w_ih, w_hh, dy = normal(3 * H, I), normal(3 * H, H), normal(T, B, H)
    tapes = [fr.gru_forward(normal(T, B, I), w_ih, w_hh)[-1] for _ in range(2)]
    first, second = (fr.gru_backward(tape, dy, retain=True) for tape in tapes)
    total = fr.gru_backward(tapes[0], dy)
    assert fr.gru_backward(tapes[1], dy, accumulate_into=total) is total
    close(total.w_ih, first.w_ih.astype(np.float64) + second.w_ih, T * B, np.sqrt(T * B), backward=True)
    assert total.c0 is None and total.b_ih is None
    assert fr.gru_backward(fr.gru_forward(normal(T, B, I), w_ih, w_hh)[-1], dy, wrt="x").w_ih is None


def test_a_failed_backward_leaves_accumulated_gradients_alone(run, unchanged):
    layer, x, tape, dy = run
    total = layer.backward(tape, dy, retain=True)
    x[0, 0, 0] += 1
    with (
        unchanged(total.x, total.flat, *as_tuple(total.state)),
        pytest.raises(RuntimeError, match="changed"),
    ):
        layer.backward(tape, dy, accumulate_into=total)


def test_grads_pickle_and_copy_with_their_views(run):
    layer, _, tape, dy = run
    grads = layer.backward(tape, dy)
    for copied in (copy.deepcopy(grads), pickle.loads(pickle.dumps(grads))):
        np.testing.assert_array_equal(copied.x, grads.x)
        copied.flat[:] = 1
        assert (copied.params["weight_hh_l0"] == 1).all() and not (grads.flat == 1).all()


def test_of_many_threads_with_one_tape_one_wins():
    layer = fr.LSTM(3, 5, seed=0)
    for _ in range(20):
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
