"""Recurrent cells, layers and stacks in plain NumPy, forward and backward: the maths, spelt out.

The kernels are tested against this file. It computes in float64 whatever float dtype comes in, loops over
time and nothing else, saves no gates (backward computes them again) and does not try to be fast.

Shapes     T time steps, B sequences, I inputs, H hidden units, L layers, D directions,
           G gates: RNN 1; LSTM 4, in the order i, f, g, o; GRU 3, in the order r, z, n
           x (T, B, I), y (T, B, H), h and c (B, H), w_ih (G*H, I), w_hh (G*H, H), b_ih and b_hh (G*H,)
Lengths    Sequence b has the steps 0 to lengths[b]-1. Beyond them x and dy are never read, y and dx are zero.
           Reverse starts at each sequence's own last step. A sequence without steps keeps its initial state.
Arguments  None for a state, bias or gradient means zeros, for lengths T. A dtype that is not floating is a
           TypeError, anything else that does not fit a ValueError; both name the argument.
Notation   σ sigmoid, ∘ elementwise product, a' the value of a after the step, dv = ∂loss/∂v. A batch is held
           as rows, so `W u + b` of the equations is `u @ W.T + b` in the code.

Backward uses these rules; a value used in several places sums the gradients that come from each.

    a = W u + b    du = Wᵀ da          dW = Σ_batch da uᵀ    db = Σ_batch da
    p = u∘v        du = dp∘v           dv = dp∘u
    s = σ(a)       da = ds∘s∘(1-s)
    s = tanh(a)    da = ds∘(1-s²)
    s = relu(a)    da = 0 where a <= 0, otherwise ds

Through time (Werbos 1990): h_t reaches the loss as the output y_t and as an input of step t+1. So the steps
are walked backwards: each receives  dh' = dy_t + (dh of step t+1)  and hands on its dh; dW and db sum up.

Sources: RNN, Elman 1990. LSTM, Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000. GRU,
Cho et al. 2014 (arXiv:1406.1078), section 2.3; its reset-after variant as in cuDNN. Layouts are PyTorch's.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Arrays = tuple[Array, ...]
Opt = ArrayLike | None  # what goes in where None has a meaning
Choice = TypeVar("Choice")


class Params(NamedTuple):
    """One layer's parameters in one direction, or their gradients."""

    w_ih: Array
    w_hh: Array
    b_ih: Array
    b_hh: Array


StepGrads = tuple[Array, Arrays, Params]  # dx, dstate, dp

# --- Cells: step(p, x, *state) -> state';  step_backward(p, x, state, dstate') -> (dx, dstate, dp) ----------


def _affine(u: Array, w: Array, b: Array) -> Array:
    return u @ w.T + b


def _affine_backward(da: Array, u: Array, w: Array) -> Arrays:
    return da @ w, da.T @ u, da.sum(axis=0)  # du, dW, db


def _sigmoid(a: Array) -> Array:
    e = np.exp(-np.abs(a))  # never overflows, and keeps full relative accuracy on both sides
    return np.where(a < 0, e, 1.0) / (1.0 + e)


def _rnn_step(nonlinearity: str, p: Params, x: Array, h: Array) -> Arrays:
    """h' = tanh or relu (W_ih x + b_ih + W_hh h + b_hh)"""
    a = _affine(x, p.w_ih, p.b_ih) + _affine(h, p.w_hh, p.b_hh)
    return (np.tanh(a) if nonlinearity == "tanh" else np.maximum(a, 0.0),)


def _rnn_step_backward(nonlinearity: str, p: Params, x: Array, state: Arrays, dstate: Arrays) -> StepGrads:
    """With a the argument of tanh or relu:

    tanh    da = dh'∘(1-h'²)
    relu    da = 0 where h' = 0, otherwise dh' (there h' = a)
            dx = W_ihᵀ da    dW_ih = Σ da xᵀ    db_ih = Σ da
            dh = W_hhᵀ da    dW_hh = Σ da hᵀ    db_hh = Σ da
    """
    (h,), (dh_new,) = state, dstate
    (h_new,) = _rnn_step(nonlinearity, p, x, h)
    da = dh_new * (1 - h_new**2) if nonlinearity == "tanh" else np.where(h_new <= 0, 0.0, dh_new)
    dx, dw_ih, db_ih = _affine_backward(da, x, p.w_ih)
    dh, dw_hh, db_hh = _affine_backward(da, h, p.w_hh)
    return dx, (dh,), Params(dw_ih, dw_hh, db_ih, db_hh)


