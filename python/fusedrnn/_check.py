"""What an argument must be, and the error that says so. Nothing here computes, and no array is ever written.

Every message names the function, the argument, what was expected and what came; texts are built only when
they are needed.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy import ndarray

from . import _dtypes
from ._device_interop import place
from ._typing import Array

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_READY = 0x1 | 0x100  # NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED
_OVERLAP_WORK: Any = 1000  # candidates that the exact overlap test may try; beyond them it says "may overlap"
MAX_THREADS = 1024


def array(where: str, name: str, value: Any, dtype: np.dtype[Any]) -> Array:
    """`value` as a plain ndarray; it must have exactly this dtype."""
    if type(value) is not ndarray:
        value = _plain(where, name, value)
    if value.dtype != dtype:
        raise TypeError(
            f"{where}: {name} must have dtype {dtype}, got {value.dtype}; "
            f"convert it with .astype({'ml_dtypes' if str(dtype) == 'bfloat16' else 'numpy'}.{dtype})"
        )
    return value  # type: ignore[no-any-return]


def _plain(where: str, name: str, value: Any) -> Array:
    """A subclass may mean more than its numbers (a mask, a unit): only memory maps are taken for these."""
    if isinstance(value, np.memmap):
        return value.view(ndarray)
    if isinstance(value, ndarray):
        raise TypeError(
            f"{where}: {name} must be a plain numpy.ndarray, got its subclass {type(value).__name__}"
        )
    at = place(value)
    if at not in (None, "cpu"):
        raise ValueError(
            f"{where}: {name} must be on the cpu, where the rest of the call is, got an array on {at}"
        )
    raise TypeError(f"{where}: {name} must be a numpy.ndarray, got {type(value).__name__}")


def float_array(where: str, name: str, value: Any) -> Array:
    """`value` as a plain ndarray of either of the dtypes that there are kernels for."""
    if type(value) is not ndarray:
        value = _plain(where, name, value)
    if value.dtype != _FLOAT32 and value.dtype != _FLOAT64:
        raise TypeError(
            f"{where}: {name} must have dtype float32 or float64, got {value.dtype}; "
            "convert it with .astype(numpy.float32)"
        )
    return value  # type: ignore[no-any-return]


def shaped(where: str, name: str, value: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Likewise, of exactly this shape."""
    checked = array(where, name, value, dtype)
    if checked.shape != shape:
        raise shape_error(where, name, shape, checked.shape)
    return checked


def shape_error(where: str, name: str, expected: object, got: tuple[int, ...]) -> ValueError:
    return ValueError(f"{where}: {name} must have shape {expected}, got {got}")


def ready(value: Array) -> Array:
    """`value` itself where it is C-contiguous and aligned, otherwise a copy that is."""
    return value if value.flags.num & _READY == _READY else np.array(value, order="C")


def lengths(where: str, value: Any, steps: int, shape: tuple[int, ...]) -> Array:
    """An int64 copy of `value`, (B,), which nobody can change between this check and the kernel."""
    known = isinstance(value, (ndarray, Sequence, int, np.integer))
    if not known or isinstance(value, (str, bytes)):
        raise TypeError(f"{where}: lengths must be an integer array or a list, got {type(value).__name__}")
    given = value if isinstance(value, ndarray) else _of_sequence(where, value, steps)
    if type(given) is not ndarray:
        given = _plain(where, "lengths", given)
    if given.dtype.kind not in "iu" and not (given.size == 0 and isinstance(value, Sequence)):
        hint = "; convert it with .astype(numpy.int64)" if given is value else ""
        raise TypeError(f"{where}: lengths must have an integer dtype, got {given.dtype}{hint}")
    if given.shape != shape:
        raise shape_error(where, "lengths", shape, given.shape)
    # Read as unsigned, negative numbers are too long as well, and so is what int64 cannot hold.
    taken = np.array(given, np.int64, order="C")
    too_long = taken.view(np.uint64) > steps
    if too_long.any():
        index = int(too_long.argmax())
        raise _length_error(where, steps, given.reshape(-1)[index], index)
    return taken.reshape(-1)


def _of_sequence(where: str, value: Any, steps: int) -> Array:
    """Lengths that are no array, as one."""
    given = np.asarray(value)
    if given.dtype.kind not in "iu":  # integers that int64 cannot hold?
        for index, n in enumerate(value if isinstance(value, Sequence) else (value,)):
            if isinstance(n, int) and not 0 <= n <= steps:
                raise _length_error(where, steps, n, index)
    return given


