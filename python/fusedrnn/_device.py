"""Arrays on a GPU, ours and other libraries', and `Device`: there, what NumPy and `_core` are here."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy import ndarray

from . import _check, _dtypes
from ._cuda_module import emulated, module, parsed
from ._dtypes import bfloat16
from ._typing import Array

_DL_CPU, _DL_CUDA, _DL_MANAGED = 1, 2, 13
_CODES = {  # of DLPack: (type code, bits)
    (2, 16): np.dtype(np.float16),
    (2, 32): np.dtype(np.float32),
    (2, 64): np.dtype(np.float64),
    (4, 16): bfloat16,
}

# --- Arrays -------------------------------------------------------------------------------------------------


class StreamHandle(int):
    """CUDA's handle of a stream, and what keeps the stream alive: memory is read and freed there long after
    a call."""

    keeps: Any

    def __new__(cls, handle: int, keeps: Any) -> StreamHandle:
        made = super().__new__(cls, handle)
        made.keeps = keeps
        return made


class _Memory:
    """A piece of device memory that arrays share: who owns it, and the stream that last wrote it."""

    __slots__ = ("index", "owner", "stream")

    def __init__(self, owner: Any, index: int, stream: int) -> None:
        self.owner, self.index, self.stream = owner, index, stream

    def order(self, stream: int) -> None:
        """What `stream` does from now on happens after what was done to this memory, and it outlives it."""
        if stream != self.stream:
            module().wait(self.index, stream, self.stream)
            self.used_elsewhere()
            lenders = getattr(running, "lenders", None)
            if lenders is not None:
                lenders.add((self.index, self.stream))

    def used_elsewhere(self) -> None:
        """It is used on a stream whose work nobody here waits for: to free it waits for all of the GPU."""
        if isinstance(self.owner, module().Buffer):
            self.owner.used_elsewhere()


def order(arrays: Iterable[DeviceArray], stream: int) -> None:
    """All of these are safe to use on `stream` from now on."""
    for memory in {array._memory for array in arrays}:
        memory.order(stream)


class DeviceArray:
    """An array in the memory of a GPU: what layers on a GPU keep their parameters in.

    It has no arithmetic: PyTorch, CuPy, JAX and others take it without a copy by `from_dlpack` or
    `__cuda_array_interface__`, and see the same memory. `numpy()` copies it to the host, and
    `array[...] = other` copies into it from a numpy array or an array on the same GPU. Slices, `reshape` and
    `swapaxes` are views. Made by `device_array` and by layers.

    Attributes
    ----------
    shape, strides, ndim, size, nbytes, itemsize
        As numpy's.
    dtype : numpy.dtype or fusedrnn.bfloat16
    device : str
        For example "cuda:0".
    """

    # _shadow: a numpy array with the device's addresses, so that numpy computes shapes, strides, slices and
    # overlaps. Nobody reads or writes through it: its pointers mean nothing on the host.
    __slots__ = ("__weakref__", "_memory", "_shadow", "_source", "dtype")

    _source: Array | None  # the host's array that this is a copy of, while a call runs

    def __init__(self, shadow: Array, dtype: Any, memory: _Memory) -> None:
        self._shadow = shadow
        self._memory = memory
        self._source = None
        self.dtype = dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shadow.shape

    @property
    def strides(self) -> tuple[int, ...]:
        return self._shadow.strides

    @property
    def ndim(self) -> int:
        return self._shadow.ndim

    @property
    def size(self) -> int:
        return self._shadow.size

    @property
    def nbytes(self) -> int:
        return self._shadow.nbytes

    @property
    def itemsize(self) -> int:
        return self._shadow.itemsize

    @property
    def flags(self) -> Any:
        return self._shadow.flags

    @property
    def device(self) -> str:
        return f"cuda:{self._memory.index}"

    @property
    def _on(self) -> Device:
        return Device(self._memory.index)

    def _view(self, shadow: Array) -> DeviceArray:
        return DeviceArray(shadow, self.dtype, self._memory)

    def __len__(self) -> int:
        return len(self._shadow)

    def __getitem__(self, key: Any) -> DeviceArray:
        """A view; integers, slices, None and ... are what a key may hold."""
        keys = key if isinstance(key, tuple) else (key,)
        for part in keys:
            if not (part is None or part is Ellipsis or isinstance(part, (slice, int, np.integer))):
                raise TypeError(
                    f"DeviceArray: an index must be an integer, a slice, None or ..., got {part!r}; "
                    "use an array library through from_dlpack"
                )
        return self._view(self._shadow[keys if Ellipsis in keys else (*keys, ...)])  # never a scalar, a read

    def __setitem__(self, key: Any, value: Any) -> None:
        into = self[key]
        value = self._on.shaped("DeviceArray", "value", value, self.dtype, into.shape)
        into._assign(value)

    def _assign(self, value: DeviceArray) -> None:
        if not self.flags.writeable:
            raise ValueError("DeviceArray: destination is read-only")
        memory = self._memory
        value._memory.order(memory.stream)
        module().copy(memory.index, memory.stream, value._shadow, self._shadow)
        if value._memory.stream != memory.stream:  # nor may the source be written again before this has run
            module().wait(memory.index, value._memory.stream, memory.stream)

    def __iter__(self) -> NoReturn:
        raise TypeError("DeviceArray: cannot be iterated over; copy it to the host with .numpy()")

    def __array__(self, dtype: Any = None, copy: Any = None) -> NoReturn:
        raise TypeError(f"DeviceArray: is on {self.device}; copy it to the host with .numpy()")

    def reshape(self, *shape: Any) -> DeviceArray:
        """A view of another shape; the array must be C-contiguous."""
        if not self.flags.c_contiguous:
            raise ValueError(f"DeviceArray: only C-contiguous arrays reshape, got strides {self.strides}")
        return self._view(self._shadow.reshape(*shape))

    def swapaxes(self, axis1: int, axis2: int) -> DeviceArray:
        """A view with two axes exchanged."""
        return self._view(self._shadow.swapaxes(axis1, axis2))

    def copy(self) -> DeviceArray:
        """A new C-contiguous array on the same GPU."""
        made = self._on.empty(self.shape, self.dtype, self._memory.stream)
        made._assign(self)
        return made

    def numpy(self, dtype: Any = None) -> Array:
        """A copy on the host; waits for what the GPU still has to do to it.

        Parameters
        ----------
        dtype : optional
            Of the copy. bfloat16 becomes float32 by it without ml_dtypes, and ml_dtypes' dtype by default.
        """
        wanted = None if dtype is None else _dtypes.named(dtype)
        if self.dtype is bfloat16 and (wanted is None or wanted is bfloat16):
            return self._host().view(_dtypes.numpy_bfloat16("DeviceArray"))
        host = _dtypes.widened(self._host(), self.dtype)
        return host if wanted is None else host.astype(wanted, copy=False)

    def _host(self) -> Array:
        """`bits(dtype)` on the host."""
        host: Array = np.empty(self.shape, self._shadow.dtype)
        if self.size:
            contiguous = self if self.flags.c_contiguous else self.copy()
            module().download(self._memory.index, self._memory.stream, contiguous._shadow, host)
        return host

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_DL_CPU, 0) if emulated() else (_DL_CUDA, self._memory.index)

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"DeviceArray: is on {self.device} and not copied to another device")
        array = self.copy() if copy else self
        if stream == -1:  # the consumer orders the streams itself
            array._memory.used_elsewhere()
        elif not emulated():
            array._memory.order(0 if stream is None or stream == 1 else int(stream))
        versioned = max_version is not None and max_version[0] >= 1
        if not (versioned or array.flags.writeable):
            raise BufferError("DeviceArray: is read-only, which DLPack before version 1 cannot say")
        code, width = next(code for code, dtype in _CODES.items() if dtype == self.dtype)
        return module().to_dlpack(
            array._shadow, array._memory.owner, code, width, *self.__dlpack_device__(), versioned, bool(copy)
        )

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype is bfloat16:
            raise AttributeError("__cuda_array_interface__ has no bfloat16; use __dlpack__")
        flags = self.flags
        self._memory.used_elsewhere()
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self._shadow.ctypes.data if self.size else 0, not flags.writeable),
            "strides": None if flags.c_contiguous else self.strides,
            "stream": self._memory.stream or 1,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self._host(), str(self.dtype), self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceArray:
        return self.copy()

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, device={self.device!r})"


def _restored(host: Array, dtype: str, device: str) -> DeviceArray:
    index = int(parsed("DeviceArray", device).partition(":")[2])
    return Device(index).upload(host, _dtypes.named(dtype))


def device_array(array: Any, device: Any = "cuda", dtype: Any = None) -> DeviceArray:
    """A new array on a GPU with the numbers of `array`.

    Parameters
    ----------
    array : ndarray or DeviceArray
        float32 or float64, float16, or bfloat16 of ml_dtypes.
    device : str
        "cuda" for the current one, or "cuda:N".
    dtype : optional
        What to round to: numpy.float32, float64 or float16, or "bfloat16". By default the array's own.

    Raises
    ------
    TypeError, ValueError
        For another array, dtype or device.
    RuntimeError
        If there is no GPU that can be used.
    """
    where = "device_array"
    name = parsed(where, device)
    if name == "cpu":
        raise ValueError(f"{where}: device must be a GPU, 'cuda' or 'cuda:N', got {device!r}")
    if isinstance(array, DeviceArray):
        array = array.numpy(np.float32) if array.dtype is bfloat16 else array.numpy()
    if not isinstance(array, ndarray):
        raise TypeError(
            f"{where}: array must be a numpy.ndarray or a DeviceArray, got {type(array).__name__}"
        )
    wanted = _dtypes.named(array.dtype if dtype is None else dtype)
    if wanted not in _dtypes.DEVICE:
        raise TypeError(f"{where}: dtype must be float32, float64, float16 or bfloat16, got {wanted}")
    return Device(int(name.partition(":")[2])).upload(_dtypes.narrowed(array, wanted), wanted)


# --- Arrays of other libraries ------------------------------------------------------------------------------


def place(value: Any) -> str | None:
    """The device that an array of any library is on; None for what is no array with memory of its own."""
    if isinstance(value, ndarray):
        return "cpu"
    if isinstance(value, DeviceArray):
        return value.device
    if hasattr(type(value), "__dlpack_device__"):
        kind, index = value.__dlpack_device__()
        if kind in (_DL_CUDA, _DL_MANAGED):
            return f"cuda:{index}"
        if kind == _DL_CPU:
            return "cuda:0" if emulated() else "cpu"
        return f"a device of DLPack's type {int(kind)}"
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is None:
        return None
    try:
        return f"cuda:{module().device_of(interface['data'][0])}"
    except RuntimeError:  # without kernels there is no telling which
        return "a GPU"


def taken(where: str, name: str, value: Any, stream: int) -> DeviceArray:
    """Another library's array on a GPU as one of ours: the same memory, ready for use on `stream`."""
    cuda = module()
    if hasattr(type(value), "__dlpack__"):
        held = cuda.from_dlpack(_capsule(where, name, value, stream))
        code, width, lanes = held.dtype
        dtype = _CODES.get((code, width))
        if dtype is None or lanes != 1:
            raise TypeError(
                f"{where}: {name} must have dtype float32, float64, float16 or bfloat16, "
                f"got {getattr(value, 'dtype', 'another')}; convert it in its own library"
            )
        shadow = cuda.shadow(
            held, held.pointer, held.shape, held.strides, _dtypes.bits(dtype), held.writeable
        )
        return DeviceArray(shadow, dtype, _Memory(held, held.device_id, stream))
    interface = value.__cuda_array_interface__
    dtype = np.dtype(interface["typestr"])
    if dtype not in _dtypes.DEVICE:
        raise TypeError(
            f"{where}: {name} must have dtype float32, float64 or float16, got {dtype}; "
            "convert it in its own library"
        )
    pointer, read_only = interface["data"]
    index = cuda.device_of(pointer)
    shadow = cuda.shadow(
        value, pointer, interface["shape"], interface.get("strides"), dtype, not read_only
    )
    written_on = interface.get("stream")
    memory = _Memory(value, index, stream if written_on is None else 0 if written_on == 1 else written_on)
    memory.order(stream)
    memory.stream = stream
    return DeviceArray(shadow, dtype, memory)


