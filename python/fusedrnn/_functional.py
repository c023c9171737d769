"""The functional forms: one layer in one direction, or one step of it, over weights given as plain arrays.

Every cell has the same four functions. What they do is written once, in `_Form`; the functions give it names
and defaults.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy import ndarray

from . import _check, _cuda_module, _device, _device_interop, _host
from ._config import CELLS, Config, gru_cell as _gru_name, rnn_cell as _rnn_name
from ._device_call import Call
from ._params import Layout
from ._stack import ALL, STATES, Stack, stack_on
from ._tape import FunctionalGrads, Tape
from ._typing import Array, FloatArray, Lengths, Wrt

__all__ = [
    "gru", "gru_backward", "gru_cell", "gru_forward",
    "lstm", "lstm_backward", "lstm_cell", "lstm_forward",
    "rnn", "rnn_backward", "rnn_cell", "rnn_forward",
]  # fmt: skip

_WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh")
Weights = tuple[FloatArray, FloatArray, FloatArray | None, FloatArray | None]
MaybeArray = FloatArray | None


@lru_cache(maxsize=256)
def _stack(
    cell: str, dtype: np.dtype[Any], inputs: int, hidden: int, bias: bool, reverse: bool, place: str
) -> Stack:
    row = CELLS[cell]
    rows = row.gates * hidden
    shapes = ((rows, inputs), (rows, hidden), (rows,), (rows,))
    layout = Layout(dict(zip(_WEIGHTS[: 4 if bias else 2], shapes, strict=False)))
    config = Config(row, inputs, hidden, 1, bias, False, 0.0, False, dtype, place)
    return stack_on(place, config, layout, reverse=reverse, functional=True)


def _of_device(where: str, name: str, x: Any) -> Any:
    """The `Call` of an x that lies on a GPU; None for any other."""
    at = _device_interop.place(x)
    if at is None or not at.startswith("cuda:"):
        return None
    _cuda_module.module()  # which says what is missing
    return Call(_device.Device(int(at[5:])), where, name, x)


class _Form:
    """The functional forms of a family of cells."""

    def __init__(self, family: str) -> None:
        self.where = family

    def prepare(
        self, cell: str, x: Any, weights: Weights, reverse: bool, on: Any = _host
    ) -> tuple[Stack, tuple[Array, ...]]:
        """The Stack for these arrays, and the weights that there are, checked."""
        where, check = self.where, on.array
        dtype = on.float_array(where, "x", x).dtype
        w_ih, w_hh, b_ih, b_hh = weights
        if (b_ih is None) != (b_hh is None):
            raise ValueError(f"{where}: b_ih and b_hh must be given together, or neither")
        w_ih, w_hh = check(where, "w_ih", w_ih, dtype), check(where, "w_hh", w_hh, dtype)
        gates = CELLS[cell].gates
        if w_hh.ndim != 2 or w_hh.shape[0] != gates * w_hh.shape[1] or w_hh.size == 0:
            raise _check.shape_error(where, "w_hh", f"({gates}*H, H) with H > 0", w_hh.shape)
        rows, hidden = w_hh.shape
        if w_ih.ndim != 2 or w_ih.shape[0] != rows or w_ih.size == 0:
            raise _check.shape_error(where, "w_ih", f"({rows}, I) with I > 0", w_ih.shape)
        stack = _stack(
            cell, dtype, w_ih.shape[1], hidden, b_ih is not None, _check.flag(where, "reverse", reverse),
            on.name,
        )  # fmt: skip
        if b_ih is None:
            return stack, (w_ih, w_hh)
        shaped, shape = on.shaped, (rows,)
        return stack, (
            w_ih,
            w_hh,
            shaped(where, "b_ih", b_ih, dtype, shape),
            shaped(where, "b_hh", b_hh, dtype, shape),
        )

    def run(
        self,
        cell: str,
        x: Any,
        weights: Weights,
        states: Any,
        lengths: Any,
        reverse: bool,
        out: Any,
        training: bool = False,
        on: Any = _host,
    ) -> tuple[Any, ...]:
        if type(x) is not ndarray and on is _host and (call := _of_device(self.where, "x", x)):
            return self._on_device(call, cell, x, weights, states, lengths, reverse, out, training)
        stack, checked = self.prepare(cell, x, weights, reverse, on)
        y, final, tape = stack.forward(checked, x, states, lengths, out, training=training)
        return (y, *final) if tape is None else (y, *final, tape)

    def _on_device(
        self, call: Any, cell: str, x: Any, weights: Weights, states: Any, lengths: Any, reverse: bool,
        out: Any, training: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        """`run` for the arrays of any library on a GPU, whose results are that library's."""
        with call:
            x = call.take("x", x)
            taken = call.take_each(_WEIGHTS, weights, x.dtype)
            states = call.take_each(STATES, states, x.dtype)
            into = call.take("out", out)
            y, *rest = self.run(cell, x, taken, states, lengths, reverse, into, training, call.on)
            final, tape = (rest[:-1], rest[-1:]) if training else (rest, [])
            return call.give(y) if out is None else out, *map(call.give, final), *tape

    def backward(
        self, tape: Any, dy: Any, dstates: Any, wrt: Wrt, retain: bool, into: FunctionalGrads | None
    ) -> FunctionalGrads:
        where = self.where
        if not isinstance(tape, Tape):
            raise TypeError(f"{where}: tape must be a Tape, got {type(tape).__name__}")
        stack = tape._stack
        if not stack.functional or stack.where != where:
            raise ValueError(f"{where}: tape must come from {where}_forward, got another's")
        return stack.backward(tape, dy, dstates, wrt, retain, into, FunctionalGrads)

    def step(
        self, cell: str, x_t: Any, weights: Weights, states: Any, on: Any = _host
    ) -> tuple[Any, ...]:
        """A sequence of one step."""
        where = self.where
        if type(x_t) is not ndarray and on is _host and (call := _of_device(where, "x_t", x_t)):
            with call:
                x_t = call.take("x_t", x_t)
                weights = call.take_each(_WEIGHTS, weights, x_t.dtype)
                states = call.take_each(("h", "c"), states, x_t.dtype)
                return tuple(map(call.give, self.step(cell, x_t, weights, states, call.on)))
        stack, checked = self.prepare(cell, on.float_array(where, "x_t", x_t), weights, False, on)
        if x_t.ndim not in (1, 2) or x_t.shape[-1] != stack.inputs:
            raise _check.shape_error(where, "x_t", f"(B, {stack.inputs}) or ({stack.inputs},)", x_t.shape)
        batched = x_t.ndim == 2
        # for errors by their names here
        stack.checked_states(("h", "c"), states, len(x_t) if batched else 1, batched)
        _, final, _ = stack.forward(checked, x_t[None], states, None, None)
        return final


