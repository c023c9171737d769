"""How many threads the kernels may use: a default for the process, and a number local to a context.

A `num_threads` block lives in a context variable, so that a task or thread that runs meanwhile keeps its own
number; every call hands it to the compiled module, but for `Stream.step`, which has no Python in it.
Results do not depend on any of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from . import _check, _core
from ._typing import Int

_local: ContextVar[int] = ContextVar("fusedrnn.num_threads", default=0)  # 0: the process's default
local_threads = _local.get


def set_num_threads(n: Int) -> None:
    """Set how many threads a kernel may use, for the whole process.

    The default is the environment variable FUSEDRNN_NUM_THREADS, or else what the process's affinity and
    control group allowed when fusedrnn was imported: a process that is given fewer cores later says so here.
    Small calls use fewer. The number never changes a result.

    Raises
    ------
    TypeError, ValueError
        Unless n is an integer between 1 and 1024.
    """
    _core.set_num_threads(_check.threads("set_num_threads", n))


def get_num_threads() -> int:
    """How many threads a kernel called from here may use."""
    return local_threads() or _core.get_num_threads()


@contextmanager
def num_threads(n: Int) -> Iterator[None]:
    """Use at most n threads inside a `with` block, in the current context only.

    A `Stream`'s steps, in which there is no Python, go by the last call or block of the thread that they run
    on: where tasks that take turns on a thread want different numbers, each needs a block around its steps.

    >>> with fusedrnn.num_threads(1):
    ...     y, state = lstm(x)

    Raises
    ------
    TypeError, ValueError
        Unless n is an integer between 1 and 1024.
    """
    token = _local.set(_check.threads("num_threads", n))
    _core.set_local_threads(local_threads())
    try:
        yield
    finally:
        _local.reset(token)
        _core.set_local_threads(local_threads())
