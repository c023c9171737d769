"""Arrays of other libraries on a GPU: taken without a copy, and given back as what they were."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from . import _dtypes
from ._cuda_module import emulated, module
from ._device_array import CODES, DL_CPU, DL_CUDA, DL_MANAGED, DL_PINNED, DeviceArray, Memory, StreamHandle
from ._dtypes import bfloat16


def place(value: Any) -> str | None:
    """The device that an array of any library is on; None for what is no array with memory of its own."""
    if isinstance(value, ndarray):
        return "cpu"
    if isinstance(value, DeviceArray):
        return value.device
    if hasattr(type(value), "__dlpack_device__"):
        kind, index = value.__dlpack_device__()
        if kind in (DL_CUDA, DL_MANAGED):
            return f"cuda:{index}"
        if kind == DL_CPU:
            return "cuda:0" if emulated() else "cpu"
        if kind == DL_PINNED:  # the host's, locked
            return "cpu"
        return f"a device of DLPack's type {int(kind)}"
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is None:
        return None
    try:
        cuda = module()
    except RuntimeError:  # without kernels there is no telling which
        return "a GPU"
    return f"cuda:{cuda.device_of(interface['data'][0])}"


def taken(where: str, name: str, value: Any, stream: int) -> DeviceArray:
    """Another library's array on a GPU as one of ours: the same memory, ready for use on `stream`."""
    cuda = module()
    if hasattr(type(value), "__dlpack__"):
        held = cuda.from_dlpack(_capsule(where, name, value, stream))
        code, width, lanes = held.dtype
        dtype = CODES.get((code, width))
        if dtype is None or lanes != 1:
            raise TypeError(
                f"{where}: {name} must have dtype float32, float64, float16 or bfloat16, "
                f"got {getattr(value, 'dtype', 'another')}; convert it in its own library"
            )
        _expect_aligned(where, name, held.pointer, held.strides, dtype)
        shadow = cuda.shadow(
            held, held.pointer, held.shape, held.strides, _dtypes.bits(dtype), held.writeable
        )
        return DeviceArray(shadow, dtype, Memory(held, held.device_id, stream))
    interface = value.__cuda_array_interface__
    dtype = np.dtype(interface["typestr"])
    if dtype not in _dtypes.DEVICE:
        raise TypeError(
            f"{where}: {name} must have dtype float32, float64 or float16, got {dtype}; "
            "convert it in its own library"
        )
    pointer, read_only = interface["data"]
    strides = interface.get("strides")
    _expect_aligned(where, name, pointer, strides, dtype)
    index = cuda.device_of(pointer)
    shadow = cuda.shadow(value, pointer, interface["shape"], strides, dtype, not read_only)
    written_on = _stream_of(interface)
    memory = Memory(value, index, stream if written_on is None else written_on)
    memory.order(stream)
    memory.stream = stream
    return DeviceArray(shadow, dtype, memory)


def _expect_aligned(where: str, name: str, pointer: int, strides: Any, dtype: Any) -> None:
    """The kernels read whole elements: a pointer between two of them is a fault that no GPU recovers from."""
    if pointer % dtype.itemsize or any(stride % dtype.itemsize for stride in strides or ()):
        raise ValueError(
            f"{where}: {name} must be aligned to its elements of {dtype.itemsize} bytes, "
            f"got address {pointer:#x} and strides {strides}"
        )


def _stream_of(interface: dict[str, Any]) -> int | None:
    """The stream that a __cuda_array_interface__ says its array is ready on; None where it says nothing."""
    stream = interface.get("stream")
    return None if stream is None else _of_one_stream(stream)


def _of_one_stream(handle: int) -> int:
    """1 is the legacy default stream, as 0 is; 2 stands for each thread's own, which that one waits for."""
    return 0 if handle in (1, 2) else handle


def _exporting(value: Any) -> AbstractContextManager[Any]:
    """PyTorch lends only what lies on its current device."""
    name, owner = _owner(value)
    return owner.cuda.device(value.device) if name == "torch" and not emulated() else nullcontext()


def _capsule(where: str, name: str, value: Any, stream: int) -> Any:
    # int: PyTorch refuses classes derived from it.
    options: dict[str, Any] = {} if emulated() else {"stream": int(stream) or 1}
    try:
        with _exporting(value):
            try:
                return value.__dlpack__(max_version=(1, 0), **options)
            except TypeError:  # made before DLPack 1.0
                return value.__dlpack__(**options)
    except (BufferError, RuntimeError, TypeError) as error:
        if isinstance(error, RuntimeError) and "CUDA" in str(error):  # it has failed, and says why
            raise
        raise TypeError(f"{where}: {name} cannot be taken from its library: {error}") from None


class Library(NamedTuple):
    """Whose arrays a call took, and so gives back."""

    give: Callable[[DeviceArray], Any]
    stream: int
    host: bool = False  # numpy
    waits: bool = False  # what it frees it may use again at once, on a stream that is not known here


def library(value: Any, index: int) -> Library:
    """The library of an array, and the stream that its work goes to at the moment."""
    if isinstance(value, ndarray):
        ml_dtype = value.dtype if value.dtype.name == bfloat16.name else None
        return Library(lambda a: a._host().view(ml_dtype) if ml_dtype else a._host(), 0, host=True)
    if isinstance(value, DeviceArray):
        return Library(lambda a: a, value._memory.stream)
    name, owner = _owner(value)
    stream = 0
    if name == "torch":
        if not emulated():
            current = owner.cuda.current_stream(index)
            stream = StreamHandle(current.cuda_stream, current)
    elif name == "cupy":
        current = owner.cuda.get_current_stream(index)
        stream = StreamHandle(_of_one_stream(current.ptr), current)
    elif handle := _stream_of(getattr(value, "__cuda_array_interface__", None) or {}):
        stream = StreamHandle(handle, value)
    if hasattr(value, "__array_namespace__"):
        owner = value.__array_namespace__()
    give = getattr(owner, "from_dlpack", None) if isinstance(owner, ModuleType) else None
    return Library(give or (lambda a: a), stream, waits=name not in ("torch", "cupy"))


def _owner(value: Any) -> tuple[str, Any]:
    """The library that an array's class, or one that it inherits from, is of: its name, its module."""
    names = [kind.__module__.partition(".")[0] for kind in type(value).__mro__]
    name = next((known for known in ("torch", "cupy") if known in names), names[0])
    return name, sys.modules.get(name)
