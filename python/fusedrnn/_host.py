"""What a stack needs of the place it is in: NumPy and the CPU's kernels. `_device.Device` is its sibling."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from . import _core
from ._check import array, float_array, lengths, out, overlap, ready, shaped
from ._core import Spec, backward, forward, pack
from ._device_array import DeviceArray
from ._typing import Array

__all__ = [
    "Spec", "array", "backward", "empty", "float_array", "forward", "from_dict", "laid_out", "lengths",
    "name", "out", "overlap", "own", "pack", "read_only", "ready", "shaped",
]  # fmt: skip

name = "cpu"
LARGE = 1 << 18  # elements: malloc keeps smaller arrays by itself


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    # large ones in kept memory: the first touch of fresh pages costs more than computing them
    return _core.empty(shape, dtype) if prod(shape) > LARGE else np.empty(shape, dtype)


def own(flat: Any, dtype: np.dtype[Any]) -> Array:
    """A layer's parameters: a copy of what was given, wherever that is."""
    return np.array(flat if isinstance(flat, np.ndarray) else flat.numpy(dtype), dtype)


def from_dict(value: Any) -> Any:
    """An entry of a state dict: of a framework's tensor, the array."""
    if isinstance(value, np.ndarray) or not hasattr(value, "__array__"):
        return value
    return value.numpy() if isinstance(value, DeviceArray) else np.asarray(value)


def laid_out(a: Array) -> Array:
    return a


def read_only(flat: Array) -> Array:
    flat.flags.writeable = False
    return flat
