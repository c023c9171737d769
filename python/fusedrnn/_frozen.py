"""Inference: a frozen layer, whose weights are packed once, and a stream, its state between single steps."""

from __future__ import annotations

from typing import Any, Generic, NoReturn, Protocol, Self

import numpy.typing as npt

from . import _check
from ._config import Config, Configured
from ._params import Params
from ._stack import Stack, stack_on
from ._typing import Array, FloatArray, Int, Lengths, State, StateLike


class Frozen(Configured, Generic[State]):
    """An immutable layer for inference, made by `layer.freeze()`.

    It has its own copy of the weights, and one more packed as the kernels read them. It may be called from
    many threads at once. It pickles (the weights; they are packed again when loaded); copying it returns
    itself.

    Attributes
    ----------
    params : Params
        Read-only views of the weights by PyTorch's names.
    nbytes : int
        Bytes of the weights and of their packed copy.
    """

    __slots__ = ("_config", "_flat", "_panels", "_params", "_stack", "_weights")

    _flat: Any
    _panels: Any  # a _core.Panels, or a DeviceArray
    _params: Params
    _stack: Stack
    _weights: tuple[Array, ...]

    def __init__(self, config: dict[str, Any], flat_params: Any) -> None:
        checked = Config.from_plain(config)
        layout = checked.layout()
        stack = stack_on(checked.device, checked, layout)
        flat = stack.on.read_only(stack.on.own(flat_params, checked.dtype))
        views = layout.named_views(flat)
        weights = tuple(views.values())
        for name, value in (
            ("_config", checked),
            ("_flat", flat),
            ("_stack", stack),
            ("_weights", weights),
            ("_params", Params(stack.where, views, stack.on)),
            ("_panels", stack.on.pack(stack.spec, weights)),
        ):
            object.__setattr__(self, name, value)

    def __call__(
        self,
        x: FloatArray,
        state: StateLike = None,
        lengths: Lengths | None = None,
        *,
        out: Array | None = None,
    ) -> tuple[Array, State]:
        """y and the final state, bit for bit the layer's; arguments and errors are the layer's, too."""
        stack = self._stack
        y, final, _ = stack.forward(
            self._weights, x, stack.pack_states("state", state), lengths, out, self._flat, self._panels
        )
        return y, stack.unpack_states(final)

    def stream(self, batch_size: Int = 1) -> Stream[State]:
        """A new stream of `batch_size` sequences that advance together, with zeros as its state.

        Raises
        ------
        ValueError
            For a bidirectional layer, whose second direction starts at the end of a sequence, and unless
            batch_size is positive.
        """
        return Stream(self, batch_size)

    def state_dict(self) -> dict[str, Array]:
        """Copies of the weights by PyTorch's names."""
        return {name: view.copy() for name, view in self._params.items()}

    @property
    def params(self) -> Params:
        """Read-only views of the weights by PyTorch's names."""
        return self._params

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and of their packed copy."""
        return int(self._flat.nbytes + self._panels.nbytes)

    def to(self, device: Any = None, dtype: npt.DTypeLike | None = None) -> Frozen[State]:
        """This on another device, or in another dtype, as `layer.to` has it; itself where nothing changes."""
        config = self._config.moved(device, dtype)
        if config == self._config:
            return self
        return type(self)(config.plain(), self._flat)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a frozen layer cannot be changed: {name} is read-only")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a frozen layer cannot be changed: {name} is read-only")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._config.plain(), self._flat)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __repr__(self) -> str:
        return f"Frozen({self.cell}: {self._config})"


class _Step(Protocol):
    def __call__(self, x: FloatArray, out: Array | None = None) -> Array: ...


class Stream(Generic[State]):
    """The state of sequences that a frozen layer advances step by step, made by `frozen.stream(batch_size)`.

    T steps give the same bits as one call on all T (on a GPU: nearly the same numbers; there a step also
    allocates). A stream belongs to one thread: a second step while one
    runs raises a RuntimeError. It pickles, and deepcopy continues from the same state; both streams then
    share the frozen layer.
    """

    __slots__ = {  # noqa: RUF023
        "step": """step(x, out=None) -> h

            Advance by one step.

            x is (B, I), and the result h, the last layer's output, is (B, H). With batch_size 1, x may be
            (I,) and h is then (H,). A new array is returned unless `out` is given, an array of h's shape:
            then nothing is allocated. Raises a ValueError for another shape and for an `out` that is
            read-only or overlaps x, a TypeError for another dtype, and a RuntimeError if another thread is in
            a step of this stream.
            """,
        "_frozen": None,
        "_kernel": None,
    }

    step: _Step
    _frozen: Frozen[State]
    _kernel: Any

    def __init__(self, frozen: Frozen[State], batch_size: Int = 1) -> None:
        stack = frozen._stack
        if frozen.bidirectional:
            raise ValueError(
                f"{stack.where}: a bidirectional layer cannot stream: "
                "its second direction starts at a sequence's last step"
            )
        batch = _check.integer(stack.where, "batch_size", batch_size, 1)
        _check.array_bytes(
            stack.where,
            f"the state at batch_size {batch}",
            batch * max(stack.rows * stack.hidden, stack.inputs),
            stack.dtype,
        )
        self._frozen = frozen
        self._kernel = stack.stream(frozen._weights, frozen._flat, frozen._panels, batch)
        self.step = self._kernel.step  # the compiled method itself: no Python between a step and its kernel

    @property
    def batch_size(self) -> int:
        """B, the number of sequences."""
        return int(self._kernel.batch_size)

    @property
    def state(self) -> State:
        """A copy of the state: h (L, B, H), or (h, c) for an LSTM. It can be set, None meaning zeros."""
        return self._frozen._stack.unpack_states(self._kernel.state)  # type: ignore[no-any-return]

    @state.setter
    def state(self, value: StateLike) -> None:
        stack = self._frozen._stack
        self._kernel.set_state(
            stack.kernel_states(("h", "c"), stack.pack_states("state", value), self._kernel.batch_size)
        )

    def reset(self) -> None:
        """Set the state to zeros."""
        self._kernel.set_state(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._frozen, self._kernel.batch_size), self._kernel.state

    def __setstate__(self, states: tuple[Array, ...]) -> None:
        self._kernel.set_state(states)

    def __repr__(self) -> str:
        return f"Stream({self._frozen!r}, batch_size={self.batch_size})"
