"""Bad input: the error names the argument, what was expected and what came, and no array is changed."""

import copy
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
from devices import host, needs_gpu

import fusedrnn as fr

T, B, I, H = 5, 3, 4, 6
FLOAT32_ONLY = [np.float16, np.float64, np.int32, np.int64, bool, object, np.complex64, ">f4"]


def filled(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def e(request):
    """A layer of each kind, arguments that fit them, and what their calls return.

    On a GPU the layers are there, and numpy's arrays are what they are given; the functions stay on the CPU.
    """
    device = request.param
    lstm = fr.LSTM(I, H, 2, seed=0, device=device)
    x, y = filled(T, B, I), filled(T, B, H)
    h, c = filled(2, B, H), filled(2, B, H)
    w = SimpleNamespace(
        ih=filled(4 * H, I),
        hh=filled(4 * H, H),
        b=filled(4 * H),
        g_ih=filled(3 * H, I),
        g_hh=filled(3 * H, H),
    )
    *_, tape = lstm.forward(x, (h, c))
    *_, function_tape = fr.lstm_forward(x, w.ih, w.hh)
    frozen = lstm.freeze()
    gru = fr.GRU(I, H, 2, seed=0, device=device)

    def gru_grads_into_lstm():
        *_, gru_tape = gru.forward(x)
        return lstm.backward(tape, y, accumulate_into=gru.backward(gru_tape, y))

    *_, short_tape = lstm.forward(x[1:])
    return SimpleNamespace(
        device=device, lstm=lstm, gru=gru, frozen=frozen, stream=frozen.stream(B),
        both=fr.LSTM(I, H, bidirectional=True, seed=0, device=device),
        first=fr.LSTM(I, H, batch_first=True, seed=0, device=device),
        x=x, y=y, h=h, c=c, w=w, tape=tape,
        function_tape=function_tape, grads=lstm.backward(tape, y, retain=True), lengths=np.array([T, 0, 2]),
        gru_grads_into_lstm=gru_grads_into_lstm, short_grads=lstm.backward(short_tape, y[1:]),
        square=filled(T, B, H), long=filled(T + 1, B, H), eye=filled(H, H), wide=filled(T, B, 2 * H),
        one=fr.RNN(1, 1, seed=0, device=device), wider=fr.RNN(1, 256, seed=0, device=device),
        same=fr.RNN(H, H, seed=0, device=device).freeze().stream(B),
    )  # fmt: skip


def arrays_of(e):
    held = [
        e.x,
        e.y,
        e.h,
        e.c,
        e.square,
        e.long,
        e.eye,
        e.wide,
        *vars(e.w).values(),
        e.lengths,
        e.grads.x,
        *e.grads.state,
        e.grads.flat,
    ]
    held += [layer.flat_params for layer in (e.lstm, e.gru, e.both, e.first)]
    return [*held, *e.frozen.params.values()]


def named(argument):
    return re.escape(argument.partition(" ")[0])


def check(e, call, kind, text, unchanged):
    before = e.stream.state
    with unchanged(*arrays_of(e)), pytest.raises(kind, match=text):
        call(e)
    np.testing.assert_array_equal(list(map(host, before)), list(map(host, e.stream.state)))
    e.lstm.backward(e.tape, e.y, retain=True)  # the tape is as good as it was


# --- dtypes: every argument that is an array, given every wrong one -------------------------------------

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
    text = rf"{named(argument)} must have dtype float32, got {np.dtype(dtype)}.*\.astype"
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
        (np.ndarray.tolist, "must be a numpy.ndarray(| or an array on cuda:0), got list"),
        (lambda a: 1.0, "must be a numpy.ndarray(| or an array on cuda:0), got float"),
        (np.ma.masked_array, "must be a plain numpy.ndarray, got its subclass MaskedArray"),
    ],
    ids=["list", "float", "masked array"],
)
def test_what_is_no_plain_array(argument, bad, came, e, unchanged):
    check(e, lambda e: TAKES_ARRAYS[argument](e, bad), TypeError, came, unchanged)


# --- shapes: every argument, with the wrong size, rank and batch ----------------------------------------