def _lstm_gates(p: Params, x: Array, h: Array) -> Arrays:
    a = _affine(x, p.w_ih, p.b_ih) + _affine(h, p.w_hh, p.b_hh)
    a_i, a_f, a_g, a_o = np.split(a, 4, axis=1)
    return _sigmoid(a_i), _sigmoid(a_f), np.tanh(a_g), _sigmoid(a_o)


def _lstm_step(p: Params, x: Array, h: Array, c: Array) -> Arrays:
    """(a_i, a_f, a_g, a_o) = a = W_ih x + b_ih + W_hh h + b_hh

    i  = σ(a_i)    f = σ(a_f)    g = tanh(a_g)    o = σ(a_o)
    c' = f∘c + i∘g
    h' = o∘tanh(c')
    """
    i, f, g, o = _lstm_gates(p, x, h)
    c_new = f * c + i * g
    return o * np.tanh(c_new), c_new


def _lstm_step_backward(p: Params, x: Array, state: Arrays, dstate: Arrays) -> StepGrads:
    """dc' arrives from the next step, and c' reaches the loss through h' as well:

    dc'  ←  dc' + dh'∘o∘(1-tanh²(c'))
    da_i =  dc'∘g∘i∘(1-i)               from  i∘g  in c'
    da_f =  dc'∘c∘f∘(1-f)               from  f∘c  in c'
    da_g =  dc'∘i∘(1-g²)                from  i∘g  in c'
    da_o =  dh'∘tanh(c')∘o∘(1-o)        from  o∘tanh(c') = h'
    dc   =  dc'∘f                       from  f∘c  in c'
    dx   =  W_ihᵀ da    dW_ih = Σ da xᵀ    db_ih = Σ da
    dh   =  W_hhᵀ da    dW_hh = Σ da hᵀ    db_hh = Σ da
    """
    (h, c), (dh_new, dc_new) = state, dstate
    i, f, g, o = _lstm_gates(p, x, h)
    tanh_c = np.tanh(f * c + i * g)
    dc_new = dc_new + dh_new * o * (1 - tanh_c**2)
    da_i = dc_new * g * i * (1 - i)
    da_f = dc_new * c * f * (1 - f)
    da_g = dc_new * i * (1 - g**2)
    da_o = dh_new * tanh_c * o * (1 - o)
    dc = dc_new * f

    da = np.concatenate((da_i, da_f, da_g, da_o), axis=1)
    dx, dw_ih, db_ih = _affine_backward(da, x, p.w_ih)
    dh, dw_hh, db_hh = _affine_backward(da, h, p.w_hh)
    return dx, (dh, dc), Params(dw_ih, dw_hh, db_ih, db_hh)


def _gru_gates(p: Params, x: Array, h: Array) -> Arrays:
    u_r, u_z, u_n = np.split(_affine(x, p.w_ih, p.b_ih), 3, axis=1)
    v_r, v_z, v_n = np.split(_affine(h, p.w_hh, p.b_hh), 3, axis=1)
    r = _sigmoid(u_r + v_r)
    return r, _sigmoid(u_z + v_z), np.tanh(u_n + r * v_n), v_n


def _gru_step(p: Params, x: Array, h: Array) -> Arrays:
    """(u_r, u_z, u_n) = u = W_ih x + b_ih,  (v_r, v_z, v_n) = v = W_hh h + b_hh

    r  = σ(u_r + v_r)    z = σ(u_z + v_z)    n = tanh(u_n + r∘v_n)
    h' = z∘h + (1-z)∘n
    """
    _, z, n, _ = _gru_gates(p, x, h)
    return (z * h + (1 - z) * n,)