def _capsule(where: str, name: str, value: Any, stream: int) -> Any:
    options: dict[str, Any] = {} if emulated() else {"stream": stream or 1}
    try:
        try:
            return value.__dlpack__(max_version=(1, 0), **options)
        except TypeError:  # made before DLPack 1.0
            return value.__dlpack__(**options)
    except (BufferError, RuntimeError, TypeError) as error:
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
    name = type(value).__module__.partition(".")[0]
    owner: Any = sys.modules.get(name)
    stream = 0
    if name == "torch" and not emulated():
        current = owner.cuda.current_stream(index)
        stream = StreamHandle(current.cuda_stream, current)
    elif name == "cupy":
        current = owner.cuda.get_current_stream()
        stream = StreamHandle(current.ptr, current)
    if hasattr(value, "__array_namespace__"):
        owner = value.__array_namespace__()
    give = getattr(owner, "from_dlpack", None) if isinstance(owner, ModuleType) else None
    return Library(give or (lambda a: a), stream, waits=name not in ("torch", "cupy"))


# --- What a layer on a GPU has in place of numpy and _core --------------------------------------------------

# Of the call that runs in this thread: .stream, and .lenders, (GPU, stream) of memory of other streams.
running = threading.local()


def current_stream() -> int:
    return getattr(running, "stream", 0)


