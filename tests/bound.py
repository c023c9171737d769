"""What the kernel tests share: drawn calls, run by kernels and reference, and the bound on the difference:

||got - want|| <= c * max(4, ceil(log2(K T))) * eps * max(||want||, s sqrt(n))

for n elements, where K is the longest sum behind one and s its natural size; c is 4, backward 8. Inputs are
N(0, 1), weights as layers start with.

In 16 bits such a bound would be as large as what it bounds. Sums are of float32 there, and the roundings of
what is stored add up like a random walk: c is 1/8, backward 1/2. Only relu's gradients are further off: some
eps of the values are rounded to the other side of 0, where the gradient is all wrong, and the norm of such
errors goes by sqrt(eps).
"""

from math import ceil, log2, sqrt
from typing import Any, NamedTuple

import numpy as np
from devices import eps, exact, host, numpy_dtype, on_device

import fusedrnn as fr
from fusedrnn import reference

Array = np.ndarray
Named = dict[str, Array]

# cell: the class that offers it, the options that choose it, the name of its functional forms
OFFERED = {
    "lstm": (fr.LSTM, {}, "lstm"),
    "gru": (fr.GRU, {"reset_after": True}, "gru"),
    "gru_reset_before": (fr.GRU, {"reset_after": False}, "gru"),
    "rnn_tanh": (fr.RNN, {"nonlinearity": "tanh"}, "rnn"),
    "rnn_relu": (fr.RNN, {"nonlinearity": "relu"}, "rnn"),
}


class Case(NamedTuple):
    """A call of a layer: its sizes and options. Everything else is drawn from the seed."""

    cell: str
    dtype: str = "float64"
    T: int = 5
    B: int = 4
    I: int = 6
    H: int = 11
    L: int = 1
    D: int = 1
    bias: bool = True
    ragged: bool = False  # lengths from 0 to T, one of them T
    state: str = "given"  # or "zeros" or, of an LSTM's, "h" or "c" alone
    given: str = "both"  # gradients: of "y", of the final "state", or both
    dropout: float = 0.0
    batch_first: bool = False
    seed: int = 0
    device: str = "cpu"


class Call(NamedTuple):
    """A layer and the arguments of its forward and backward."""

    layer: fr.Layer
    x: Array
    state: Any
    lengths: list[int] | None
    dy: Array | None
    dstate: Any


def make_layer(case: Case) -> fr.Layer:
    kind, options, _ = OFFERED[case.cell]
    return kind(
        case.I, case.H, case.L, case.bias, case.batch_first, case.dropout, case.D == 2,
        dtype=case.dtype, seed=case.seed, device=case.device, **options,
    )  # fmt: skip


def draw(case: Case) -> Call:
    rng, dtype = np.random.default_rng(case.seed), numpy_dtype(case.dtype)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(dtype)

    def states() -> Any:
        h, *c = (normal(case.L * case.D, case.B, case.H) for _ in range(reference.CELLS[case.cell].states))
        return (h, *c) if c else h

    lengths = None
    if case.ragged:
        lengths = rng.integers(0, case.T + 1, case.B).tolist()
        if case.B:
            lengths[rng.integers(case.B)] = case.T
    x, dy = normal(case.T, case.B, case.I), normal(case.T, case.B, case.D * case.H)
    if case.batch_first:
        x, dy = x.swapaxes(0, 1), dy.swapaxes(0, 1)
    state: Any = states() if case.state != "zeros" else None
    if case.state in ("h", "c") and isinstance(state, tuple):
        state = (state[0], None) if case.state == "h" else (None, state[1])
    return Call(
        make_layer(case), x, state, lengths,
        dy if case.given != "state" else None, states() if case.given != "y" else None,
    )  # fmt: skip


def as_tuple(state: Any) -> tuple:
    return state if isinstance(state, tuple) else (state,)


def named(y: Array, final: Any, dx: Array, dstate: Any, dparams: dict[str, Array]) -> Named:
    """All results of a forward and its backward by name."""
    forward = {"y": y, **dict(zip(("h_n", "c_n"), as_tuple(final), strict=False))}
    return {**forward, "dx": dx, **dict(zip(("dh0", "dc0"), as_tuple(dstate), strict=False)), **dparams}


def run(call: Call, **options: Any) -> Named:
    """Through the kernels; `options` are forward's. On a GPU with arrays that are there already."""
    given = there(call)
    y, final, tape = call.layer.forward(given.x, given.state, call.lengths, **options)
    grads = call.layer.backward(tape, given.dy, given.dstate)
    return at_host(named(y, final, grads.x, grads.state, dict(grads.params)))


def there(call: Call) -> Call:
    """The call with its arrays on the layer's device, in the same layout."""
    if call.layer.device == "cpu":
        return call

    def moved(state: Any) -> Any:
        return tuple(map(on_device, state)) if isinstance(state, tuple) else on_device(state)

    return call._replace(
        x=on_device(call.x), state=moved(call.state), dy=on_device(call.dy), dstate=moved(call.dstate)
    )


def at_host(results: dict[str, Any]) -> Named:
    return {name: host(a) for name, a in results.items()}


