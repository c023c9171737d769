"""One call on a GPU: whose arrays it takes, the stream that it runs on, and whose arrays it gives back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from numpy import ndarray

from . import _check
from ._cuda_module import module
from ._device import Device
from ._device_array import DeviceArray, current_stream, running
from ._device_interop import library, place


class Call:
    """One call: the library of its arrays, and the stream that it runs on; a `with` block runs it there."""

    __slots__ = ("_outer", "give", "host", "on", "stream", "waits", "where")

    def __init__(self, on: Device, where: str, name: str, first: Any) -> None:
        """`first`: an array of the call, which all the others must be beside."""
        at = place(first)
        if at is not None and not isinstance(first, ndarray):
            on._require_here(where, name, at)
        self.give, self.stream, self.host, self.waits = library(first, on.index)
        self.on, self.where = on, where

    def __enter__(self) -> Call:
        module().expect_no_capture(self.on.index, self.stream)  # before it is made to wait for anything
        self._outer = current_stream(), getattr(running, "lenders", None)
        running.stream, running.lenders = self.stream, set()
        return self

    def __exit__(self, *_: object) -> None:
        lenders = running.lenders
        running.stream, running.lenders = self._outer
        for index, stream in lenders:  # what they read, write or free next comes after this call
            module().wait(index, stream, self.stream)
        if self.waits:
            module().synchronize(self.on.index, self.stream)

    def take(self, name: str, value: Any, dtype: Any = None) -> Any:
        """An argument as an array on the GPU, safe to use on the call's stream. None stays None."""
        if value is None:
            return None
        if isinstance(value, ndarray):
            if not self.host:
                raise ValueError(
                    f"{self.where}: {name} must be on {self.on.name}, where the rest of the call is, "
                    "got an array on the cpu (numpy.ndarray)"
                )
            checked = _check.array(self.where, name, value, dtype)
            made = self.on.upload(checked, dtype)
            made._source = checked
            return made
        at = place(value)
        if at is not None and self.host:
            raise ValueError(
                f"{self.where}: {name} must be on the cpu (a numpy.ndarray), where the rest of the call is, "
                f"got an array on {at}"
            )
        if not isinstance(value, DeviceArray):
            return self.on.imported(self.where, name, value)
        self.on._require_here(self.where, name, value.device)
        value._memory.order(self.stream)
        return value

    def take_each(self, names: Iterable[str], values: Any, dtype: Any) -> Any:
        if values is None:
            return None
        return tuple([self.take(n, v, dtype) for n, v in zip(names, values, strict=False)])

    def take_out(self, name: str, value: Any, dtype: Any) -> Any:
        """Where to write a result: in the caller's memory, or for numpy's beside it until `put` copies it."""
        if not isinstance(value, ndarray) or not self.host:
            return self.take(name, value, dtype)
        checked = _check.array(self.where, name, value, dtype)
        made = self.on.empty(checked.shape, dtype)
        made._source = checked
        return made

    @staticmethod
    def put(made: DeviceArray) -> None:
        if made._source is not None:
            made._source[...] = made._host().view(made._source.dtype)
