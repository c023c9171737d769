"""What a training forward hands to its backward, and what the backward hands back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, NoReturn

import numpy as np

from . import _core, _host
from ._params import Layout, Params
from ._typing import Array, State

if TYPE_CHECKING:
    from ._stack import Stack


class Tape:
    """What one training forward saved for its backward.

    Made by `layer.forward` and the functional `*_forward`; used once, unless `backward(..., retain=True)`
    keeps it for another backward. It refers to x and to the parameters and holds a checksum of both: if
    either was changed in between, backward raises a RuntimeError. (Of a numpy array that went to a GPU it
    keeps the copy.) A backward that fails on a GPU after it began to add to `accumulate_into` there uses the
    tape up, retained or not. A tape belongs to the layer that made it, and cannot be copied or pickled.

    Attributes
    ----------
    seed : int or None
        Seed of this call's dropout masks; None where nothing was dropped.
    """

    __slots__ = ("_batched", "_kernel", "_spoilt", "_stack", "_token", "_weights", "_x", "seed")

    def __init__(
        self,
        stack: Stack,
        kernel: _core.Tape,
        weights: tuple[Array, ...],
        x: Array,
        batched: bool,
        seed: int | None,
    ) -> None:
        self._stack = stack
        self._kernel: _core.Tape | None = kernel
        self._weights = weights
        self._x: Array | None = x  # (T, B, I), the caller's memory
        self._batched = batched
        self._token = [None]  # taken by the one backward that may use the tape up: popping is atomic
        self._spoilt = False
        self.seed = seed

    @property
    def nbytes(self) -> int:
        """Bytes that the kernel keeps for the backward pass; 0 once the tape is used up."""
        return 0 if self._kernel is None else self._kernel.nbytes

    def _opened(self, where: str) -> tuple[_core.Tape, Array, tuple[Array, ...]]:
        # The weights, which go last, are read first: another thread may close the tape meanwhile.
        weights, x, kernel = self._weights, self._x, self._kernel
        if kernel is None or x is None:
            raise self._used(where)
        return kernel, x, weights

    def _claim(self, where: str) -> None:
        try:
            self._token.pop()
        except IndexError:
            raise self._used(where) from None

    def _unclaim(self) -> None:
        self._token.append(None)

    def _used(self, where: str) -> RuntimeError:
        if self._spoilt:
            return RuntimeError(
                f"{where}: tape was used up by a backward pass that failed or was interrupted "
                "when it had added to accumulate_into"
            )
        return RuntimeError(f"{where}: tape was used already; retain=True keeps it for another backward")

    def _spoil(self) -> None:
        self._spoilt = True
        self._close()

    def _close(self) -> None:
        self._kernel = self._x = None
        self._weights = ()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Tape cannot be copied or pickled: it belongs to one forward pass of one layer")

    def __repr__(self) -> str:
        return "Tape(used)" if self._kernel is None else f"Tape(nbytes={self.nbytes})"


class Grads(Generic[State]):
    """Gradients of a layer's input, initial state and parameters; None for what `wrt` left out.

    The arrays are of the kind that backward was given: numpy's, or on a GPU those of the caller's library.

    Attributes
    ----------
    x : ndarray
        Shape of x.
    state : ndarray, or tuple of ndarray
        Of the initial state: of h, or of (h, c) for an LSTM; shapes of the state.
    flat : ndarray, shape (number of parameters,)
        Of all parameters in PyTorch's order, in one writable buffer.
    params : Params
        The same by name: views into `flat`.
    """

    __slots__ = ("_layout", "_states", "flat", "x")

    def __init__(
        self, layout: Layout, x: Array | None, states: tuple[Array, ...] | None, flat: Array | None
    ) -> None:
        self._layout = layout
        self._states = states
        self.x: Any = x
        self.flat: Any = flat

    @property
    def state(self) -> State:
        states: Any = self._states
        return states[0] if states is not None and len(states) == 1 else states  # type: ignore[no-any-return]

    @property
    def params(self) -> Params:
        flat = self.flat
        if flat is None:
            return None  # type: ignore[return-value]
        on = _host if isinstance(flat, np.ndarray) else getattr(flat, "_on", None)
        return Params("grads", self._layout.named_views(flat), on)

    def __repr__(self) -> str:
        held = [name for name in ("x", "state", "params") if getattr(self, name) is not None]
        return f"{type(self).__name__}({', '.join(held)})"


class FunctionalGrads(Grads[Any]):
    """Gradients of a functional form: `Grads`, where each also has its argument's name.

    `params` has the keys w_ih, w_hh, b_ih and b_hh. What was left out, or is not an argument, is None.
    """

    __slots__ = ()

    @property
    def h0(self) -> Any:
        return None if self._states is None else self._states[0]

    @property
    def c0(self) -> Any:
        return None if self._states is None or len(self._states) == 1 else self._states[1]

    @property
    def w_ih(self) -> Any:
        return self._param("w_ih")

    @property
    def w_hh(self) -> Any:
        return self._param("w_hh")

    @property
    def b_ih(self) -> Any:
        return self._param("b_ih")

    @property
    def b_hh(self) -> Any:
        return self._param("b_hh")

    def _param(self, name: str) -> Array | None:
        return None if self.flat is None else self.params.get(name)