def _gru_step_backward(p: Params, x: Array, state: Arrays, dstate: Arrays) -> StepGrads:
    """With a_r, a_z, a_n the arguments of σ, σ and tanh:

    da_n = dh'∘(1-z)∘(1-n²)                      from  (1-z)∘n  in h'
    da_z = dh'∘(h-n)∘z∘(1-z)                     from  z∘h  and  (1-z)∘n  in h'
    da_r = da_n∘v_n∘r∘(1-r)                      from  r∘v_n  in a_n
    du   = (da_r, da_z, da_n)
    dv   = (da_r, da_z, da_n∘r)
    dx   = W_ihᵀ du             dW_ih = Σ du xᵀ    db_ih = Σ du
    dh   = W_hhᵀ dv + dh'∘z     dW_hh = Σ dv hᵀ    db_hh = Σ dv
    """
    (h,), (dh_new,) = state, dstate
    r, z, n, v_n = _gru_gates(p, x, h)
    da_n = dh_new * (1 - z) * (1 - n**2)
    da_z = dh_new * (h - n) * z * (1 - z)
    da_r = da_n * v_n * r * (1 - r)
    du = np.concatenate((da_r, da_z, da_n), axis=1)
    dv = np.concatenate((da_r, da_z, da_n * r), axis=1)

    dx, dw_ih, db_ih = _affine_backward(du, x, p.w_ih)
    dh, dw_hh, db_hh = _affine_backward(dv, h, p.w_hh)
    return dx, (dh + dh_new * z,), Params(dw_ih, dw_hh, db_ih, db_hh)


def _gru_reset_before_gates(p: Params, x: Array, h: Array) -> Arrays:
    k = 2 * h.shape[1]  # rows below k belong to r and z, the others to n
    u_r, u_z, u_n = np.split(_affine(x, p.w_ih, p.b_ih), 3, axis=1)
    v_r, v_z = np.split(_affine(h, p.w_hh[:k], p.b_hh[:k]), 2, axis=1)
    r = _sigmoid(u_r + v_r)
    return r, _sigmoid(u_z + v_z), np.tanh(u_n + _affine(r * h, p.w_hh[k:], p.b_hh[k:]))


def _gru_reset_before_step(p: Params, x: Array, h: Array) -> Arrays:
    """r and z as in the other GRU,

    n  = tanh(W_in x + b_in + W_hn (r∘h) + b_hn)
    h' = z∘h + (1-z)∘n
    """
    _, z, n = _gru_reset_before_gates(p, x, h)
    return (z * h + (1 - z) * n,)


def _gru_reset_before_step_backward(p: Params, x: Array, state: Arrays, dstate: Arrays) -> StepGrads:
    """With a_r, a_z, a_n the arguments of σ, σ and tanh, and q = r∘h:

    da_n  = dh'∘(1-z)∘(1-n²)                     from  (1-z)∘n  in h'
    da_z  = dh'∘(h-n)∘z∘(1-z)                    from  z∘h  and  (1-z)∘n  in h'
    dq    = W_hnᵀ da_n                           dW_hn = Σ da_n qᵀ         db_hn = Σ da_n
    da_r  = dq∘h∘r∘(1-r)                         from  q = r∘h
    da_rz = (da_r, da_z)                         dW_h,rz = Σ da_rz hᵀ      db_h,rz = Σ da_rz
    da    = (da_r, da_z, da_n)
    dx    = W_ihᵀ da                             dW_ih = Σ da xᵀ           db_ih = Σ da
    dh    = W_h,rzᵀ da_rz + dq∘r + dh'∘z         from  a_r, a_z,  q = r∘h  and  z∘h  in h'
    """
    (h,), (dh_new,) = state, dstate
    w_rz, w_n = np.split(p.w_hh, [2 * h.shape[1]])
    r, z, n = _gru_reset_before_gates(p, x, h)
    da_n = dh_new * (1 - z) * (1 - n**2)
    da_z = dh_new * (h - n) * z * (1 - z)
    dq, dw_n, db_n = _affine_backward(da_n, r * h, w_n)
    da_r = dq * h * r * (1 - r)
    dh, dw_rz, db_rz = _affine_backward(np.concatenate((da_r, da_z), axis=1), h, w_rz)
    dh = dh + dq * r + dh_new * z

    dx, dw_ih, db_ih = _affine_backward(np.concatenate((da_r, da_z, da_n), axis=1), x, p.w_ih)
    return dx, (dh,), Params(dw_ih, np.concatenate((dw_rz, dw_n)), db_ih, np.concatenate((db_rz, db_n)))