_LSTM, _GRU, _RNN = _Form("lstm"), _Form("gru"), _Form("rnn")


def lstm(
    x: FloatArray,
    w_ih: FloatArray,
    w_hh: FloatArray,
    b_ih: MaybeArray = None,
    b_hh: MaybeArray = None,
    h0: MaybeArray = None,
    c0: MaybeArray = None,
    lengths: Lengths | None = None,
    reverse: bool = False,
    *,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """An LSTM layer in one direction, for inference; equations and gate order (i, f, g, o) are in `LSTM`.

    Runs on the CPU for numpy's arrays. For arrays on a GPU (of PyTorch, CuPy, JAX; `DeviceArray`) it runs
    there, also in float16 and bfloat16, and answers in their kind; `lengths` are on the host.

    Parameters
    ----------
    x : ndarray, shape (T, B, I) or (T, I)
        float32 or float64; every other array must have the same dtype. Any strides and read-only arrays do.
    w_ih, w_hh : ndarray, shapes (4*H, I) and (4*H, H)
    b_ih, b_hh : ndarray, shape (4*H,), optional
        Both or neither.
    h0, c0 : ndarray, shape (B, H), or (H,) for x (T, I); optional
        None means zeros.
    lengths : integer array or list, shape (B,), or an int for x (T, I); optional
        Steps of each sequence, from 0 to T. What lies beyond in x is not read; there y is zero.
    reverse : bool
        Run from each sequence's last step to its first.
    out : ndarray of y's shape, optional
        Where to write y: contiguous along its last axis, apart from every input.

    Returns
    -------
    y : ndarray, shape (T, B, H) or (T, H)
        h at every step.
    h_n, c_n : ndarray, shape (B, H) or (H,)
        The state after each sequence's last step taken.

    Raises
    ------
    TypeError
        For an array of another dtype than x's, float32 or float64, or no array at all.
    ValueError
        For wrong shapes, for lengths outside 0..T, and for an `out` that cannot be written.
    """
    return _LSTM.run("lstm", x, (w_ih, w_hh, b_ih, b_hh), (h0, c0), lengths, reverse, out)


def lstm_forward(
    x: FloatArray,
    w_ih: FloatArray,
    w_hh: FloatArray,
    b_ih: MaybeArray = None,
    b_hh: MaybeArray = None,
    h0: MaybeArray = None,
    c0: MaybeArray = None,
    lengths: Lengths | None = None,
    reverse: bool = False,
    *,
    out: Array | None = None,
) -> tuple[Array, Array, Array, Tape]:
    """`lstm` for training: its results, and a tape for `lstm_backward`.

    Parameters
    ----------
    x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, out
        As in `lstm`. x and the weights must stay as they are until the backward pass.

    Returns
    -------
    y, h_n, c_n : ndarray
        As in `lstm`.
    tape : Tape
        For one `lstm_backward`.

    Raises
    ------
    TypeError, ValueError
        As in `lstm`.
    """
    return _LSTM.run("lstm", x, (w_ih, w_hh, b_ih, b_hh), (h0, c0), lengths, reverse, out, True)


def lstm_backward(
    tape: Tape,
    dy: MaybeArray = None,
    dh_n: MaybeArray = None,
    dc_n: MaybeArray = None,
    *,
    wrt: Wrt = ALL,
    retain: bool = False,
    accumulate_into: FunctionalGrads | None = None,
) -> FunctionalGrads:
    """Gradients of lstm_forward's arguments from those of its results.

    Parameters
    ----------
    tape : Tape
        Of `lstm_forward`. It is used up, unless `retain` is true.
    dy, dh_n, dc_n : ndarray of the shapes of y, h_n and c_n, optional
        None means zeros; one must be given.
    wrt : collection of "x", "state", "params"
        What to compute; the rest of the work is left out.
    retain : bool
        Keep the tape for another backward.
    accumulate_into : FunctionalGrads, optional
        Gradients that an earlier backward made: what `wrt` names is added to them, and they are returned.

    Returns
    -------
    FunctionalGrads
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, each of its argument's shape; None for what `wrt` left out or was
        not given as a weight.

    Raises
    ------
    RuntimeError
        If the tape is used up, or if x or the weights are no longer what they were in the forward pass; on a
        GPU as `LSTM.backward` has it.
    TypeError, ValueError
        As in `lstm`; and for another function's tape. Then the tape and `accumulate_into` are as they were.
    """
    return _LSTM.backward(tape, dy, (dh_n, dc_n), wrt, retain, accumulate_into)


def lstm_cell(
    x_t: FloatArray,
    h: MaybeArray,
    c: MaybeArray,
    w_ih: FloatArray,
    w_hh: FloatArray,
    b_ih: MaybeArray = None,
    b_hh: MaybeArray = None,
) -> tuple[Array, Array]:
    """One time step of `lstm`.

    Parameters
    ----------
    x_t : ndarray, shape (B, I) or (I,)
    h, c : ndarray, shape (B, H), or (H,) for x_t (I,)
        The state before the step; None means zeros.
    w_ih, w_hh, b_ih, b_hh
        As in `lstm`.

    Returns
    -------
    h, c : ndarray
        The state after the step, in new arrays.

    Raises
    ------
    TypeError, ValueError
        As in `lstm`.
    """
    return _LSTM.step("lstm", x_t, (w_ih, w_hh, b_ih, b_hh), (h, c))


def gru(
    x: FloatArray,
    w_ih: FloatArray,
    w_hh: FloatArray,
    b_ih: MaybeArray = None,
    b_hh: MaybeArray = None,
    h0: MaybeArray = None,
    lengths: Lengths | None = None,
    reverse: bool = False,
    *,
    reset_after: bool = True,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """A GRU layer in one direction, for inference; equations and gate order (r, z, n) are in `GRU`.

    Takes arrays on the CPU or on a GPU as `lstm` does.

    Parameters
    ----------
    x : ndarray, shape (T, B, I) or (T, I)
        float32 or float64; every other array must have the same dtype. Any strides and read-only arrays do.
    w_ih, w_hh : ndarray, shapes (3*H, I) and (3*H, H)
    b_ih, b_hh : ndarray, shape (3*H,), optional
        Both or neither.
    h0 : ndarray, shape (B, H), or (H,) for x (T, I); optional
        None means zeros.
    lengths, reverse, out
        As in `lstm`.
    reset_after : bool
        Whether the reset gate acts after the product with W_hn (cuDNN, PyTorch, Keras) or before it (the
        original GRU, ONNX's default). Weights trained with one are wrong in the other.

    Returns
    -------
    y : ndarray, shape (T, B, H) or (T, H)
        h at every step.
    h_n : ndarray, shape (B, H) or (H,)
        h after each sequence's last step taken.

    Raises
    ------
    TypeError, ValueError
        As in `lstm`; a TypeError for a `reset_after` that is not a bool.
    """
    return _GRU.run(_gru_name(reset_after), x, (w_ih, w_hh, b_ih, b_hh), (h0,), lengths, reverse, out)


def gru_forward(
    x: FloatArray,
    w_ih: FloatArray,
    w_hh: FloatArray,
    b_ih: MaybeArray = None,
    b_hh: MaybeArray = None,
    h0: MaybeArray = None,
    lengths: Lengths | None = None,
    reverse: bool = False,
    *,
    reset_after: bool = True,
    out: Array | None = None,
) -> tuple[Array, Array, Tape]:
    """`gru` for training: its results, and a tape for `gru_backward`.

    Parameters
    ----------
    x, w_ih, w_hh, b_ih, b_hh, h0, lengths, reverse, reset_after, out
        As in `gru`. x and the weights must stay as they are until the backward pass.

    Returns
    -------
    y, h_n : ndarray
        As in `gru`.
    tape : Tape
        For one `gru_backward`.

    Raises
    ------
    TypeError, ValueError
        As in `gru`.
    """
    return _GRU.run(_gru_name(reset_after), x, (w_ih, w_hh, b_ih, b_hh), (h0,), lengths, reverse, out, True)


def gru_backward(
    tape: Tape,
    dy: MaybeArray = None,
    dh_n: MaybeArray = None,
    *,
    wrt: Wrt = ALL,
    retain: bool = False,
    accumulate_into: FunctionalGrads | None = None,
) -> FunctionalGrads:
    """Gradients of gru_forward's arguments from those of its results.

    Parameters
    ----------
    tape : Tape
        Of `gru_forward`. It is used up, unless `retain` is true.
    dy, dh_n : ndarray of the shapes of y and h_n, optional
        None means zeros; one must be given.
    wrt, retain, accumulate_into
        As in `lstm_backward`.

    Returns
    -------
    FunctionalGrads
        x, h0, w_ih, w_hh, b_ih, b_hh, each of its argument's shape; None for c0, for what `wrt` left out, and
        for what was not given as a weight.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        As in `lstm_backward`.
    """
    return _GRU.backward(tape, dy, (dh_n,), wrt, retain, accumulate_into)


def gru_cell(
    x_t: FloatArray,
    h: MaybeArray,
    w_ih: FloatArray,
    w_hh: FloatArray,
    b_ih: MaybeArray = None,
    b_hh: MaybeArray = None,
    *,
    reset_after: bool = True,
) -> Array:
    """One time step of `gru`.

    Parameters
    ----------
    x_t : ndarray, shape (B, I) or (I,)
    h : ndarray, shape (B, H), or (H,) for x_t (I,)
        The state before the step; None means zeros.
    w_ih, w_hh, b_ih, b_hh, reset_after
        As in `gru`.

    Returns
    -------
    h : ndarray
        The state after the step, in a new array.

    Raises
    ------
    TypeError, ValueError
        As in `gru`.
    """
    after: Array
    (after,) = _GRU.step(_gru_name(reset_after), x_t, (w_ih, w_hh, b_ih, b_hh), (h,))
    return after


def rnn(
    x: FloatArray,
    w_ih: FloatArray,
    w_hh: FloatArray,
    b_ih: MaybeArray = None,
    b_hh: MaybeArray = None,
    h0: MaybeArray = None,
    lengths: Lengths | None = None,
    reverse: bool = False,
    *,
    nonlinearity: Literal["tanh", "relu"] = "tanh",
    out: Array | None = None,
) -> tuple[Array, Array]:
    """A simple recurrent layer in one direction, for inference; its equation is in `RNN`.

    Takes arrays on the CPU or on a GPU as `lstm` does.

    Parameters
    ----------
    x : ndarray, shape (T, B, I) or (T, I)
        float32 or float64; every other array must have the same dtype. Any strides and read-only arrays do.
    w_ih, w_hh : ndarray, shapes (H, I) and (H, H)
    b_ih, b_hh : ndarray, shape (H,), optional
        Both or neither.
    h0 : ndarray, shape (B, H), or (H,) for x (T, I); optional
        None means zeros.
    lengths, reverse, out
        As in `lstm`.
    nonlinearity : "tanh" or "relu"

    Returns
    -------
    y : ndarray, shape (T, B, H) or (T, H)
        h at every step.
    h_n : ndarray, shape (B, H) or (H,)
        h after each sequence's last step taken.

    Raises
    ------
    TypeError, ValueError
        As in `lstm`; a ValueError for another `nonlinearity`.
    """
    return _RNN.run(_rnn_name(nonlinearity), x, (w_ih, w_hh, b_ih, b_hh), (h0,), lengths, reverse, out)


def rnn_forward(
    x: FloatArray,
    w_ih: FloatArray,
    w_hh: FloatArray,
    b_ih: MaybeArray = None,
    b_hh: MaybeArray = None,
    h0: MaybeArray = None,
    lengths: Lengths | None = None,
    reverse: bool = False,
    *,
    nonlinearity: Literal["tanh", "relu"] = "tanh",
    out: Array | None = None,
) -> tuple[Array, Array, Tape]:
    """`rnn` for training: its results, and a tape for `rnn_backward`.

    Parameters
    ----------
    x, w_ih, w_hh, b_ih, b_hh, h0, lengths, reverse, nonlinearity, out
        As in `rnn`. x and the weights must stay as they are until the backward pass.

    Returns
    -------
    y, h_n : ndarray
        As in `rnn`.
    tape : Tape
        For one `rnn_backward`.

    Raises
    ------
    TypeError, ValueError
        As in `rnn`.
    """
    return _RNN.run(_rnn_name(nonlinearity), x, (w_ih, w_hh, b_ih, b_hh), (h0,), lengths, reverse, out, True)


def rnn_backward(
    tape: Tape,
    dy: MaybeArray = None,
    dh_n: MaybeArray = None,
    *,
    wrt: Wrt = ALL,
    retain: bool = False,
    accumulate_into: FunctionalGrads | None = None,
) -> FunctionalGrads:
    """Gradients of rnn_forward's arguments from those of its results.

    Parameters
    ----------
    tape : Tape
        Of `rnn_forward`. It is used up, unless `retain` is true.
    dy, dh_n : ndarray of the shapes of y and h_n, optional
        None means zeros; one must be given.
    wrt, retain, accumulate_into
        As in `lstm_backward`.

    Returns
    -------
    FunctionalGrads
        x, h0, w_ih, w_hh, b_ih, b_hh, each of its argument's shape; None for c0, for what `wrt` left out, and
        for what was not given as a weight.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        As in `lstm_backward`.
    """
    return _RNN.backward(tape, dy, (dh_n,), wrt, retain, accumulate_into)


def rnn_cell(
    x_t: FloatArray,
    h: MaybeArray,
    w_ih: FloatArray,
    w_hh: FloatArray,
    b_ih: MaybeArray = None,
    b_hh: MaybeArray = None,
    *,
    nonlinearity: Literal["tanh", "relu"] = "tanh",
) -> Array:
    """One time step of `rnn`.

    Parameters
    ----------
    x_t : ndarray, shape (B, I) or (I,)
    h : ndarray, shape (B, H), or (H,) for x_t (I,)
        The state before the step; None means zeros.
    w_ih, w_hh, b_ih, b_hh, nonlinearity
        As in `rnn`.

    Returns
    -------
    h : ndarray
        The state after the step, in a new array.

    Raises
    ------
    TypeError, ValueError
        As in `rnn`.
    """
    after: Array
    (after,) = _RNN.step(_rnn_name(nonlinearity), x_t, (w_ih, w_hh, b_ih, b_hh), (h,))
    return after
