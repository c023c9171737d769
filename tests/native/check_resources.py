"""Reads what ptxas -v said of a build, and fails where a hot kernel spills registers or keeps a stack.

    cmake --build build/cuda 2>&1 | tee log;  python tests/native/check_resources.py log

The build needs CMAKE_CUDA_FLAGS=-Xptxas=-v. With --table, prints a row for each kernel: architecture,
registers, bytes of stack.
"""

import argparse
import re
import sys
from pathlib import Path

HOT = ("forward_step", "backward_step", "persistent_kernel")
ARCHITECTURES = ("sm_80", "sm_90")

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")


def kernels(log: str) -> dict[tuple[str, str], dict[str, int]]:
    """(name, architecture) of each kernel, and its registers, stack and spills."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    current: dict[str, int] = {}
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            current = found.setdefault((entry[1], entry[2]), {})
        elif stack := STACK.search(line):
            # Functions that are called report after the kernel that calls them: the worst counts.
            for key, value in zip(("stack", "stores", "loads"), map(int, stack.groups()), strict=True):
                current[key] = max(current.get(key, 0), value)
        elif used := USED.search(line):
            current["registers"] = int(used[1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("log", type=Path)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    found = kernels(options.log.read_text(errors="replace"))
    wrong = 0
    for hot in HOT:
        for architecture in ARCHITECTURES:
            if not any(hot in name and arch == architecture for name, arch in found):
                print(f"no {hot} for {architecture} in the log: built without -Xptxas=-v?", file=sys.stderr)
                wrong += 1
    for (name, architecture), use in sorted(found.items()):
        if options.table:
            print(architecture, use.get("registers"), use.get("stack"), name)
        if any(hot in name for hot in HOT) and (use["stack"] or use["stores"] or use["loads"]):
            what = f"{use['stack']} bytes of stack, spills of {use['stores']} stored, {use['loads']} loaded"
            print(f"{architecture} {name}: {what}", file=sys.stderr)
            wrong += 1
    hot = sum(any(h in name for h in HOT) for name, _ in found)
    print(f"{len(found)} kernels, {hot} of them hot; {wrong} complaints")
    return wrong != 0


if __name__ == "__main__":
    sys.exit(main())