MISSHAPEN = {
    "last axis": lambda a: a[..., :-1].copy(),
    "rank up": lambda a: a[None, None],
    "rank down": lambda a: a[..., 0],
    "first axis": lambda a: np.concatenate([a, a]),
}
MORE_STEPS = {(name, "first axis") for name in ("x", "x of forward", "x of frozen")}  # are no mistake


@pytest.mark.parametrize(
    ("argument", "wrong"), [(a, w) for a in TAKES_ARRAYS for w in MISSHAPEN if (a, w) not in MORE_STEPS]
)
def test_shapes(argument, wrong, e, unchanged):
    blamed = "x" if (argument, wrong) == ("w_ih", "last axis") else named(argument)  # I is as w_ih says
    text = rf"{blamed} must have shape .*, got \("
    check(e, lambda e: TAKES_ARRAYS[argument](e, MISSHAPEN[wrong]), ValueError, text, unchanged)


def test_the_text_says_who_what_and_which(e):
    with pytest.raises(ValueError, match=r"^lstm: h0 must have shape \(2, 3, 6\), got \(3, 6\)$"):
        e.lstm(e.x, (e.h[0], e.c))
    with pytest.raises(
        TypeError, match=r"^gru: x must have dtype float32, got float64; convert it with \.astype"
    ):
        e.gru(e.x.astype(np.float64))
    with pytest.raises(
        ValueError, match=r"^lstm: x must have shape \(B, T, 4\) or \(T, 4\), got \(5, 3, 9\)$"
    ):
        e.first(filled(T, B, 9))


# --- everything else ------------------------------------------------------------------------------------

NOT_WRITEABLE = filled(T, B, H)
NOT_WRITEABLE.flags.writeable = False
LONGEST = np.broadcast_to(np.float32(0), (2**30, 2**14, 1))  # 2**46 bytes that take 4


def own_state_dict(e, **changes):
    return {k: v for k, v in {**e.lstm.state_dict(), **changes}.items() if v is not None}


def beside(e, a):
    """Where the layers' parameters are."""
    return a if e.device == "cpu" else fr.device_array(a)


def overlapping_rows(a):
    return np.lib.stride_tricks.as_strided(a, a.shape, (a.strides[1], a.strides[1], a.strides[2]))


