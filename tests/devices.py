"""The tests' axis of places: the CPU with its two dtypes, and the GPU, real or emulated, with its four."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import fusedrnn as fr
from fusedrnn import _cuda_module, _dtypes


def _problem() -> str | None:
    try:
        _cuda_module.module()
    except RuntimeError as error:
        return str(error)
    try:
        import ml_dtypes  # noqa: F401
    except ImportError:
        return "the tests of bfloat16 need ml_dtypes"
    return None


PROBLEM = _problem()
EMULATED = _cuda_module.emulated()  # a kernel's threads run one after the other: sizes must be small
needs_gpu = pytest.mark.skipif(PROBLEM is not None, reason=PROBLEM or "")

PLACES = [
    ("cpu", "float32"), ("cpu", "float64"),
    ("cuda", "float32"), ("cuda", "float64"), ("cuda", "float16"), ("cuda", "bfloat16"),
]  # fmt: skip
every_place = pytest.mark.parametrize(
    ("device", "dtype"),
    [pytest.param(*p, id="-".join(p), marks=[needs_gpu] if p[0] == "cuda" else []) for p in PLACES],
)
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])


@contextmanager
def path(number: int) -> Iterator[None]:
    """Layers on the GPU as planned (-1), step by step (0), or persistently where they can (1)."""
    if PROBLEM is None:
        _cuda_module.module().override_path(number)
    try:
        yield
    finally:
        if PROBLEM is None:
            _cuda_module.module().override_path(-1)


def sized(device: str, usual: Any, emulated: Any) -> Any:
    """`usual`, or what is small enough for the emulated GPU."""
    return emulated if device == "cuda" and EMULATED else usual


def numpy_dtype(name: Any) -> np.dtype:
    return _dtypes.numpy_bfloat16("tests") if str(name) == "bfloat16" else np.dtype(name)


def eps(dtype: np.dtype) -> float:
    return 2.0**-7 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)


def host(a: Any) -> Any:
    """numpy's array with the numbers of one from anywhere; None stays None."""
    if a is None or isinstance(a, np.ndarray):
        return a
    return a.numpy() if isinstance(a, fr.DeviceArray) else np.from_dlpack(a)


def shares_memory(a: Any, b: Any) -> bool:
    return np.shares_memory(*(getattr(array, "_shadow", array) for array in (a, b)))


def exact(a: Any) -> Any:
    """Likewise, in float64."""
    return None if a is None else host(a).astype(np.float64)


def put(device: str, a: Any) -> Any:
    """A numpy array where it is, or its copy on the GPU."""
    return on_device(a) if device == "cuda" else a


def on_device(a: Any) -> Any:
    """The array on the GPU: the same numbers with the same strides, gaps, repetitions and offset of rows."""
    if a is None or a.size == 0:
        return None if a is None else fr.device_array(a)
    low, high = getattr(np.lib, "array_utils", np).byte_bounds(a)  # numpy 2, numpy 1
    memory = (ctypes.c_char * (high - low)).from_address(low)
    flat = fr.device_array(np.ndarray(((high - low) // a.itemsize,), a.dtype, memory))
    start = flat._shadow[(a.__array_interface__["data"][0] - low) // a.itemsize :]
    shadow = np.lib.stride_tricks.as_strided(start, a.shape, a.strides, writeable=a.flags.writeable)
    return fr.DeviceArray(shadow, flat.dtype, flat._memory)

