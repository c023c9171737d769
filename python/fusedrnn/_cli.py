"""The command line: `fusedrnn demo | bench | info`, the same as `python -m fusedrnn ...`."""

from __future__ import annotations

import argparse
import importlib
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fusedrnn as fr

Number = TypeVar("Number", int, float)

# Each module offers add_arguments(parser) and run(args) -> exit status; imported for its own command alone.
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
    if isinstance(sys.stdout, io.TextIOWrapper):  # what it cannot show ends no command
        sys.stdout.reconfigure(errors="replace")
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="fusedrnn", description="Fused RNN, LSTM and GRU kernels for NumPy."
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
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
        status: int = args.run(args)
        return status
    except BrokenPipeError:  # whoever read the output has gone; so must what is still to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CommandError, OSError) as error:
        print(f"fusedrnn {args.command}: error: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"fusedrnn {args.command}: error: out of memory: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nfusedrnn {args.command}: interrupted", file=sys.stderr)
        return 130


class _Version(argparse.Action):
    """Like argparse's, but the version is looked up only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"fusedrnn {fr.__version__}")
        parser.exit()


def info(args: argparse.Namespace) -> int:
    fr.show_config()
    return 0


def writable_folder(option: str, path: Path) -> None:
    """Makes the folder: that nothing can be written there is found out before the work, not after it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{option} {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise CommandError(f"{option} {path}: cannot be written to")


def positive_int(text: str) -> int:
    return _number(text, int, "a positive integer", lambda value: value > 0)


def natural(text: str) -> int:
    return _number(text, int, "an integer of 0 or more", lambda value: value >= 0)


def positive_float(text: str) -> float:
    return _number(text, float, "a positive number", lambda value: 0 < value < math.inf)


def nonnegative_float(text: str) -> float:
    return _number(text, float, "a number of 0 or more", lambda value: 0 <= value < math.inf)


def _number(
    text: str, kind: Callable[[str], Number], expected: str, accept: Callable[[Number], bool]
) -> Number:
    try:
        value = kind(text)
        if accept(value):
            return value
    except ValueError:
        pass  # not a number at all: the same message
    raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
