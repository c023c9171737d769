"""Code compiled for one ISA must not be known by a name that another translation unit may share.

The linker keeps one copy of a weak function: were it the AVX-512 one, older CPUs would die of it. So every
function that a kernels_<isa> object offers must be in that ISA's namespace, and none may run at load.
Constants may be shared, nothing that is written.

    check_symbols.py libfusedrnn_core.a [nm]
"""

import re
import subprocess
import sys

OBJECT = re.compile(r".*\bkernels_(?P<isa>\w+)\.cpp\.o(?:bj)?:\s*(?P<name>.*)")
CODE, DATA = "TWi", "Vu"  # weak or global; constants are in sections of their own
CONSTANT = (".rodata", ".data.rel.ro")
AT_LOAD = ("_GLOBAL__sub_I", "__static_initialization_and_destruction")


def main(archive: str, nm: str = "nm") -> int:
    command = [nm, "-A", "-C", "--defined-only", "-f", "sysv", archive]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    checked: dict[str, int] = {}
    faults = []
    for line in listing.splitlines():
        symbol, *columns = (column.strip() for column in line.rsplit("|", 6))
        match = OBJECT.fullmatch(symbol)
        if not match or len(columns) != 6:
            continue
        isa, name = match.group("isa", "name")
        _, kind, *_, section = columns
        if name.startswith(AT_LOAD):
            faults.append(f"kernels_{isa}: {name} runs at load")
        if kind in CODE or (kind in DATA and not section.startswith(CONSTANT)):
            checked[isa] = checked.get(isa, 0) + 1
            if f"fusedrnn::{isa}::" not in name:
                faults.append(f"kernels_{isa}: {kind} {name} is outside of fusedrnn::{isa}")
    for fault in faults:
        print(fault)
    counts = ", ".join(f"{isa} {count}" for isa, count in checked.items())
    print(f"functions checked: {counts or 'none'}; {len(faults)} faults")
    return 1 if faults or not checked else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