def _length_error(where: str, steps: int, got: Any, index: int) -> ValueError:
    return ValueError(
        f"{where}: lengths must be between 0 and {steps} (the number of steps), got {got} at index {index}"
    )


def out(
    where: str,
    value: Any,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    inputs: Iterable[tuple[str, Array | None]],
) -> Array:
    """An array that a kernel can write without changing what it reads."""
    checked = shaped(where, "out", value, dtype, shape)
    if not checked.flags.writeable:
        raise ValueError(f"{where}: out must be writeable, got a read-only array")
    if not holds_rows(checked):
        raise ValueError(
            f"{where}: out must be aligned, contiguous along its last axis and without overlapping rows, "
            f"got strides {checked.strides}"
        )
    for name, other in inputs:
        if other is not None and overlap(checked, other):
            raise ValueError(f"{where}: out must not overlap {name}, got an array that shares memory with it")
    return checked


def holds_rows(a: Array) -> bool:
    """Whether a kernel can write there: aligned, each row in one piece, and none over another."""
    rows = a.size == 0 or a.shape[-1] <= 1 or a.strides[-1] == a.itemsize  # numpy's of size 0 have no strides
    return rows and a.flags.aligned and not _overlaps_itself(a)


def overlap(a: Array, b: Array) -> bool:
    """Whether two arrays share memory; where an exact answer would take long, whether they may."""
    try:
        return np.shares_memory(a, b, max_work=_OVERLAP_WORK)
    except np.exceptions.TooHardError:
        return True


def _overlaps_itself(a: Array) -> bool:
    if a.size == 0:
        return False
    reach = a.itemsize
    for stride, n in sorted((abs(stride), n) for stride, n in zip(a.strides, a.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += stride * (n - 1)
    return False


def integer(where: str, name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high]; numpy's integers are welcome, bool is not."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        n = operator.index(value)
    except TypeError:  # also numpy's, of arrays, which names nothing
        raise TypeError(f"{where}: {name} must be an integer, got {value!r}") from None
    if n < low:
        raise ValueError(f"{where}: {name} must be at least {low}, got {n}")
    if high is not None and n > high:
        raise ValueError(f"{where}: {name} must be at most {high}, got {n}")
    return n


def flag(where: str, name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{where}: {name} must be True or False, got {value!r}")
    return bool(value)


def choice(where: str, name: str, value: Any, known: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{where}: {name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return value


def number(where: str, name: str, value: Any) -> Any:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{where}: {name} must be a number, got {value!r}")
    return value


def probability(where: str, name: str, value: Any) -> float:
    """`value` as a float in [0, 1): dropping everything leaves nothing to scale up."""
    number(where, name, value)
    if not 0.0 <= value < 1.0 or float(value) == 1.0:  # as a wider type's may be
        raise ValueError(f"{where}: {name} must be in [0, 1), got {value}")
    return float(value)


def float_dtype(where: str, value: Any, device: str = "cpu") -> np.dtype[Any]:
    try:
        dtype = None if value is None else _dtypes.named(value)  # numpy takes None for float64
    except TypeError:
        dtype = None
    known = _dtypes.HOST if device == "cpu" else _dtypes.DEVICE
    if dtype is None or dtype not in known:
        names = ", ".join(map(str, known[:-1])) + f" or {known[-1]}"
        hint = "; it needs device='cuda'" if dtype is not None and dtype in _dtypes.DEVICE else ""
        raise TypeError(f"{where}: dtype must be {names}, got {dtype or repr(value)}{hint}")
    return known[known.index(dtype)]


def dropout_seed(where: str, value: Any) -> int:
    return integer(where, "seed", value, 0, 2**64 - 1)


def threads(where: str, value: Any) -> int:
    return integer(where, "n", value, 1, MAX_THREADS)


def array_bytes(where: str, what: str, count: int, dtype: np.dtype[Any]) -> None:
    """`count` elements must have a size in bytes that a pointer difference can hold."""
    if count * dtype.itemsize > sys.maxsize:
        raise ValueError(
            f"{where}: {what} would hold {count} elements of {dtype}, more than can be addressed"
        )