class Cell(NamedTuple):
    """What this file knows of a cell. The first of its states is its output."""

    gates: int
    states: int
    step: Callable[..., Arrays]
    step_backward: Callable[..., StepGrads]


CELLS = {
    "lstm": Cell(4, 2, _lstm_step, _lstm_step_backward),
    "gru": Cell(3, 1, _gru_step, _gru_step_backward),
    "gru_reset_before": Cell(3, 1, _gru_reset_before_step, _gru_reset_before_step_backward),
    "rnn_tanh": Cell(1, 1, partial(_rnn_step, "tanh"), partial(_rnn_step_backward, "tanh")),
    "rnn_relu": Cell(1, 1, partial(_rnn_step, "relu"), partial(_rnn_step_backward, "relu")),
}

# --- A layer: a cell run over a sequence in one direction ---------------------------------------------------


class Tape(NamedTuple):
    """What a layer's forward keeps for its backward. The arrays are its own."""

    cell: str
    params: Params
    x: Array
    states: Arrays  # (T, B, H) each: the states that went into step t
    lengths: NDArray[np.int64]
    reverse: bool
    biased: tuple[bool, ...]  # whether b_ih and b_hh were given


class Gradients(NamedTuple):
    """Gradients of what a layer took, each shaped like its argument; None where it took none."""

    x: Array
    h0: Array
    c0: Array | None
    w_ih: Array
    w_hh: Array
    b_ih: Array | None
    b_hh: Array | None


def _take(where: str, name: str, value: Opt, shape: Sequence[int | str]) -> Array:
    """A float64 copy of `value`, whose shape must be `shape`; a str in it stands for any extent."""
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"{where}: {name} must have a float dtype, got {array.dtype}; use .astype")
    fits = (isinstance(want, str) or n == want for n, want in zip(array.shape, shape, strict=False))
    if array.ndim != len(shape) or not all(fits):
        expected = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{where}: {name} must have shape ({expected}), got {array.shape}")
    return array.astype(np.float64)


def _take_or_zeros(where: str, arrays: Mapping[str, Opt], shape: Sequence[int]) -> Arrays:
    return tuple(np.zeros(shape) if a is None else _take(where, k, a, shape) for k, a in arrays.items())


def _take_lengths(where: str, lengths: Opt, T: int, B: int) -> NDArray[np.int64]:
    array = np.full(B, T) if lengths is None else np.asarray(lengths)
    if array.shape != (B,):
        raise ValueError(f"{where}: lengths must have shape ({B},), got {array.shape}")
    if B and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{where}: lengths must have integers, got {array.dtype}; use .astype")
    if B and not (array.min() >= 0 and array.max() <= T):
        raise ValueError(f"{where}: lengths must lie in 0..{T}, got {array.min()}..{array.max()}")
    return array.astype(np.int64)


