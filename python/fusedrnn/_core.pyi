"""The compiled module. It trusts what the Python side has checked; only Stream.step checks for itself."""

from typing import Any, TypedDict, final

import numpy as np

from ._typing import Array

class CellRow(TypedDict):
    name: str
    gates: int
    states: int

CELLS: list[CellRow]

@final
class Spec:
    def __init__(
        self,
        cell: str,
        dtype: np.dtype[Any],
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

@final
class Panels:
    @property
    def nbytes(self) -> int: ...

@final
class Stream:
    def __init__(self, spec: Spec, panels: Panels, batch_size: int) -> None: ...
    def step(self, x: Array, out: Array | None = None) -> Array: ...
    def set_state(self, state: tuple[Array | None, ...] | None) -> None: ...
    @property
    def state(self) -> tuple[Array, ...]: ...
    @property
    def batch_size(self) -> int: ...

def forward(
    spec: Spec,
    params: tuple[Array, ...],
    x: Array,
    state: tuple[Array | None, ...] | None,
    lengths: Array | None,
    y: Array,
    state_out: tuple[Array, ...],
    training: bool,
    dropout: float,
    seed: int,
    panels: Panels | None,
) -> Tape | None: ...
def backward(
    spec: Spec,
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
def pack(spec: Spec, params: tuple[Array, ...]) -> Panels: ...
def set_num_threads(n: int) -> None: ...
def get_num_threads() -> int: ...
def set_local_threads(n: int) -> None: ...
def available_threads() -> int: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def build_info() -> dict[str, str]: ...
def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array: ...
def fma_peak(dtype: np.dtype[Any], threads: int) -> float: ...
def stream_bandwidth(threads: int, bytes: int) -> float: ...
def override_plan(
    row_threads: int = 0,
    unit_threads: int = 0,
    chunk_steps: int = 0,
    chunk_rows: int = 0,
    teams: int = 0,
    ranges: int = 0,
    fused: int = 0,
    prefetch: int = 0,
) -> None: ...
