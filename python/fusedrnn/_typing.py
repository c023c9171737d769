"""The types of the public signatures. Shapes stand in the docstrings and are checked in each call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt


class GpuArray(Protocol):
    """An array on a GPU: PyTorch's, CuPy's, JAX's, a `DeviceArray`."""

    @property
    def __cuda_array_interface__(self) -> Any: ...


#: What comes back: an array of the layer's dtype, numpy's where numpy's came in.
Array: TypeAlias = npt.NDArray[Any]
#: What goes in: one of the dtypes that the kernels know; float16 for layers on a GPU.
FloatArray: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.float64] | npt.NDArray[np.float16] | GpuArray
HostArray: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Int: TypeAlias = int | np.integer[Any]
Lengths: TypeAlias = npt.NDArray[np.integer[Any]] | Sequence[Int] | Int
Wrt: TypeAlias = Collection[str]  # of "x", "state", "params"

#: A state that goes in: h, or (h, c) of an LSTM; None means zeros.
StateLike: TypeAlias = FloatArray | tuple[FloatArray | None, FloatArray | None] | list[FloatArray] | None
#: A state that comes out: h, or (h, c) of an LSTM.
State = TypeVar("State")

#: What numpy.random.default_rng takes.
Seed: TypeAlias = int | np.random.SeedSequence | np.random.BitGenerator | np.random.Generator | None
