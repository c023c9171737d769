"""What this build is and what it runs on."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np

from . import _core
from ._threads import get_num_threads


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dict"]) -> dict[str, Any]: ...
def show_config(mode: Literal["stdout", "dict"] = "stdout") -> dict[str, Any] | None:
    """Print the version, the instruction set in use and those available, threads, CUDA and the compiler.

    With mode="dict", return them instead: version, numpy, isa, available_isas, num_threads, cuda and, from
    the build, build.

    Raises
    ------
    ValueError
        For another mode.
    """
    if mode not in ("stdout", "dict"):
        raise ValueError(f"show_config: mode must be 'stdout' or 'dict', got {mode!r}")
    from importlib.metadata import version  # slow to import, so not with the package
    from importlib.util import find_spec

    config: dict[str, Any] = {
        "version": version("fusedrnn"),
        "numpy": np.__version__,
        "isa": _core.isa(),
        "available_isas": _core.available_isas(),
        "num_threads": get_num_threads(),
        "cuda": find_spec("fusedrnn._cuda") is not None,
        "build": _core.build_info(),
    }
    if mode == "dict":
        return config
    build = config.pop("build")
    config["available_isas"] = ", ".join(config["available_isas"])
    config["cuda"] = "built" if config["cuda"] else "not built"
    rows = {
        "fusedrnn": config.pop("version"),
        **config,
        **{f"build {key}": value for key, value in build.items()},
    }
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")
    return None
