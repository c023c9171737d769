"""The command line: `fusedrnn demo | bench | info`, the same as `python -m fusedrnn ...`."""

from __future__ import annotations

import argparse
import importlib
import math
import sys

import fusedrnn as fr

# Each module offers add_arguments(parser) and run(args) -> exit status, and is imported only when its command is given.
COMMANDS = {
    "demo": ("fusedrnn.demo", "train a character-level language model on real text and sample from it"),
    "bench": (
        "fusedrnn.bench",
        "time the kernels over shapes, against the machine's peak and installed peers",
    ),
    "info": (None, "print the version, instruction sets, threads and build"),
}


class CommandError(Exception):
    """What the user can put right: printed as one line, exit status 2."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status; wrong arguments exit with status 2, as argparse does."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="fusedrnn", description="Fused RNN, LSTM and GRU kernels for NumPy."
    )
    parser.add_argument("--version", action="version", version=f"fusedrnn {fr.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        sub.set_defaults(run=info)
        if module and name in argv[:1]:
            command = importlib.import_module(module)
            command.add_arguments(sub)
            sub.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (CommandError, OSError) as error:
        print(f"fusedrnn {args.command}: error: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"fusedrnn {args.command}: error: out of memory: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nfusedrnn {args.command}: interrupted", file=sys.stderr)
        return 130


def info(args: argparse.Namespace) -> int:
    fr.show_config()
    return 0


def positive_int(text: str) -> int:
    return _number(text, int, "a positive integer", lambda value: value > 0)


def natural(text: str) -> int:
    return _number(text, int, "an integer of 0 or more", lambda value: value >= 0)


def positive_float(text: str) -> float:
    return _number(text, float, "a positive number", lambda value: 0 < value < math.inf)


def nonnegative_float(text: str) -> float:
    return _number(text, float, "a number of 0 or more", lambda value: 0 <= value < math.inf)


def _number(text: str, kind, expected: str, accept):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accept(value):
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
    return value
