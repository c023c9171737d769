"""The machine a benchmark ran on: cores, caches, versions, and what its cores and caches can do at most."""

from __future__ import annotations

import platform
import re
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

import fusedrnn as fr
from fusedrnn import _core

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def cores() -> int:
    """Threads that this process's affinity and control group allow."""
    return _core.available_threads()


def cpu_model() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def caches() -> list[dict[str, Any]]:
    """Data caches of the first core, nearest first: level, bytes, cores that share it. Empty if unknown."""
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):

        def read(name: str, folder: Path = folder) -> str:
            return (folder / name).read_text().strip()

        if read("type") == "Instruction":
            continue
        size = read("size")
        shared = sum(
            int(last or first) - int(first) + 1
            for first, last in re.findall(r"(\d+)(?:-(\d+))?", read("shared_cpu_list"))
        )
        found.append(
            {"level": int(read("level")), "bytes": int(size[:-1]) * UNITS[size[-1]], "shared_by": shared}
        )
    return found


def describe(versions: dict[str, str]) -> dict[str, Any]:
    """What a reader needs to place the figures; nothing that names the host or its folders."""
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "caches": caches(),
        "system": platform.system(),
        "architecture": platform.machine(),
        "isa": _core.isa(),
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "fusedrnn": fr.__version__}
        | versions,
    }


def roofs(threads: int) -> list[dict[str, Any]]:
    """GB/s that `threads` threads read at from each cache level (half of it is in use) and from memory."""
    levels = [(f"L{c['level']}", c["bytes"] // (2 * min(threads, c["shared_by"]))) for c in caches()]
    if levels:
        levels.append(("memory", 8 * levels[-1][1]))
    return [
        {"level": name, "bytes": size, "threads": threads, "gb_per_s": _core.stream_bandwidth(threads, size)}
        for name, size in levels
    ]
