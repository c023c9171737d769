"""The parameters of a layer: one flat buffer in PyTorch's order, and views into it by PyTorch's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NoReturn

import numpy as np

from . import _host
from ._typing import Array


class Layout:
    """Where each parameter lies in a flat buffer. Gradients have the layout of their parameters."""

    __slots__ = ("_cuts", "shapes", "size")

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)
        cuts, start = [], 0
        for shape in self.shapes.values():
            cuts.append((slice(start, start + prod(shape)), shape))
            start += prod(shape)
        self._cuts = cuts
        self.size = start

    def views(self, flat: Array) -> tuple[Array, ...]:
        return tuple([flat[cut].reshape(shape) for cut, shape in self._cuts])

    def named_views(self, flat: Array) -> dict[str, Array]:
        return dict(zip(self.shapes, self.views(flat), strict=True))


class Params(Mapping[str, Array]):
    """Parameters, or gradients, by name: views into one flat buffer.

    The keys never change. `params[k][...] = array` and `params[k] = array` both copy into the buffer. The
    views of a frozen layer are read-only.

    Raises
    ------
    KeyError
        For a name that the layer does not have.
    TypeError, ValueError
        For what is not an array of the layer's dtype and the parameter's shape, and for a read-only view.
    """

    __slots__ = ("_on", "_views", "_where")

    def __init__(self, where: str, views: dict[str, Array], on: Any = _host) -> None:
        """`on`: the place of the views; None where another library owns them and checks what it is given."""
        self._where = where
        self._views = views
        self._on = on

    def __getitem__(self, key: str) -> Array:
        return self._views[key]

    def __setitem__(self, key: str, value: Array) -> None:
        view = self._views[key]
        on = self._on
        view[...] = value if on is None else on.shaped(self._where, key, value, view.dtype, view.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "Params are views into the memory of a layer or of Grads, and cannot be copied or pickled apart "
            "from it: take the layer or the Grads, or dict(params)"
        )

    def __repr__(self) -> str:
        return f"Params({ {name: view.shape for name, view in self._views.items()} })"


def gathered(
    where: str, mapping: Mapping[str, Any], layout: Layout, dtype: np.dtype[Any], on: Any = _host
) -> Array:
    """A new flat buffer with the arrays of a state dict, which must be exactly the layout's."""
    if not isinstance(mapping, Mapping):
        raise TypeError(
            f"{where}: state_dict must be a mapping of names to arrays, got {type(mapping).__name__}"
        )
    missing = [name for name in layout.shapes if name not in mapping]
    extra = [name for name in mapping if name not in layout.shapes]
    if missing or extra:
        raise ValueError(
            f"{where}: state_dict must have exactly the layer's keys, got {list(mapping)}: "
            f"missing {missing}, unexpected {extra}"
        )
    flat: Array = on.empty((layout.size,), dtype)
    for (name, shape), view in zip(layout.shapes.items(), layout.views(flat), strict=True):
        value = mapping[name]
        view[...] = on.shaped(where, f"state_dict[{name!r}]", on.from_dict(value), dtype, shape)
    return flat
