"""The one way into the kernels: checks a call's arguments against what a layer is, then runs them.

The kernels take x (T, B, I), y (T, B, D*H) and states (L*D, B, H). A caller may leave out the batch axis or
put it first, and leaves out the axis of layers in the functional forms: those are views, made here and
nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from numpy import ndarray

from . import _check, _core, _host
from ._config import Config
from ._params import Layout
from ._tape import Grads, Tape
from ._threads import local_threads
from ._typing import Array, Wrt

ALL: Wrt = ("x", "state", "params")
STATES = ("h0", "c0")
FINAL_GRADS = ("dh_n", "dc_n")

States = tuple[Array | None, ...]
G = TypeVar("G", bound=Grads[Any])


class Stack:
    """Keeps no weights and no state, so threads can share it. A layer knows its tapes by its own."""

    __slots__ = (
        "batch_first", "dtype", "functional", "hidden", "inputs", "layout",
        "on", "rows", "spec", "states", "where", "width",
    )  # fmt: skip

    def __init__(
        self, config: Config, layout: Layout, *, reverse: bool = False, functional: bool = False,
        on: Any = _host
    ) -> None:
        """`functional`: one layer in one direction, whose states have no axis of layers.

        `on`: where the arrays are and the kernels run, the module `_host` or a `_device.Device`.
        """
        cell, inputs, hidden, num_layers, bias, batch_first, *_ = config
        self.where = cell.family
        self.states = cell.states
        self.on = on
        self.spec: Any = on.Spec(
            cell.name, config.dtype, inputs, hidden, num_layers, config.directions, bias, reverse
        )
        self.layout = layout
        self.dtype = config.dtype
        self.inputs = inputs
        self.hidden = hidden
        self.width = config.directions * hidden
        self.rows = num_layers * config.directions
        self.batch_first = batch_first
        self.functional = functional

    def forward(
        self,
        weights: tuple[Array, ...],
        x: Any,
        states: States | None,
        lengths: Any,
        out: Any,
        flat: Array | None = None,
        panels: Any = None,
        training: bool = False,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> tuple[Array, tuple[Array, ...], Tape | None]:
        """y, the final states and, of a training forward, the tape.

        `weights` are C-contiguous, except a functional form's, which are made so here; `flat`, where there is
        one, is the buffer that they are all in. No kernel is launched before all is checked.
        """
        where, dtype, on = self.where, self.dtype, self.on
        x = on.array(where, "x", x, dtype)
        shape = x.shape
        batched = len(shape) == 3
        if (not batched and len(shape) != 2) or shape[-1] != self.inputs:
            order = "(B, T, {0}) or (T, {0})" if self.batch_first else "(T, B, {0}) or (T, {0})"
            raise _check.shape_error(where, "x", order.format(self.inputs), shape)
        x = self._time_major(x, batched)
        steps, batch, _ = x.shape
        checked_states = self.checked_states(STATES, states, batch, batched)
        given_lengths = lengths
        if lengths is not None:
            lengths = on.lengths(where, lengths, steps, (batch,) if batched else ())
        y_shape = (*shape[:-1], self.width)
        if out is None:
            y = self._empty(y_shape)
        else:
            inputs = _named_inputs(x, given_lengths, states, weights if flat is None else (flat,))
            y = on.out(where, out, dtype, y_shape, inputs)
        final_shape = self._state_shape(batch, batched)
        final = tuple([self._empty(final_shape) for _ in range(self.states)])

        _core.set_local_threads(local_threads())
        kernel_tape = on.forward(
            self.spec,
            tuple([on.ready(w) for w in weights]) if self.functional else weights,
            x,
            self._ready(checked_states, batch),
            lengths,
            self._time_major(y, batched),
            self._kernel_shaped(final, batch),
            training,
            dropout,
            seed,
            panels,
        )
        tape = None
        if kernel_tape is not None:
            kept = x[...] if isinstance(x, ndarray) else x  # a view: the shape of the caller's own may change
            tape = Tape(self, kernel_tape, weights, kept, batched, seed if dropout else None)
        return (y if out is None else out), final, tape

    def backward(
        self,
        tape: Any,
        dy: Any,
        dstates: States | None,
        wrt: Wrt,
        retain: bool,
        into: G | None,
        kind: type[G],
    ) -> G:
        """Gradients of what `wrt` names, added to those in `into`, or else in new arrays."""
        where, on = self.where, self.on
        if not isinstance(tape, Tape):
            raise TypeError(f"{where}: tape must be a Tape, got {type(tape).__name__}")
        if tape._stack is not self:
            raise ValueError(f"{where}: tape must come from this layer's own forward, got another layer's")
        kernel_tape, x, weights = tape._opened(where)
        batched = tape._batched
        steps, batch, _ = x.shape
        wanted = _wanted(where, wrt)
        if dy is not None:
            y_shape = self._caller_shape(steps, batch, self.width, batched)
            dy = on.shaped(where, "dy", dy, self.dtype, y_shape)
            dy = self._time_major(dy, batched)
        dstates = self.checked_states(FINAL_GRADS, dstates, batch, batched)
        if dy is None and dstates is None:
            raise ValueError(f"{where}: dy or a gradient of the final state must be given, got None for all")

        if into is None:
            grads = self._new_grads(kind, wanted, steps, batch, batched)
        else:
            grads = self._checked_into(into, kind, wanted, steps, batch, batched)
            for name, read in (("x", x), ("dy", dy), *zip(FINAL_GRADS, dstates or (), strict=False)):
                for want, held in zip(wanted, (grads.x, grads._states, grads.flat), strict=True):
                    if want and read is not None and any(on.overlap(read, g) for g in _tuple(held)):
                        raise ValueError(f"{where}: accumulate_into must not share memory with {name}")

        want_x, want_state, want_params = wanted
        _core.set_local_threads(local_threads())
        passes = kernel_tape.passes
        if not retain:
            tape._claim(where)
        try:
            on.backward(
                self.spec,
                tuple([on.ready(w) for w in weights]),
                kernel_tape,
                x,
                dy,
                self._ready(dstates, batch),
                self._time_major(grads.x, batched) if want_x else None,
                self._kernel_shaped(grads._states, batch) if want_state and grads._states else None,
                self.layout.views(grads.flat) if want_params else None,
                into is not None,
            )
        except BaseException as error:
            # What a signal's handler raises, Ctrl-C's too, comes when the pass has ended.
            if into is not None and kernel_tape.passes != passes:
                tape._spoil()
            else:
                self._failed(error, tape, grads, retain)
            raise
        if not retain:
            tape._close()
        return grads

    def _failed(self, error: BaseException, tape: Tape, grads: Any, retain: bool) -> None:
        """A backward pass failed, and its tape is as good as before."""
        if not retain:
            tape._unclaim()

    def stream(self, weights: tuple[Array, ...], flat: Any, panels: Any, batch: int) -> Any:
        return _core.Stream(self.spec, panels, batch)

    # A cell's states are a tuple inside; outside, h stands alone where there is no c

    def pack_states(self, name: str, state: Any) -> States | None:
        if state is None:
            return None
        if self.states == 1:
            return (state,)
        if not isinstance(state, (tuple, list)) or len(state) != self.states:
            got = f"{len(state)} values" if isinstance(state, (tuple, list)) else type(state).__name__
            raise TypeError(f"{self.where}: {name} must be a tuple (h, c) or None, got {got}")
        return tuple(state)

    def unpack_states(self, states: tuple[Array, ...]) -> Any:
        return states if len(states) > 1 else states[0]

    def kernel_states(self, names: tuple[str, ...], states: States | None, batch: int) -> States | None:
        """Checked states, C-contiguous and (L*D, B, H); None where all are zeros."""
        return self._ready(self.checked_states(names, states, batch), batch)

    def checked_states(
        self, names: tuple[str, ...], states: States | None, batch: int, batched: bool = True
    ) -> States | None:
        if states is None or all([state is None for state in states]):
            return None
        check, shape = self.on.shaped, self._state_shape(batch, batched)
        return tuple(
            [
                None if state is None else check(self.where, name, state, self.dtype, shape)
                for name, state in zip(names, states, strict=False)
            ]
        )

    def _ready(self, states: States | None, batch: int) -> States | None:
        if states is None:
            return None
        ready, shape = self.on.ready, (self.rows, batch, self.hidden)
        taken = [None if state is None else ready(state) for state in states]
        return tuple([s if s is None or s.ndim == 3 else s.reshape(shape) for s in taken])

    # The caller's shapes and the kernels'

    def _time_major(self, a: Array, batched: bool) -> Array:
        if not batched:
            return a[:, None]
        return a.swapaxes(0, 1) if self.batch_first else a

    def _caller_shape(self, steps: int, batch: int, width: int, batched: bool) -> tuple[int, ...]:
        if not batched:
            return (steps, width)
        return (batch, steps, width) if self.batch_first else (steps, batch, width)

    def _state_shape(self, batch: int, batched: bool) -> tuple[int, ...]:
        shape = (batch, self.hidden) if batched else (self.hidden,)
        return shape if self.functional else (self.rows, *shape)

    def _kernel_shaped(self, states: tuple[Array, ...], batch: int) -> tuple[Array, ...]:
        if states[0].ndim == 3:
            return states
        return tuple([s.reshape(self.rows, batch, self.hidden) for s in states])

    def _empty(self, shape: tuple[int, ...]) -> Array:
        try:
            return self.on.empty(shape, self.dtype)  # type: ignore[no-any-return]
        except ValueError:  # numpy's own text names no argument
            raise ValueError(
                f"{self.where}: x must be small enough for its results, got one of shape {shape}, "
                "more than can be addressed"
            ) from None

    def _new_grads(
        self, kind: type[G], wanted: tuple[bool, bool, bool], steps: int, batch: int, batched: bool
    ) -> G:
        dx, dstates, flat = None, None, None
        if wanted[0]:  # in the caller's shape, laid out as the kernels write it
            if batched and self.batch_first:
                dx = self._empty((steps, batch, self.inputs)).swapaxes(0, 1)
            else:
                dx = self._empty(self._caller_shape(steps, batch, self.inputs, batched))
        if wanted[1]:
            shape = self._state_shape(batch, batched)
            dstates = tuple([self._empty(shape) for _ in range(self.states)])
        if wanted[2]:
            flat = self._empty((self.layout.size,))
        return kind(self.layout, dx, dstates, flat)

    def _checked_into(
        self, into: Any, kind: type[G], wanted: tuple[bool, bool, bool], steps: int, batch: int, batched: bool
    ) -> G:
        """`into`, if it is of this layer and what is wanted is there and laid out as the kernels write it."""
        where = self.where
        if type(into) is not kind:
            raise TypeError(f"{where}: accumulate_into must be a {kind.__name__}, got {type(into).__name__}")
        if into._layout is not self.layout and into._layout.shapes != self.layout.shapes:
            raise ValueError(f"{where}: accumulate_into must hold gradients of the same parameters")
        state_shape = self._state_shape(batch, batched)
        for want, name, held, shape in (
            (wanted[0], "x", into.x, self._caller_shape(steps, batch, self.inputs, batched)),
            (wanted[1], "state", into._states, state_shape),
            (wanted[2], "params", into.flat, (self.layout.size,)),
        ):
            if want and held is None:
                raise ValueError(
                    f"{where}: accumulate_into has no gradient of {name}; leave {name!r} out of wrt"
                )
            for array in _tuple(held) if want else ():
                self.on.shaped(where, f"accumulate_into's gradient of {name}", array, self.dtype, shape)
                own = self.on.laid_out(array)
                fits = own.flags.writeable and _check.holds_rows(own) if name == "x" else own.flags.carray
                if not fits:
                    an = "an" if own.flags.writeable else "a read-only"
                    raise ValueError(
                        f"{where}: accumulate_into's gradient of {name} must be what backward made, "
                        f"got {an} array with strides {own.strides}"
                    )
        return into


def stack_on(place: str, config: Config, layout: Layout, **options: bool) -> Stack:
    """The Stack for "cpu" or "cuda:N"."""
    if place == "cpu":
        return Stack(config, layout, **options)
    from ._device import Device
    from ._device_stack import DeviceStack

    return DeviceStack(config, layout, on=Device(int(place.partition(":")[2])), **options)


def _tuple(arrays: Any) -> tuple[Array, ...]:
    return arrays if isinstance(arrays, tuple) else (arrays,)


def _wanted(where: str, wrt: Wrt) -> tuple[bool, bool, bool]:
    if wrt is ALL:
        return True, True, True
    names = (wrt,) if isinstance(wrt, str) else tuple(wrt) if isinstance(wrt, Iterable) else ()
    if not names or any(name not in ALL for name in names):
        raise ValueError(f"{where}: wrt must name some of 'x', 'state' and 'params', got {wrt!r}")
    return "x" in names, "state" in names, "params" in names


def _named_inputs(
    x: Array, lengths: Any, states: States | None, weights: tuple[Array, ...]
) -> Iterator[tuple[str, Array | None]]:
    yield "x", x
    yield "lengths", lengths if isinstance(lengths, ndarray) else None
    yield from zip(STATES, states or (), strict=False)
    yield from (("the parameters", w) for w in weights)
