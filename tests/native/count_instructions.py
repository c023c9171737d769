"""Instructions that callgrind counts in fixed cases, against those kept in instructions.json.

Unlike a time, a count is the same on every run, however busy the machine: valgrind's CPU has the same ISAs
and caches everywhere, but no AVX-512, so the kept ISA is forced. A count says nothing of caches or latency.
A case more than 1 % above what is kept is an error. Another major version of the compiler makes other code:
its counts are printed and not compared.

    count_instructions.py count_cases [--write]
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

KEPT = Path(__file__).with_name("instructions.json")
TOLERANCE = 1.0  # %: counts repeat exactly; this leaves room for small changes elsewhere
CALLGRIND = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
CALLGRIND += ["--toggle-collect=fusedrnn_counted"]  # problem.h: the calls into the core


def run(*command: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "FUSEDRNN_ISA": isa}  # nothing else: getenv is counted too
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}: status {result.returncode}\n{result.stderr}")
    return result


def count(program: str, case: str, isa: str) -> int:
    report = run(*CALLGRIND, program, case, isa=isa).stderr
    collected = re.search(r"Collected : (\d+)", report)
    if collected is None or int(collected[1]) == 0:
        sys.exit(f"{case}: nothing was counted\n{report}")
    return int(collected[1])


def main() -> int:
    parser = argparse.ArgumentParser(description="Instruction counts against those kept.")
    parser.add_argument("program", help="count_cases of a release build")
    parser.add_argument("--write", action="store_true", help="keep this run's counts")
    args = parser.parse_args()
    kept = json.loads(KEPT.read_text())
    compiler, *cases = run(args.program, isa=kept["isa"]).stdout.splitlines()
    print(f"{compiler}, {kept['isa']}; kept: {kept['compiler']}")

    counts = {}
    faults = 0
    for case in cases:
        counts[case] = count(args.program, case, kept["isa"])
        before = kept["counts"].get(case)
        change = 100 * (counts[case] / before - 1) if before else 0.0
        line = f"{case:<26}{counts[case]:>12}  kept {before or 'none':>12}  {change:+7.2f} %"
        if before is None or change > TOLERANCE:
            faults += 1
            line += "  MORE" if before else "  NEW"
        elif change < -TOLERANCE:
            line += "  less: renew what is kept with --write"
        print(line, flush=True)
    for case in kept["counts"].keys() - counts:
        faults += 1
        print(f"{case:<26} is kept, but there is no such case")

    if args.write:
        KEPT.write_text(json.dumps({**kept, "compiler": compiler, "counts": counts}, indent=2) + "\n")
        print("written")
        return 0
    if compiler.split(".")[0] != kept["compiler"].split(".")[0]:
        print(f"not compared: kept with {kept['compiler']}, this is {compiler}")
        return 0
    print(f"{faults} faults: more than {TOLERANCE:g} % above what is kept, or a case without its number")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