def run_reference(call: Call, masks: list[Array] | None = None) -> Named:
    """Through the reference, in time-major order."""
    layer = call.layer

    def swap(a: Array) -> Array:
        return a.swapaxes(0, 1) if layer.batch_first else a

    def exactly(state: Any) -> Any:
        return None if state is None else tuple(map(exact, as_tuple(state)))

    y, final, tape = reference.stack_forward(
        layer.cell, exact(swap(call.x)), tuple(map(exact, layer.params.values())),
        exactly(call.state), call.lengths,
        layer.num_layers, 2 if layer.bidirectional else 1, layer.bias, masks,
    )  # fmt: skip
    grads = reference.stack_backward(
        tape,
        None if call.dy is None else exact(swap(call.dy)),
        exactly(call.dstate),
    )
    params = dict(zip(layer.params, grads.params, strict=True))
    return named(swap(y), final, swap(grads.x), grads.state, params)


def run_function(module: Any, case: Case, call: Call, reverse: bool) -> Named:
    """The functional forms of fusedrnn or its reference on the call's arrays: one layer, one direction."""
    _, options, name = OFFERED[case.cell]
    weights = (*call.layer.params.values(), None, None)[:4]
    if module is reference:
        weights = tuple(map(exact, weights))
        call = call._replace(
            x=exact(call.x), dy=exact(call.dy),
            state=None if call.state is None else tuple(map(exact, as_tuple(call.state))),
            dstate=None if call.dstate is None else tuple(map(exact, as_tuple(call.dstate))),
        )  # fmt: skip
    else:
        call = there(call)
    state = () if call.state is None else (None if s is None else s[0] for s in as_tuple(call.state))
    state = dict(zip(("h0", "c0"), state, strict=False))
    *out, tape = getattr(module, f"{name}_forward")(
        call.x, *weights, **state, lengths=call.lengths, reverse=reverse, **options
    )
    dstate = () if call.dstate is None else (s[0] for s in as_tuple(call.dstate))
    grads = getattr(module, f"{name}_backward")(tape, call.dy, *dstate)
    states = tuple(s for s in (grads.h0, grads.c0) if s is not None)
    params = {k: getattr(grads, k) for k in ("w_ih", "w_hh", "b_ih", "b_hh") if getattr(grads, k) is not None}
    return at_host(named(out[0], tuple(out[1:]), grads.x, states, params))


def rounding(dtype: np.dtype, backward: bool, relu: bool) -> float:
    """c * eps of the bound."""
    if dtype.itemsize > 2:
        return (8 if backward else 4) * eps(dtype)
    if relu and backward:
        return 1 / 4 * sqrt(eps(dtype))
    return (1 / 2 if backward else 1 / 8) * eps(dtype)


def assert_close(
    name: str, got: Array, want: Array, terms: int, scale: float, backward: bool, relu: bool = False
) -> None:
    """The bound, for K T = `terms` and s = `scale`."""
    assert got.shape == want.shape, name
    error = np.abs(got.astype(np.float64) - want)
    factor = max(4, ceil(log2(max(terms, 1)))) * rounding(got.dtype, backward, relu)
    bound = factor * max(np.linalg.norm(want), scale * sqrt(want.size))
    if not np.linalg.norm(error) <= bound:
        worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
        raise AssertionError(
            f"{name}: off by {np.linalg.norm(error):.3g}, bound {bound:.3g}; "
            f"worst at {tuple(map(int, worst))}: got {got[worst]!r}, want {want[worst]!r}"
        )


def assert_within_bound(got: Named, want: Named, case: Case, backwards: int = 1) -> None:
    """Every result under the bound; `backwards` counts the backward passes whose gradients were added up."""
    T, B, I, H, D = case.T, case.B, case.I, case.H, case.D
    inputs = max(I, D * H) if case.L > 1 else I
    K = inputs + H  # a pre-activation is so many products
    K_grad = max(K, reference.CELLS[case.cell].gates * H)  # dx and dh sum over the gates' rows
    K_params = max(K_grad, backwards * T * B)  # dW and db sum over the batch and time
    # y, h and c: inputs near 1 make states near 1, as weights of variance 1/3H average over H.
    # dx, dh0, dc0: dy is near 1, no gate's derivative is above 1, and W averages over its rows likewise.
    # dW, db: sums of T*B such gradients times values near 1, of either sign.
    relu = case.cell == "rnn_relu"
    assert got.keys() == want.keys()
    for name, array in got.items():
        if name in ("y", "h_n", "c_n"):
            assert_close(name, array, want[name], K * T, 1.0, False)
        elif name in ("dx", "dh0", "dc0"):
            assert_close(name, array, want[name], K_grad * T, sqrt(backwards), True, relu)
        else:
            assert_close(name, array, want[name], K_params * T, sqrt(backwards * T * B), True, relu)


def assert_same_bits(got: Named, want: Named) -> None:
    """Every array has the very bits of the other: signs of zeros and payloads of NaNs too."""
    assert got.keys() == want.keys()
    for name, a in got.items():
        b = want[name]
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        bits = f"u{a.dtype.itemsize}"
        differ = np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)
        if differ.any():
            first = tuple(map(int, np.argwhere(differ)[0]))
            raise AssertionError(
                f"{name}: {np.count_nonzero(differ)} of {differ.size} elements differ, "
                f"first at {first}: {a[first]!r} and {b[first]!r}"
            )