class Device:
    """A GPU: checks arrays, makes them, runs kernels. The module `_host` is its sibling."""

    __slots__ = ("index", "name")

    def __init__(self, index: int) -> None:
        self.index = index
        self.name = f"cuda:{index}"

    def __reduce__(self) -> tuple[Any, ...]:
        return Device, (self.index,)

    # Checks, as those of _check

    def array(self, where: str, name: str, value: Any, dtype: Any) -> DeviceArray:
        """`value`, of this dtype, on this GPU; a host's array is copied there."""
        if type(value) is not DeviceArray:
            if isinstance(value, ndarray):
                return self.upload(_check.array(where, name, value, dtype), dtype)
            value = self.imported(where, name, value)
        self._require_here(where, name, value.device)
        if value.dtype != dtype:
            raise TypeError(
                f"{where}: {name} must have dtype {dtype}, got {value.dtype}; "
                "convert it in its own library (.astype, .to)"
            )
        return value  # type: ignore[no-any-return]

    def imported(self, where: str, name: str, value: Any) -> DeviceArray:
        """On the call's stream; outside of calls on its library's, where its memory may be used again."""
        at = place(value)
        if at is None:
            raise TypeError(
                f"{where}: {name} must be a numpy.ndarray or an array on {self.name}, "
                f"got {type(value).__name__}"
            )
        self._require_here(where, name, at)
        in_call = getattr(running, "lenders", None) is not None
        return taken(where, name, value, current_stream() if in_call else library(value, self.index).stream)

    def _require_here(self, where: str, name: str, at: str) -> None:
        if at != self.name:
            raise ValueError(
                f"{where}: {name} must be on {self.name}, where the rest of the call is, "
                f"got an array on {at}"
            )

    def shaped(self, where: str, name: str, value: Any, dtype: Any, shape: tuple[int, ...]) -> DeviceArray:
        checked = self.array(where, name, value, dtype)
        if checked.shape != shape:
            raise _check.shape_error(where, name, shape, checked.shape)
        return checked

    def float_array(self, where: str, name: str, value: DeviceArray) -> DeviceArray:
        return value  # other dtypes are not imported

    def ready(self, value: DeviceArray) -> DeviceArray:
        """`value` itself where it is C-contiguous, otherwise a copy that is, made on the call's stream."""
        if value.flags.c_contiguous:
            return value
        made = self.empty(value.shape, value.dtype)
        module().copy(self.index, current_stream(), value._shadow, made._shadow)
        return made

    def lengths(self, where: str, value: Any, steps: int, shape: tuple[int, ...]) -> Array:
        """The host must know them: what is launched follows from them."""
        if not isinstance(value, ndarray) and hasattr(type(value), "__dlpack_device__"):
            if value.__dlpack_device__()[0] != _DL_CPU:
                raise ValueError(f"{where}: lengths must be on the cpu, got an array on {place(value)}")
            value = np.from_dlpack(value)
        return _check.lengths(where, value, steps, shape)

    def out(
        self,
        where: str,
        value: DeviceArray,
        dtype: Any,
        shape: tuple[int, ...],
        inputs: Iterable[tuple[str, Any]],
    ) -> DeviceArray:
        checked = self.shaped(where, "out", value, dtype, shape)
        if checked._source is None:
            shadow = checked._shadow
            _check.out(where, shadow, shadow.dtype, shape, ((n, _addresses(a)) for n, a in inputs))
        else:
            source = checked._source
            _check.out(where, source, source.dtype, shape, ((n, _host_source(a)) for n, a in inputs))
        return checked

    def overlap(self, a: DeviceArray, b: DeviceArray) -> bool:
        if a._source is not None and b._source is not None:
            return _check.overlap(a._source, b._source)
        return _check.overlap(a._shadow, b._shadow)

    def from_dict(self, value: Any) -> Any:
        """An entry of a state dict: also of a framework's tensor in the host's memory."""
        if isinstance(value, ndarray) or place(value) != "cpu":
            return value
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError):  # numpy has no bfloat16
            held = module().from_dlpack(value.__dlpack__())
            code, width, lanes = held.dtype
            if _CODES.get((code, width)) is not bfloat16:
                raise
            bits = module().shadow(held, held.pointer, held.shape, held.strides, np.dtype(np.uint16), False)
            return self.upload(bits, bfloat16)

    # Memory

    def empty(self, shape: tuple[int, ...], dtype: Any, stream: int | None = None) -> DeviceArray:
        stream = current_stream() if stream is None else stream
        bits = _dtypes.bits(dtype)
        buffer, shadow = module().empty(self.index, stream, shape, bits)
        return DeviceArray(shadow, dtype, _Memory(buffer, self.index, stream))

    def upload(self, host: Array, dtype: Any) -> DeviceArray:
        """A copy of the host's `bits(dtype)`, or of ml_dtypes' array; the host's may change at once."""
        if dtype is bfloat16 and host.dtype != np.uint16:
            host = host.view(np.uint16)
        made = self.empty(host.shape, dtype)
        if host.size:
            module().upload(self.index, made._memory.stream, np.ascontiguousarray(host), made._shadow)
        return made

    def own(self, flat: Any, dtype: Any) -> DeviceArray:
        """A layer's parameters: on this GPU, rounded to `dtype`. Not what was given, but a copy."""
        if isinstance(flat, DeviceArray):
            if flat.device == self.name and flat.dtype == dtype:
                return flat.copy()
            flat = _dtypes.widened(flat._host(), flat.dtype)
        return self.upload(_dtypes.narrowed(flat, dtype), dtype)

    def read_only(self, flat: DeviceArray) -> DeviceArray:
        shadow = flat._shadow.view()
        shadow.flags.writeable = False
        return flat._view(shadow)

    # Kernels, as those of _core

    @staticmethod
    def Spec(*args: Any) -> Any:
        cell, dtype, *rest = args
        return module().Spec(cell, str(dtype), *rest)

    def pack(self, spec: Any, weights: Any) -> None:
        """Weights are read as they are."""

    def forward(
        self,
        spec: Any,
        weights: tuple[DeviceArray, ...],
        x: DeviceArray,
        states: tuple[DeviceArray | None, ...] | None,
        lengths: Array | None,
        y: DeviceArray,
        final: tuple[DeviceArray, ...],
        training: bool,
        dropout: float,
        seed: int,
        panels: None,
    ) -> Any:
        from ._tf32 import get_tf32

        return module().forward(
            spec, self.index, current_stream(), get_tf32(), _shadows(weights), x._shadow, _shadows(states),
            lengths, y._shadow, _shadows(final), training, dropout, seed,
        )  # fmt: skip

    def backward(
        self,
        spec: Any,
        weights: tuple[DeviceArray, ...],
        tape: Any,
        x: DeviceArray,
        dy: DeviceArray | None,
        dstates: tuple[DeviceArray | None, ...] | None,
        dx: DeviceArray | None,
        dstates_out: tuple[DeviceArray, ...] | None,
        dparams: tuple[DeviceArray, ...] | None,
        accumulate: bool,
    ) -> None:
        x._memory.order(current_stream())
        module().backward(
            spec, self.index, current_stream(), _shadows(weights), tape, x._shadow,
            None if dy is None else dy._shadow, _shadows(dstates), None if dx is None else dx._shadow,
            _shadows(dstates_out), _shadows(dparams), accumulate,
        )  # fmt: skip


def _shadows(arrays: Any) -> Any:
    return None if arrays is None else tuple([None if a is None else a._shadow for a in arrays])


def _addresses(value: Any) -> Any:
    return value._shadow if isinstance(value, DeviceArray) else None


def _host_source(value: Any) -> Any:
    return value._source if isinstance(value, DeviceArray) else value
