"""What this build is and what it runs on."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np

from . import _core, _cuda_module
from ._threads import get_num_threads


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dict"]) -> dict[str, Any]: ...
def show_config(mode: Literal["stdout", "dict"] = "stdout") -> dict[str, Any] | None:
    """Print the version, the instruction set in use and those available, threads, CUDA and the compiler.

    With mode="dict", return them instead, under version, numpy, isa, available_isas (a list), num_threads,
    compiler and cuda.

    Raises
    ------
    ValueError
        For another mode.
    """
    if mode not in ("stdout", "dict"):
        raise ValueError(f"show_config: mode must be 'stdout' or 'dict', got {mode!r}")
    build = _core.build_info()
    config: dict[str, Any] = {
        "version": build.pop("version"),
        "numpy": np.__version__,
        "isa": _core.isa(),
        "available_isas": _core.available_isas(),
        "num_threads": get_num_threads(),
        "cuda": _cuda_module.description(),
        **build,
    }
    if mode == "dict":
        return config
    width = max(map(len, config))
    for name, value in config.items():
        print(f"{name:<{width}}  {', '.join(value) if isinstance(value, list) else value}")
    return None