CASES = [
    # states
    (TypeError, r"state must be a tuple \(h, c\) or None, got ndarray", lambda e: e.lstm(e.x, e.h)),
    (
        TypeError,
        r"state must be a tuple \(h, c\) or None, got 3 values",
        lambda e: e.lstm(e.x, (e.h, e.c, e.c)),
    ),
    (
        TypeError,
        "h0 must be a numpy.ndarray(| or an array on cuda:0), got tuple",
        lambda e: e.gru(e.x, (e.h, e.h)),
    ),
    (TypeError, r"state must be a tuple \(h, c\) or None", lambda e: setattr(e.stream, "state", e.h)),
    (TypeError, r"dstate must be a tuple \(h, c\) or None", lambda e: e.lstm.backward(e.tape, e.y, e.h)),
    (
        ValueError,
        r"h0 must have shape \(2, 2, 6\), got \(2, 3, 6\)",
        lambda e: e.lstm(e.x[:, :2], (e.h, e.c)),
    ),
    (ValueError, r"h0 must have shape \(2, 6\)", lambda e: e.lstm(e.x[:, 0], (e.h, e.c))),
    # lengths
    (
        ValueError,
        "lengths must be between 0 and 5 .*got -1 at index 1",
        lambda e: e.lstm(e.x, lengths=[5, -1, 2]),
    ),
    (
        ValueError,
        "lengths must be between 0 and 5 .*got 6 at index 2",
        lambda e: e.lstm(e.x, lengths=np.array([0, 5, 6])),
    ),
    (
        ValueError,
        f"got {2**64 - 1} at index 1",
        lambda e: e.lstm(e.x, lengths=np.array([0, 2**64 - 1, 1], np.uint64)),
    ),
    (ValueError, "got -128 at index 2", lambda e: e.gru(e.x, None, np.array([1, 2, -128], np.int8))),
    (
        TypeError,
        r"lengths must have an integer dtype, got float64.*\.astype",
        lambda e: e.lstm(e.x, lengths=np.ones(B)),
    ),
    (
        TypeError,
        r"lengths must have an integer dtype, got bool",
        lambda e: e.lstm(e.x, lengths=[True, False, True]),
    ),
    (
        TypeError,
        r"lengths must have an integer dtype, got float64",
        lambda e: e.lstm(e.x, lengths=[2.0, 1, 1]),
    ),
    (
        ValueError,
        f"lengths must be between 0 and 5 .*, got {2**70} at index 1",
        lambda e: e.lstm(e.x, lengths=[5, 2**70, 1]),
    ),
    (ValueError, f"got {2**63} at index 0", lambda e: e.lstm(e.x, lengths=[2**63, 0, -1])),
    (ValueError, f"got {-(2**70)} at index 0", lambda e: e.lstm(e.x[:, 0], lengths=-(2**70))),
    (
        TypeError,
        "lengths must be a plain numpy.ndarray",
        lambda e: e.lstm(e.x, lengths=np.ma.masked_array([1, 2, 3])),
    ),
    (TypeError, "lengths must be an integer array or a list, got str", lambda e: e.lstm(e.x, lengths="321")),
    (ValueError, r"lengths must have shape \(3,\), got \(2,\)", lambda e: e.lstm(e.x, lengths=[5, 5])),
    (ValueError, r"lengths must have shape \(3,\), got \(\)", lambda e: e.lstm(e.x, lengths=5)),
    (ValueError, r"lengths must have shape \(\), got \(1,\)", lambda e: e.lstm(e.x[:, 0], lengths=[5])),
    (
        ValueError,
        "lengths must be between 0 and 5",
        lambda e: fr.lstm(e.x, e.w.ih, e.w.hh, lengths=[6, 0, 0]),
    ),
    (ValueError, "lengths must be between 0 and 5", lambda e: e.frozen(e.x, lengths=[6, 0, 0])),
    # out
    (ValueError, "out must be writeable, got a read-only array", lambda e: e.lstm(e.x, out=NOT_WRITEABLE)),
    (ValueError, "out must be writeable", lambda e: e.frozen(e.x, out=NOT_WRITEABLE)),
    (ValueError, "out must be writeable", lambda e: e.lstm.forward(e.x, out=NOT_WRITEABLE)),
    (ValueError, "out must be writeable", lambda e: e.stream.step(e.x[0], NOT_WRITEABLE[0])),
    (TypeError, r"^stream\.step: x is missing$|missing 1 required", lambda e: e.stream.step()),
    (TypeError, r"^stream\.step: got 'x' twice$|multiple values", lambda e: e.stream.step(e.x[0], x=e.x[0])),
    (TypeError, r"unexpected (keyword )?argument 'y'$", lambda e: e.stream.step(e.x[0], y=e.x[0])),
    (
        TypeError,
        r"^stream\.step: takes x and out, got 3 arg|takes from",
        lambda e: e.stream.step(e.x[0], None, 1),
    ),
    (
        ValueError,
        r"out must have shape \(3, 6\), got \(2, 6\)",
        lambda e: e.stream.step(e.x[0], filled(2, H)),
    ),
    (ValueError, r"out must have shape \(5, 3, 6\), got \(4, 3, 6\)", lambda e: e.lstm(e.x, out=e.y[1:])),
    (
        ValueError,
        "out must be .*contiguous along its last axis",
        lambda e: e.lstm(e.x, out=filled(T, B, 2 * H)[..., ::2]),
    ),
    (ValueError, "out must be .*without overlapping rows", lambda e: e.lstm(e.x, out=overlapping_rows(e.y))),
    (ValueError, "out must not overlap h0", lambda e: e.both(e.x, (e.wide[:2, :, :H], e.c), out=e.wide)),
    (ValueError, "out must not overlap x", lambda e: fr.rnn(e.square, e.eye, e.eye, out=e.square)),
    (ValueError, "out must not overlap x", lambda e: fr.rnn(e.long[:T], e.eye, e.eye, out=e.long[1:])),
    (
        ValueError,
        "out must not overlap the parameters",
        lambda e: fr.rnn(e.long[:1, 0], e.eye, e.eye, out=e.eye[:1]),
    ),
    (
        ValueError,
        "out must not overlap the parameters",
        lambda e: e.lstm(beside(e, e.x), out=e.lstm.flat_params[: T * B * H].reshape(T, B, H)),
    ),
    (
        ValueError,
        "out must not overlap lengths",
        lambda e: e.one(
            e.x[:1, :1, :1], lengths=e.lengths[1:2], out=e.lengths.view(np.float32)[2:3].reshape(1, 1, 1)
        ),
    ),
    (ValueError, "out must not overlap x", lambda e: e.same.step(e.long[0], e.long[0])),
    # sizes
    (
        ValueError,
        "rnn: x must be small enough",
        lambda e: fr.rnn(np.broadcast_to(e.y[0, 0, :1], (2**40, 2**16, 1)), filled(512, 1), filled(512, 512)),
    ),
    (MemoryError, None, lambda e: e.wider(LONGEST)),
    (MemoryError, None, lambda e: e.wider.forward(LONGEST)),
    (ValueError, "the state at batch_size .*more than can be addressed", lambda e: e.frozen.stream(2**60)),
    (ValueError, "batch_size must be at least 1, got 0", lambda e: e.frozen.stream(0)),
    (TypeError, "batch_size must be an integer, got 1.0", lambda e: e.frozen.stream(1.0)),
    (ValueError, "a bidirectional layer cannot stream", lambda e: e.both.freeze().stream()),
    # weights of the functional forms
    (ValueError, "b_ih and b_hh must be given together", lambda e: fr.lstm(e.x, e.w.ih, e.w.hh, e.w.b)),
    (
        ValueError,
        r"w_hh must have shape \(3\*H, H\) with H > 0, got \(24, 6\)",
        lambda e: fr.gru(e.x, e.w.ih, e.w.hh),
    ),
    (
        ValueError,
        r"w_ih must have shape \(24, I\) with I > 0, got \(18, 4\)",
        lambda e: fr.lstm(e.x, e.w.g_ih, e.w.hh),
    ),
    (
        ValueError,
        r"x must have shape \(T, B, 4\) or \(T, 4\), got \(5, 3, 6\)",
        lambda e: fr.lstm(e.y, e.w.ih, e.w.hh),
    ),
    (
        ValueError,
        r"x_t must have shape \(B, 4\) or \(4,\), got \(3, 6\)",
        lambda e: fr.lstm_cell(e.y[0], None, None, e.w.ih, e.w.hh),
    ),
    (
        ValueError,
        r"w_hh must have shape \(4\*H, H\) with H > 0, got \(0, 0\)",
        lambda e: fr.lstm(e.x, filled(0, I), filled(0, 0)),
    ),
    (
        ValueError,
        r"w_ih must have shape \(24, I\) with I > 0",
        lambda e: fr.lstm(e.x[..., :0], filled(4 * H, 0), e.w.hh),
    ),
    (TypeError, "reverse must be True or False, got 1", lambda e: fr.lstm(e.x, e.w.ih, e.w.hh, reverse=1)),
    (
        ValueError,
        "nonlinearity must be one of 'tanh', 'relu', got 'gelu'",
        lambda e: fr.rnn(e.x, e.w.ih, e.w.hh, nonlinearity="gelu"),
    ),
    # state dicts
    (
        ValueError,
        r"missing \['bias_ih_l1'\], unexpected \[\]",
        lambda e: e.lstm.load_state_dict(own_state_dict(e, bias_ih_l1=None)),
    ),
    (
        ValueError,
        r"missing \[\], unexpected \['weight_hr_l0'\]",
        lambda e: e.lstm.load_state_dict(own_state_dict(e, weight_hr_l0=e.h)),
    ),
    (
        ValueError,
        r"state_dict\['weight_ih_l0'\] must have shape \(18, 4\), got \(24, 4\)",
        lambda e: e.gru.load_state_dict(e.lstm.state_dict()),
    ),
    (TypeError, "state_dict must be a mapping", lambda e: e.lstm.load_state_dict(list(e.lstm.params))),
    (KeyError, "weight_hh_l2", lambda e: e.lstm.params.__setitem__("weight_hh_l2", e.w.hh)),
    (ValueError, "read-only", lambda e: e.frozen.params.__setitem__("bias_hh_l0", e.w.b)),
    (AttributeError, "a frozen layer cannot be changed", lambda e: setattr(e.frozen, "batch_first", True)),
    (AttributeError, "a frozen layer cannot be changed", lambda e: setattr(e.frozen, "nothing", 1)),
    # backward
    (ValueError, "dy or a gradient of the final state must be given", lambda e: e.lstm.backward(e.tape)),
    (
        ValueError,
        "dy or a gradient of the final state must be given",
        lambda e: e.lstm.backward(e.tape, None, (None, None)),
    ),
    (TypeError, "tape must be a Tape, got ndarray", lambda e: e.lstm.backward(e.y, e.y)),
    (TypeError, "tape must be a Tape, got NoneType", lambda e: fr.lstm_backward(None, e.y)),
    (
        ValueError,
        r"wrt must name some of .*got \('x', 'y'\)",
        lambda e: e.lstm.backward(e.tape, e.y, wrt=("x", "y")),
    ),
    (ValueError, "wrt must name some of", lambda e: e.lstm.backward(e.tape, e.y, wrt=())),
    (ValueError, "seed must be at least 0, got -1", lambda e: e.lstm.forward(e.x, seed=-1)),
    (ValueError, "seed must be at most", lambda e: e.lstm.forward(e.x, seed=2**64)),
    (TypeError, "seed must be an integer, got 0.5", lambda e: e.lstm.forward(e.x, seed=0.5)),
    # accumulate_into
    (
        TypeError,
        "accumulate_into must be a Grads, got ndarray",
        lambda e: e.lstm.backward(e.tape, e.y, accumulate_into=e.grads.flat),
    ),
    (
        ValueError,
        "accumulate_into must hold gradients of the same parameters",
        lambda e: e.gru_grads_into_lstm(),
    ),
    (
        TypeError,
        "accumulate_into must be a FunctionalGrads, got Grads",
        lambda e: fr.lstm_backward(e.function_tape, e.y, accumulate_into=e.grads),
    ),
    (
        ValueError,
        "accumulate_into has no gradient of state; leave 'state' out of wrt",
        lambda e: e.lstm.backward(
            e.tape, e.y, accumulate_into=e.lstm.backward(e.tape, e.y, wrt="x", retain=True)
        ),
    ),
    (
        ValueError,
        r"accumulate_into's gradient of x must have shape \(5, 3, 4\), got \(4, 3, 4\)",
        lambda e: e.lstm.backward(e.tape, e.y, accumulate_into=e.short_grads),
    ),
    (
        ValueError,
        "accumulate_into must not share memory with dy",
        lambda e: e.lstm.backward(
            e.tape, e.grads.flat[: T * B * H].reshape(T, B, H), accumulate_into=e.grads
        ),
    ),
    # the rest
    (ValueError, "max_norm must be 0 or more, got -1.0", lambda e: fr.clip_grad_norm(e.grads, -1.0)),
    (
        ValueError,
        "max_norm must be 0 or more, got nan",
        lambda e: fr.clip_grad_norm(e.grads, float("nan")),
    ),
    (ValueError, "grads must be writeable", lambda e: fr.clip_grad_norm([e.grads, NOT_WRITEABLE], 1e-3)),
    (
        ValueError,
        "grads must hold gradients of parameters",
        lambda e: fr.clip_grad_norm(e.lstm.backward(e.tape, e.y, wrt=["x"], retain=True), 1.0),
    ),
    (TypeError, "grads must be Grads or arrays, got str", lambda e: fr.clip_grad_norm("ab", 1.0)),
    (TypeError, "grads must be Grads or arrays, got int", lambda e: fr.clip_grad_norm(3, 1.0)),
    (TypeError, "max_norm must be a number, got '1'", lambda e: fr.clip_grad_norm(e.grads, "1")),
    (TypeError, "cannot be copied or pickled apart", lambda e: copy.deepcopy(e.lstm.params)),
    (TypeError, "cannot be copied or pickled apart", lambda e: pickle.dumps(e.grads.params)),
    (ValueError, "n must be at least 1, got 0", lambda e: fr.set_num_threads(0)),
    (TypeError, "n must be an integer, got '2'", lambda e: fr.set_num_threads("2")),
    (ValueError, "n must be at most", lambda e: fr.num_threads(10**9).__enter__()),
    (ValueError, "mode must be 'stdout' or 'dict', got 'json'", lambda e: fr.show_config("json")),
    (AttributeError, "no attribute 'Transformer'", lambda e: fr.Transformer),
]


@pytest.mark.parametrize(("kind", "text", "call"), CASES)
def test_bad_input(kind, text, call, e, unchanged):
    check(e, call, kind, text, unchanged)
