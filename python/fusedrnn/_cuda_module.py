"""Where the kernels for GPUs come from, and which GPUs there are.

Neither `_cuda` nor cuda-pathfinder is loaded until a device is asked for.
"""

from __future__ import annotations

import importlib
import threading
from typing import Any

import numpy as np

_module: Any = None
_loading = threading.Lock()


def module() -> Any:
    """`_cuda`, loaded and told where cuBLASLt may lie.

    Raises
    ------
    RuntimeError
        If this installation has no GPU kernels, or if there is no GPU or driver that can run them.
    """
    global _module
    if _module is None:
        with _loading:
            if _module is None:
                _module = _loaded()
    return _module


def _loaded() -> Any:
    try:
        cuda = importlib.import_module("fusedrnn._cuda")
    except ImportError as error:
        raise RuntimeError(
            "cuda: this fusedrnn was built without its GPU kernels: install it where CMake finds nvcc, "
            f"with -C cmake.define.FUSEDRNN_CUDA=ON to be told why it does not ({error})"
        ) from None
    cuda.device_count()  # which says what is wrong
    _point_to_blas(cuda)
    return cuda


def _point_to_blas(cuda: Any) -> None:
    """Tell the kernels where cuda-pathfinder finds cuBLASLt; else they ask the loader for it."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        path = load_nvidia_dynamic_lib("cublasLt").abs_path
    except Exception:  # whatever it is: the error of the first product says what to do
        return
    if path:
        cuda.set_blas_path(path)


def emulated() -> bool:
    """Whether the kernels are compiled for the CPU, for tests: DLPack's CPU then stands for the GPU."""
    return _module is not None and bool(_module.EMULATED)


def parsed(where: str, value: Any) -> str:
    """A device by its full name: "cpu", or "cuda:N", N being the current device where it is left out."""
    text = value if isinstance(value, str) else str(value) if hasattr(value, "index") else None
    if text is None or isinstance(value, (int, np.integer)):
        raise TypeError(f"{where}: device must be 'cpu', 'cuda' or 'cuda:N', got {value!r}")
    if text == "cpu":
        return text
    kind, colon, digits = text.partition(":")
    numbered = digits.isascii() and digits.isdigit() and len(digits) < 5
    if kind != "cuda" or (colon and not numbered):
        raise ValueError(f"{where}: device must be 'cpu', 'cuda' or 'cuda:N', got {value!r}")
    cuda = module()
    index = int(digits) if colon else cuda.current_device()
    count = cuda.device_count()
    if index >= count:
        raise ValueError(f"{where}: device must be cuda:0 to cuda:{count - 1} on this machine, got {value!r}")
    cuda.require_capable(index)
    return f"cuda:{index}"


def description() -> str:
    """One line for show_config. Loads the module, but needs no GPU."""
    try:
        cuda = importlib.import_module("fusedrnn._cuda")
    except ImportError:
        return "not built"
    try:
        cuda.device_count()
        _point_to_blas(cuda)
        return str(cuda.description())
    except RuntimeError as error:
        return f"built for {cuda.ARCHITECTURES}; {error}"
