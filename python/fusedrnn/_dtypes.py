"""The dtypes of layers: numpy's float32 and float64 everywhere, on a GPU also float16 and bfloat16."""

from __future__ import annotations

from typing import Any, final

import numpy as np

from ._typing import Array


@final
class BFloat16:
    """bfloat16, which numpy lacks. Equal to `ml_dtypes.bfloat16`'s dtype, which it needs nowhere."""

    __slots__ = ()
    name, itemsize = "bfloat16", 2

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat16) or getattr(other, "name", None) == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return "fusedrnn.bfloat16"

    def __reduce__(self) -> str:
        return self.name  # the object below, wherever it is unpickled


bfloat16: Any = BFloat16()

HOST = np.dtype(np.float32), np.dtype(np.float64)
DEVICE = (*HOST, np.dtype(np.float16), bfloat16)


def named(value: Any) -> Any:
    """`value` as one of the dtypes above or any other of numpy's. Raises a TypeError if it is none at all."""
    if isinstance(value, str) and value == bfloat16.name or isinstance(value, BFloat16):
        return bfloat16
    try:
        dtype = np.dtype(value)
    except (TypeError, ValueError, SyntaxError):  # numpy's own texts name nothing
        raise TypeError(f"dtype must be a floating dtype, or its name, got {value!r}") from None
    return bfloat16 if dtype.name == bfloat16.name else dtype


def bits(dtype: Any) -> np.dtype[Any]:
    """What numpy holds elements in: of bfloat16, their bits."""
    return np.dtype(np.uint16 if dtype is bfloat16 else dtype)


def narrowed(values: Array, dtype: Any) -> Array:
    """Numbers as `bits(dtype)`, rounded to the nearest, halves to even."""
    if dtype is not bfloat16:
        return values.astype(dtype, copy=False)
    if values.dtype.name == bfloat16.name:
        return values.view(np.uint16)
    wide = np.asarray(values, np.float32, order="C").view(np.uint32)
    if values.dtype == np.float64:  # to odd on the way, so that what is rounded twice is rounded right
        inexact, toward = wide.view(np.float32) != values, np.abs(wide.view(np.float32)) > np.abs(values)
        wide = np.where(inexact & np.isfinite(values), (wide - toward) | 1, wide).astype(np.uint32)
    rounded = (wide + (0x7FFF + ((wide >> 16) & 1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)  # a NaN's payload could carry over


def widened(values: Array, dtype: Any) -> Array:
    """`bits(dtype)` as numbers: of bfloat16, float32."""
    if dtype is not bfloat16:
        return values
    return np.asarray(values.astype(np.uint32) << 16).view(np.float32)


def numpy_bfloat16(where: str) -> np.dtype[Any]:
    """The dtype that ml_dtypes gives numpy."""
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError(
            f"{where}: numpy has no bfloat16: install ml_dtypes, or ask for numpy.float32"
        ) from None
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype
