"""`Device`: what a layer on a GPU has in place of numpy and `_core`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy import ndarray

from . import _check, _dtypes
from ._cuda_module import module, parsed
from ._device_array import CODES, DL_CPU, DL_PINNED, DeviceArray, Memory, current_stream, running
from ._device_interop import library, place, taken
from ._dtypes import bfloat16
from ._typing import Array


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
        made._assign(value)
        return made

    def lengths(self, where: str, value: Any, steps: int, shape: tuple[int, ...]) -> Array:
        """The host must know them: what is launched follows from them."""
        if not isinstance(value, ndarray) and hasattr(type(value), "__dlpack_device__"):
            if value.__dlpack_device__()[0] not in (DL_CPU, DL_PINNED):
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

    @staticmethod
    def laid_out(a: DeviceArray) -> Array:
        """A numpy array that lies as the caller's does: the caller's own, where `a` is its copy."""
        return a._shadow if a._source is None else a._source

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
            if CODES.get((code, width)) is not bfloat16:
                raise
            bits = module().shadow(held, held.pointer, held.shape, held.strides, np.dtype(np.uint16), False)
            return self.upload(bits, bfloat16)

    # Memory

    def empty(self, shape: tuple[int, ...], dtype: Any, stream: int | None = None) -> DeviceArray:
        stream = current_stream() if stream is None else stream
        bits = _dtypes.bits(dtype)
        buffer, shadow = module().empty(self.index, stream, shape, bits)
        return DeviceArray(shadow, dtype, Memory(buffer, self.index, stream))

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

    def pack(self, spec: Any, weights: tuple[DeviceArray, ...]) -> DeviceArray:
        """What the kernels read in another order than the weights have it; `weights` share their memory."""
        first, stream = weights[0], weights[0]._memory.stream
        panels = self.empty((module().panel_bytes(spec) // first.itemsize,), first.dtype, stream)
        module().pack(spec, self.index, stream, _shadows(weights), panels._shadow)
        return panels

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
        panels: DeviceArray | None,
    ) -> Any:
        from ._tf32 import get_tf32

        return module().forward(
            spec, self.index, current_stream(), get_tf32(), _shadows(weights),
            None if panels is None else panels._shadow, x._shadow, _shadows(states), lengths,
            y._shadow, _shadows(final), training, dropout, seed,
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
    if not isinstance(array, (ndarray, DeviceArray)):
        raise TypeError(
            f"{where}: array must be a numpy.ndarray or a DeviceArray, got {type(array).__name__}"
        )
    own = _dtypes.named(array.dtype)
    wanted = own if dtype is None else _dtypes.named(dtype)
    for what, which in (("array must have dtype", own), ("dtype must be", wanted)):
        if which not in _dtypes.DEVICE:
            raise TypeError(f"{where}: {what} float32, float64, float16 or bfloat16, got {which}")
    if isinstance(array, DeviceArray):
        array = _dtypes.widened(array._host(), own)
    else:
        array = _check.array(where, "array", array, own)
    return Device(int(name.partition(":")[2])).upload(_dtypes.narrowed(array, wanted), wanted)
