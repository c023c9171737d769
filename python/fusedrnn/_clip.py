"""Clipping gradients by their norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from . import _check
from ._device_interop import place
from ._tape import Grads
from ._typing import Array, HostArray

_BLOCK = 4096  # elements converted to float64 at once


def clip_grad_norm(
    grads: Grads[Any] | HostArray | Iterable[Grads[Any] | HostArray], max_norm: float
) -> float:
    """Scale gradients in place so that their norm is at most max_norm, and return the norm that they had.

    The norm is the Euclidean one over all elements together, computed in float64. As in PyTorch's
    clip_grad_norm_, the factor is max_norm / (norm + 1e-6) where that is below 1, and a norm that is infinite
    or NaN is not caught: look at what is returned.

    Parameters
    ----------
    grads : Grads, ndarray, or an iterable of these
        Of Grads, the gradients of the parameters, `flat`. Arrays are float32 or float64, of any shape and
        strides.
    max_norm : float
        Not negative.

    Raises
    ------
    TypeError, ValueError
        For anything else, for Grads without gradients of parameters, and for read-only arrays; then nothing
        is scaled.
    """
    if not isinstance(grads, (Grads, np.ndarray, Iterable)):
        raise TypeError(f"clip_grad_norm: grads must be Grads or arrays, got {type(grads).__name__}")
    arrays = [_writable(g) for g in ([grads] if isinstance(grads, (Grads, np.ndarray)) else grads)]
    max_norm = _check.number("clip_grad_norm", "max_norm", max_norm)
    if not max_norm >= 0:
        raise ValueError(f"clip_grad_norm: max_norm must be 0 or more, got {max_norm}")
    norm = float(np.sqrt(sum(_squares(a) for a in arrays)))
    factor = max_norm / (norm + 1e-6)
    if not factor >= 1:
        for a in arrays:
            a *= a.dtype.type(factor)
    return norm


def _writable(value: Any) -> Array:
    array = value.flat if isinstance(value, Grads) else value
    if array is None:
        raise ValueError("clip_grad_norm: grads must hold gradients of parameters, got Grads without")
    if not isinstance(array, np.ndarray) and (at := place(array)) is not None:
        raise TypeError(
            f"clip_grad_norm: grads must be numpy arrays, got a {type(array).__name__} on {at}; "
            "its own library can clip it"
        )
    if not isinstance(array, np.ndarray):
        raise TypeError(f"clip_grad_norm: grads must be Grads or arrays, got {type(array).__name__}")
    if type(array) is not np.ndarray:
        array = _check._plain("clip_grad_norm", "grads", array)
    if array.dtype not in (np.float32, np.float64):
        raise TypeError(
            f"clip_grad_norm: grads must have dtype float32 or float64, got {array.dtype}; "
            "convert it with .astype(numpy.float32)"
        )
    if not array.flags.writeable:
        raise ValueError("clip_grad_norm: grads must be writeable, got a read-only array")
    return array  # type: ignore[no-any-return]


def _squares(array: Array) -> float:
    flat = array.reshape(-1)
    total = 0.0
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK].astype(np.float64)
        total += float(np.dot(block, block))
    return total