def _choose(where: str, name: str, value: Choice, known: Iterable[Choice]) -> Choice:
    if value not in known:
        raise ValueError(f"{where}: {name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return value


def _forward(where: str, cell: str, x: Opt, params: Sequence[Opt], state: Mapping[str, Opt],
             lengths: Opt = None, reverse: bool = False) -> tuple[Array, Arrays, Tape]:  # fmt: skip
    """(y, final states, tape) of one layer; `state` and all errors name the arrays as the caller does."""
    x = _take(where, "x", x, ("T", "B", "I"))
    T, B, inputs = x.shape
    H = _take(where, "w_hh", params[1], ("G*H", "H")).shape[1]
    GH = CELLS[cell].gates * H
    weights = _take(where, "w_ih", params[0], (GH, inputs)), _take(where, "w_hh", params[1], (GH, H))
    biases = _take_or_zeros(where, {"b_ih": params[2], "b_hh": params[3]}, (GH,))
    p = Params(*weights, *biases)
    states = _take_or_zeros(where, state, (B, H))
    lengths = _take_lengths(where, lengths, T, B)

    y = np.zeros((T, B, H))
    kept = tuple(np.zeros((T, B, H)) for _ in states)
    for t in reversed(range(T)) if reverse else range(T):
        b = lengths > t  # the sequences that have a step t
        new = CELLS[cell].step(p, x[t, b], *(s[b] for s in states))
        for keep, s, s_new in zip(kept, states, new, strict=True):
            keep[t] = s
            s[b] = s_new
        y[t, b] = new[0]
    biased = tuple(bias is not None for bias in params[2:])
    return y, states, Tape(cell, p, x, kept, lengths, reverse, biased)


def _backward(family: str, tape: Tape, dy: Opt, dstate: Mapping[str, Opt]) -> Gradients:
    if not tape.cell.startswith(family):
        raise ValueError(f"{family}_backward: tape must come from {family}_forward, got one of {tape.cell!r}")
    p, (T, B, H) = tape.params, tape.states[0].shape
    (dy,) = _take_or_zeros(f"{family}_backward", {"dy": dy}, (T, B, H))
    dstates = _take_or_zeros(f"{family}_backward", dstate, (B, H))

    dx = np.zeros(tape.x.shape)
    dp = Params(*(np.zeros(a.shape) for a in p))
    for t in range(T) if tape.reverse else reversed(range(T)):
        b = tape.lengths > t
        dstates[0][b] += dy[t, b]
        state, dnew = tuple(s[t, b] for s in tape.states), tuple(ds[b] for ds in dstates)
        dx[t, b], dold, dp_t = CELLS[tape.cell].step_backward(p, tape.x[t, b], state, dnew)
        for ds, old in zip(dstates, dold, strict=True):
            ds[b] = old
        for total, term in zip(dp, dp_t, strict=True):
            total += term
    dc0 = dstates[1] if len(dstates) == 2 else None
    db_ih, db_hh = (db if given else None for db, given in zip(dp[2:], tape.biased, strict=True))
    return Gradients(dx, dstates[0], dc0, dp.w_ih, dp.w_hh, db_ih, db_hh)


def rnn_forward(x: ArrayLike, w_ih: ArrayLike, w_hh: ArrayLike, b_ih: Opt = None, b_hh: Opt = None,
                h0: Opt = None, lengths: Opt = None, reverse: bool = False, *,
                nonlinearity: str = "tanh") -> tuple[Array, Array, Tape]:  # fmt: skip
    """An RNN layer: (y, h_n, tape). nonlinearity is "tanh" or "relu"."""
    name = "rnn_" + _choose("rnn", "nonlinearity", nonlinearity, ("tanh", "relu"))
    y, (h_n,), tape = _forward("rnn", name, x, (w_ih, w_hh, b_ih, b_hh), {"h0": h0}, lengths, reverse)
    return y, h_n, tape


def lstm_forward(x: ArrayLike, w_ih: ArrayLike, w_hh: ArrayLike, b_ih: Opt = None, b_hh: Opt = None,
                 h0: Opt = None, c0: Opt = None, lengths: Opt = None,
                 reverse: bool = False) -> tuple[Array, Array, Array, Tape]:  # fmt: skip
    """An LSTM layer: (y, h_n, c_n, tape)."""
    params, state = (w_ih, w_hh, b_ih, b_hh), {"h0": h0, "c0": c0}
    y, (h_n, c_n), tape = _forward("lstm", "lstm", x, params, state, lengths, reverse)
    return y, h_n, c_n, tape


def gru_forward(x: ArrayLike, w_ih: ArrayLike, w_hh: ArrayLike, b_ih: Opt = None, b_hh: Opt = None,
                h0: Opt = None, lengths: Opt = None, reverse: bool = False, *,
                reset_after: bool = True) -> tuple[Array, Array, Tape]:  # fmt: skip
    """A GRU layer: (y, h_n, tape). reset_after: r multiplies W_hn h + b_hn; otherwise h, before W_hn."""
    name = "gru" if reset_after else "gru_reset_before"
    y, (h_n,), tape = _forward("gru", name, x, (w_ih, w_hh, b_ih, b_hh), {"h0": h0}, lengths, reverse)
    return y, h_n, tape


def rnn(x: ArrayLike, w_ih: ArrayLike, w_hh: ArrayLike, b_ih: Opt = None, b_hh: Opt = None, h0: Opt = None,
        lengths: Opt = None, reverse: bool = False, *,
        nonlinearity: str = "tanh") -> tuple[Array, Array]:  # fmt: skip
    """An RNN layer: (y, h_n)."""
    return rnn_forward(x, w_ih, w_hh, b_ih, b_hh, h0, lengths, reverse, nonlinearity=nonlinearity)[:-1]


def lstm(x: ArrayLike, w_ih: ArrayLike, w_hh: ArrayLike, b_ih: Opt = None, b_hh: Opt = None, h0: Opt = None,
         c0: Opt = None, lengths: Opt = None,
         reverse: bool = False) -> tuple[Array, Array, Array]:  # fmt: skip
    """An LSTM layer: (y, h_n, c_n)."""
    return lstm_forward(x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse)[:-1]


def gru(x: ArrayLike, w_ih: ArrayLike, w_hh: ArrayLike, b_ih: Opt = None, b_hh: Opt = None, h0: Opt = None,
        lengths: Opt = None, reverse: bool = False, *,
        reset_after: bool = True) -> tuple[Array, Array]:  # fmt: skip
    """A GRU layer: (y, h_n)."""
    return gru_forward(x, w_ih, w_hh, b_ih, b_hh, h0, lengths, reverse, reset_after=reset_after)[:-1]


def rnn_backward(tape: Tape, dy: Opt = None, dh_n: Opt = None) -> Gradients:
    """Gradients of rnn_forward's arguments from those of y and h_n."""
    return _backward("rnn", tape, dy, {"dh_n": dh_n})


def lstm_backward(tape: Tape, dy: Opt = None, dh_n: Opt = None, dc_n: Opt = None) -> Gradients:
    """Gradients of lstm_forward's arguments from those of y, h_n and c_n."""
    return _backward("lstm", tape, dy, {"dh_n": dh_n, "dc_n": dc_n})


def gru_backward(tape: Tape, dy: Opt = None, dh_n: Opt = None) -> Gradients:
    """Gradients of gru_forward's arguments from those of y and h_n."""
    return _backward("gru", tape, dy, {"dh_n": dh_n})


# --- A cell alone: a layer with T = 1 -----------------------------------------------------------------------


def _one_step(where: str, cell: str, x_t: Opt, params: Sequence[Opt],
              state: Mapping[str, Opt]) -> Arrays:  # fmt: skip
    return _forward(where, cell, _take(where, "x_t", x_t, ("B", "I"))[None], params, state)[1]


def rnn_cell(x_t: ArrayLike, h: Opt, w_ih: ArrayLike, w_hh: ArrayLike, b_ih: Opt = None, b_hh: Opt = None, *,
             nonlinearity: str = "tanh") -> Array:  # fmt: skip
    """One RNN step: x_t (B, I), h (B, H) -> h'."""
    name = "rnn_" + _choose("rnn_cell", "nonlinearity", nonlinearity, ("tanh", "relu"))
    return _one_step("rnn_cell", name, x_t, (w_ih, w_hh, b_ih, b_hh), {"h": h})[0]


def lstm_cell(x_t: ArrayLike, h: Opt, c: Opt, w_ih: ArrayLike, w_hh: ArrayLike, b_ih: Opt = None,
              b_hh: Opt = None) -> Arrays:  # fmt: skip
    """One LSTM step: x_t (B, I), h and c (B, H) -> (h', c')."""
    return _one_step("lstm_cell", "lstm", x_t, (w_ih, w_hh, b_ih, b_hh), {"h": h, "c": c})


def gru_cell(x_t: ArrayLike, h: Opt, w_ih: ArrayLike, w_hh: ArrayLike, b_ih: Opt = None, b_hh: Opt = None, *,
             reset_after: bool = True) -> Array:  # fmt: skip
    """One GRU step: x_t (B, I), h (B, H) -> h'."""
    name = "gru" if reset_after else "gru_reset_before"
    return _one_step("gru_cell", name, x_t, (w_ih, w_hh, b_ih, b_hh), {"h": h})[0]


# --- A stack: L layers in D directions ----------------------------------------------------------------------


class StackTape(NamedTuple):
    """What stack_forward keeps: the tapes by layer, then direction, and the masks between layers."""

    tapes: Sequence[Tape]
    directions: int
    masks: Sequence[Array]


class StackGradients(NamedTuple):
    """Gradients of stack_forward's x, state and params, ordered and shaped like these."""

    x: Array
    state: Arrays
    params: Arrays


def stack_forward(cell: str, x: ArrayLike, params: Sequence[ArrayLike], state: Sequence[Opt] | None,
                  lengths: Opt, num_layers: int, directions: int, bias: bool,
                  dropout_masks: Sequence[ArrayLike] | None = None,
                  reverse: bool = False) -> tuple[Array, Arrays, StackTape]:  # fmt: skip
    """A stack: (y (T, B, D*H), final state, tape).

    cell is a name in CELLS; params holds w_ih, w_hh[, b_ih, b_hh] by layer, then direction, w_ih (G*H, D*H)
    above layer 0; state has an array (L*D, B, H) for each of the cell's states; dropout_masks, L-1 arrays
    (T, B, D*H), multiply the outputs of the layers below the last. Directions lie side by side in y; reverse
    takes D = 1.
    """
    where, D, count, each = "stack_forward", directions, num_layers * directions, 4 if bias else 2
    S = CELLS[_choose(where, "cell", cell, CELLS)].states
    _choose(where, "directions", D, (1,) if reverse else (1, 2))
    state = (None,) * S if state is None else state
    drop = "dropout_masks", dropout_masks, num_layers - 1
    for name, given, n in ("params", params, count * each), ("state", state, S), drop:
        if given is not None and len(given) != n:
            raise ValueError(f"{where}: {name} must hold {n} arrays, got {len(given)}")
    states = [None if s is None else _take(where, "state", s, (count, "B", "H")) for s in state]

    y, runs, masks = np.asarray(x), [], list[Array]()
    for layer in range(num_layers):
        for d in range(D):
            k = layer * D + d
            own = (*params[k * each : (k + 1) * each], None, None)[:4]
            initial = {f"{name}0": None if s is None else s[k] for name, s in zip("hc", states, strict=False)}
            label = f"{where}, layer {layer}, direction {d}"
            runs.append(_forward(label, cell, y, own, initial, lengths, reverse or d == 1))
        y = np.concatenate([y_d for y_d, _, _ in runs[-D:]], axis=2)
        if dropout_masks is not None and layer < num_layers - 1:
            masks.append(_take(where, f"dropout_masks[{layer}]", dropout_masks[layer], y.shape))
            y = y * masks[layer]
    _, ends, tapes = zip(*runs, strict=True)
    return y, tuple(map(np.stack, zip(*ends, strict=True))), StackTape(tapes, D, masks)


def stack_backward(tape: StackTape, dy: Opt = None, dstate: Sequence[Opt] | None = None) -> StackGradients:
    """Gradients from those of y and of the final state, which is shaped like the initial one."""
    tapes, D, masks = tape
    S, (T, B, H) = len(tapes[0].states), tapes[0].states[0].shape
    names = ("dh_n", "dc_n")[:S]
    given = dict(zip(names, (None,) * S if dstate is None else dstate, strict=True))
    dstates = _take_or_zeros("stack_backward", given, (len(tapes), B, H))
    (dy,) = _take_or_zeros("stack_backward", {"dy": dy}, (T, B, D * H))
    grads: list[Gradients] = []  # from the last layer and direction to the first
    for layer in reversed(range(len(tapes) // D)):
        if layer < len(masks):
            dy = dy * masks[layer]
        for d in reversed(range(D)):
            k = layer * D + d
            dends = dict(zip(names, (ds[k] for ds in dstates), strict=True))
            grads.append(_backward(tapes[k].cell, tapes[k], dy[..., d * H : (d + 1) * H], dends))
        dy = np.asarray(sum(g.x for g in grads[-D:]))
    grads.reverse()
    state = tuple(map(np.stack, zip(*(g[1 : 1 + S] for g in grads), strict=True)))
    return StackGradients(dy, state, tuple(a for g in grads for a in g[3:] if a is not None))
