"""Whether a GPU may round the factors of float32 products to TF32: a default, and a context's own setting.

A switch as in PyTorch and JAX, and not an argument of layers: it is a property of the run, not of the model,
and must be the same for a model loaded elsewhere. Unlike theirs it is off by default, for every product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from . import _check

_default = False
_local: ContextVar[bool | None] = ContextVar("fusedrnn.tf32", default=None)


def set_tf32(enabled: bool) -> None:
    """Let float32 products on a GPU round their factors to TF32's 10 bits, for the whole process, or not.

    Off by default. Sums stay in float32. A backward pass does what its forward pass did.

    Raises
    ------
    TypeError
        Unless `enabled` is True or False.
    """
    global _default
    _default = _check.flag("set_tf32", "enabled", enabled)


def get_tf32() -> bool:
    """Whether a float32 product called from here may use TF32."""
    local = _local.get()
    return _default if local is None else local


@contextmanager
def tf32(enabled: bool = True) -> Iterator[None]:
    """Let float32 products use TF32, or not, inside a `with` block, in the current context only.

    >>> with fusedrnn.tf32():
    ...     y, state = lstm(x)

    Raises
    ------
    TypeError
        Unless `enabled` is True or False.
    """
    token = _local.set(_check.flag("tf32", "enabled", enabled))
    try:
        yield
    finally:
        _local.reset(token)
