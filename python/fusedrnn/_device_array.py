"""`DeviceArray`: an array in the memory of a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from . import _dtypes
from ._cuda_module import emulated, module, parsed
from ._dtypes import bfloat16
from ._typing import Array

if TYPE_CHECKING:
    from ._device import Device

DL_CPU, DL_CUDA, DL_PINNED, DL_MANAGED = 1, 2, 3, 13
CODES = {  # of DLPack: (type code, bits)
    (2, 16): np.dtype(np.float16),
    (2, 32): np.dtype(np.float32),
    (2, 64): np.dtype(np.float64),
    (4, 16): bfloat16,
}

# Of the call that runs in this thread: .stream, and .lenders, (GPU, stream) of memory of other streams.
running = threading.local()


def current_stream() -> int:
    return getattr(running, "stream", 0)


class StreamHandle(int):
    """CUDA's handle of a stream, and what keeps the stream alive: memory is read and freed there long after
    a call."""

    keeps: Any

    def __new__(cls, handle: int, keeps: Any) -> StreamHandle:
        made = super().__new__(cls, handle)
        made.keeps = keeps
        return made


class Memory:
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

    def __init__(self, shadow: Array, dtype: Any, memory: Memory) -> None:
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
        from ._device import Device  # which imports this file

        return Device(self._memory.index)

    def _view(self, shadow: Array) -> DeviceArray:
        return DeviceArray(shadow, self.dtype, self._memory)

    def __len__(self) -> int:
        return len(self._shadow)

    def __getitem__(self, key: Any) -> DeviceArray:
        """A view; integers, slices, None and ... are what a key may hold."""
        keys = key if isinstance(key, tuple) else (key,)
        for part in keys:
            mask = isinstance(part, bool)  # as numpy takes it, and copies
            if mask or not (part is None or part is Ellipsis or isinstance(part, (slice, int, np.integer))):
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
        if np.may_share_memory(value._shadow, self._shadow):  # a copy's order is nobody's to know
            value = value.copy()
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
        return (DL_CPU, 0) if emulated() else (DL_CUDA, self._memory.index)

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
        module().expect_not_forked()
        array = self.copy() if copy else self
        if stream == -1:  # the consumer orders the streams itself
            array._memory.used_elsewhere()
        elif not emulated():
            array._memory.order(0 if stream is None or stream == 1 else int(stream))
        versioned = max_version is not None and max_version[0] >= 1
        if not (versioned or array.flags.writeable):
            raise BufferError("DeviceArray: is read-only, which DLPack before version 1 cannot say")
        code, width = next(code for code, dtype in CODES.items() if dtype == self.dtype)
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
    from ._device import Device

    return Device(index).upload(host, _dtypes.named(dtype))
