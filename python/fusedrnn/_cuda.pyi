"""The compiled module of the GPU's kernels, if there is one. It trusts what `_device` has checked.

Arrays are shadows (see `_device_array.DeviceArray`) unless they are called host; streams are CUDA's handles,
and a Buffer or a Tape holds the object that it was given (see `_device_array.StreamHandle`).
"""

from typing import Any, final

import numpy as np

from ._typing import Array

EMULATED: bool
ARCHITECTURES: str

@final
class Buffer:
    def used_elsewhere(self) -> None: ...

@final
class Taken:
    @property
    def pointer(self) -> int: ...
    @property
    def shape(self) -> list[int]: ...
    @property
    def strides(self) -> list[int] | None: ...
    @property
    def writeable(self) -> bool: ...
    @property
    def device_id(self) -> int: ...
    @property
    def dtype(self) -> tuple[int, int, int]: ...

@final
class Spec:
    def __init__(
        self,
        cell: str,
        dtype: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        directions: int,
        bias: bool,
        reverse: bool,
    ) -> None: ...

@final
class Tape:
    @property
    def nbytes(self) -> int: ...
    @property
    def passes(self) -> int: ...

def device_count() -> int: ...
def expect_not_forked() -> None: ...
def expect_no_capture(device: int, stream: int) -> None: ...
def require_capable(device: int) -> None: ...
def current_device() -> int: ...
def description() -> str: ...
def synchronize(device: int, stream: int) -> None: ...
def set_blas_path(path: str) -> None: ...
def override_path(path: int) -> None: ...
def override_projected(when: int) -> None: ...
def plan(spec: Spec, device: int, tf32: bool, backward: bool, T: int, B: int) -> str: ...
def empty(device: int, stream: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Buffer, Array]: ...
def shadow(
    owner: object,
    pointer: int,
    shape: Any,
    strides: Any,
    dtype: np.dtype[Any],
    writeable: bool,
) -> Array: ...
def wait(device: int, waiter: int, before: int) -> None: ...
def upload(device: int, stream: int, host: Array, to: Array) -> None: ...
def download(device: int, stream: int, source: Array, host: Array) -> None: ...
def copy(device: int, stream: int, source: Array, to: Array) -> None: ...
def device_of(address: int) -> int: ...
def from_dlpack(capsule: Any) -> Taken: ...
def to_dlpack(
    array: Array,
    owner: object,
    code: int,
    bits: int,
    device_type: int,
    device_id: int,
    versioned: bool,
    copied: bool,
) -> Any: ...
def panel_bytes(spec: Spec) -> int: ...
def pack(spec: Spec, device: int, stream: int, params: tuple[Array, ...], panels: Array) -> None: ...
def forward(
    spec: Spec,
    device: int,
    stream: int,
    tf32: bool,
    params: tuple[Array, ...],
    panels: Array | None,
    x: Array,
    state: tuple[Array | None, ...] | None,
    lengths: Array | None,
    y: Array,
    state_out: tuple[Array, ...],
    training: bool,
    dropout: float,
    seed: int,
) -> Tape | None: ...
def backward(
    spec: Spec,
    device: int,
    stream: int,
    params: tuple[Array, ...],
    tape: Tape,
    x: Array,
    dy: Array | None,
    dstate: tuple[Array | None, ...] | None,
    dx: Array | None,
    dstate_out: tuple[Array, ...] | None,
    dparams: tuple[Array, ...] | None,
    accumulate: bool,
) -> None: ...
