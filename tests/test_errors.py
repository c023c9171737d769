"""Bad input: each gets an error that names the argument, what was expected and what came, and changes no array."""

from types import SimpleNamespace

import numpy as np
import numpy.ma
import pytest

import fusedrnn as fr

T, B, I, H = 5, 3, 4, 6
FLOAT32_ONLY = [np.float16, np.float64, np.int32, np.int64, bool, object, np.complex64, ">f4"]


def filled(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.fixture
def e():
    """A layer of each kind, arguments that fit them, and what their calls return."""
    lstm = fr.LSTM(I, H, 2, seed=0)
    x, y = filled(T, B, I), filled(T, B, H)
    h, c = filled(2, B, H), filled(2, B, H)
    w = SimpleNamespace(
        ih=filled(4 * H, I), hh=filled(4 * H, H), b=filled(4 * H), g_ih=filled(3 * H, I), g_hh=filled(3 * H, H)
    )
    *_, tape = lstm.forward(x, (h, c))
    *_, function_tape = fr.lstm_forward(x, w.ih, w.hh)
    frozen = lstm.freeze()
    return SimpleNamespace(
        lstm=lstm, gru=fr.GRU(I, H, 2, seed=0), both=fr.LSTM(I, H, bidirectional=True, seed=0), frozen=frozen,
        first=fr.LSTM(I, H, batch_first=True, seed=0), stream=frozen.stream(B), x=x, y=y, h=h, c=c, w=w, tape=tape,
        function_tape=function_tape, grads=lstm.backward(tape, y, retain=True), lengths=np.array([T, 0, 2]),
    )  # fmt: skip


def arrays_of(e):
    held = [e.x, e.y, e.h, e.c, *vars(e.w).values(), e.lengths, e.grads.x, *e.grads.state, e.grads.flat]
    held += [layer.flat_params for layer in (e.lstm, e.gru, e.both, e.first)]
    return [*held, *e.frozen.params.values()]


def check(e, call, kind, text, unchanged):
    before = e.stream.state
    with unchanged(*arrays_of(e)), pytest.raises(kind, match=text):
        call(e)
    np.testing.assert_array_equal(before, e.stream.state)
    e.lstm.backward(e.tape, e.y, retain=True)  # the tape is as good as it was


# --- dtypes: every argument that is an array, given every wrong one --------------------------------------------

TAKES_ARRAYS = {
    "x": lambda e, bad: e.lstm(bad(e.x)),
    "x of forward": lambda e, bad: e.lstm.forward(bad(e.x)),
    "x of frozen": lambda e, bad: e.frozen(bad(e.x)),
    "x of step": lambda e, bad: e.stream.step(bad(e.x[0])),
    "h0": lambda e, bad: e.lstm(e.x, (bad(e.h), e.c)),
    "c0": lambda e, bad: e.lstm(e.x, (e.h, bad(e.c))),
    "h0 of gru": lambda e, bad: e.gru(e.x, bad(e.h)),
    "h of stream": lambda e, bad: setattr(e.stream, "state", (bad(e.h), e.c)),
    "out": lambda e, bad: e.lstm(e.x, out=bad(e.y)),
    "dy": lambda e, bad: e.lstm.backward(e.tape, bad(e.y)),
    "dh_n": lambda e, bad: e.lstm.backward(e.tape, e.y, (bad(e.h), e.c)),
    "dc_n": lambda e, bad: e.lstm.backward(e.tape, None, (None, bad(e.c))),
    "w_ih": lambda e, bad: fr.lstm(e.x, bad(e.w.ih), e.w.hh),
    "w_hh": lambda e, bad: fr.lstm(e.x, e.w.ih, bad(e.w.hh)),
    "b_ih": lambda e, bad: fr.lstm(e.x, e.w.ih, e.w.hh, bad(e.w.b), e.w.b),
    "b_hh": lambda e, bad: fr.lstm(e.x, e.w.ih, e.w.hh, e.w.b, bad(e.w.b)),
    "h0 of lstm": lambda e, bad: fr.lstm(e.x, e.w.ih, e.w.hh, h0=bad(e.h[0])),
    "out of lstm": lambda e, bad: fr.lstm(e.x, e.w.ih, e.w.hh, out=bad(e.y)),
    "dy of lstm": lambda e, bad: fr.lstm_backward(e.function_tape, bad(e.y)),
    "h of cell": lambda e, bad: fr.lstm_cell(e.x[0], bad(e.h[0]), e.c[0], e.w.ih, e.w.hh),
    "c of cell": lambda e, bad: fr.lstm_cell(e.x[0], e.h[0], bad(e.c[0]), e.w.ih, e.w.hh),
    "bias_hh_l0": lambda e, bad: e.lstm.params.__setitem__("bias_hh_l0", bad(e.w.b)),
    "state_dict['bias_hh_l1']": lambda e, bad: e.lstm.load_state_dict(
        {**e.lstm.state_dict(), "bias_hh_l1": bad(e.w.b)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", FLOAT32_ONLY)
@pytest.mark.parametrize("argument", TAKES_ARRAYS)
def test_another_dtype_than_the_layers(argument, dtype, e, unchanged):
    name = argument.partition(" ")[0].replace("[", r"\[").replace("]", r"\]")
    text = rf"{name} must have dtype float32, got {np.dtype(dtype)}.*\.astype"
    check(e, lambda e: TAKES_ARRAYS[argument](e, lambda a: a.astype(dtype)), TypeError, text, unchanged)


@pytest.mark.parametrize("dtype", [d for d in FLOAT32_ONLY if d != np.float64])
def test_functions_take_float32_and_float64_only(dtype, e, unchanged):
    w = e.w
    for name, call in {
        "x": lambda x: fr.lstm(x, w.ih, w.hh),
        "x_t": lambda x: fr.gru_cell(x[0], None, w.g_ih, w.g_hh),
        "grads": lambda x: fr.clip_grad_norm(x, 1.0),
    }.items():
        text = rf"{name} must have dtype float32 or float64, got {np.dtype(dtype)}.*\.astype"
        check(e, lambda e, call=call: call(e.x.astype(dtype)), TypeError, text, unchanged)


@pytest.mark.parametrize("argument", TAKES_ARRAYS)
@pytest.mark.parametrize(
    ("bad", "came"),
    [
        (np.ndarray.tolist, "must be a numpy.ndarray, got list"),
        (lambda a: 1.0, "must be a numpy.ndarray, got float"),
        (np.ma.masked_array, "must be a plain numpy.ndarray, got its subclass MaskedArray"),
    ],
    ids=["list", "float", "masked array"],
)
def test_what_is_no_plain_array(argument, bad, came, e, unchanged):
    check(e, lambda e: TAKES_ARRAYS[argument](e, bad), TypeError, came, unchanged)


# --- shapes: every argument, with the wrong size, rank and batch -------------------------------------------------


@pytest.mark.parametrize("argument", TAKES_ARRAYS)
@pytest.mark.parametrize(
    "bad",
    [lambda a: a[..., :-1].copy(), lambda a: a[None, None], lambda a: a[..., 0], lambda a: np.concatenate([a, a])],
    ids=["last axis", "rank up", "rank down", "first axis"],
)
def test_shapes(argument, bad, e, unchanged):
    array = e.x if argument in ("x", "x of forward", "x of frozen") else None
    if array is not None and bad(array).ndim == 3 and bad(array).shape[2] == I:
        return  # more steps are no mistake
    name = argument.partition(" ")[0].replace("[", r"\[").replace("]", r"\]")
    text = rf"{name} must have shape .*, got \("
    check(e, lambda e: TAKES_ARRAYS[argument](e, bad), ValueError, text, unchanged)
