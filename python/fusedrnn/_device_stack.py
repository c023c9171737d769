"""A stack on a GPU: takes arrays of any library, runs `Stack`'s passes on them, gives that library's back."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from . import _check
from ._device_array import DeviceArray, order
from ._device_call import Call
from ._stack import FINAL_GRADS, STATES, Stack, States
from ._tape import Grads, Tape
from ._typing import Array, Wrt

G = TypeVar("G", bound=Grads[Any])


class DeviceStack(Stack):
    """Arrays that come in are all numpy's, and are copied, or all lie on the GPU, and are not."""

    __slots__ = ()

    def forward(
        self,
        weights: tuple[Any, ...],
        x: Any,
        states: States | None,
        lengths: Any,
        out: Any,
        flat: Any = None,
        panels: Any = None,
        training: bool = False,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> tuple[Any, tuple[Any, ...], Tape | None]:
        with Call(self.on, self.where, "x", x) as call:
            x = call.take("x", x, self.dtype)
            states = call.take_each(STATES, states, self.dtype)
            taken_out: Any = None if out is None else call.take_out("out", out, self.dtype)
            order(weights if panels is None else (*weights, panels), call.stream)
            y: Any
            final: Any
            y, final, tape = super().forward(
                weights, x, states, lengths, taken_out, flat, panels, training, dropout, seed
            )
            x._source = None  # the tape need not keep what was copied
            if out is not None and call.host:
                call.put(taken_out)
            return (call.give(y) if out is None else out), tuple([call.give(s) for s in final]), tape

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
        given = {"dy": dy, **dict(zip(FINAL_GRADS, dstates or (), strict=False))}
        name, first = next(((n, g) for n, g in given.items() if g is not None), ("dy", None))
        with Call(self.on, self.where, name, first) as call:
            dy = call.take("dy", dy, self.dtype)
            dstates = call.take_each(FINAL_GRADS, dstates, self.dtype)
            held = self._taken(call, into, wrt, kind)
            if isinstance(tape, Tape):
                weights: Any = tape._weights
                order(weights, call.stream)
            grads = super().backward(tape, dy, dstates, wrt, retain, held, kind)
            if into is not None:
                if call.host:
                    for written in _arrays(grads):
                        call.put(written)
                return into
            states = None if grads._states is None else tuple([call.give(s) for s in grads._states])
            x, flat = (None if a is None else call.give(a) for a in (grads.x, grads.flat))
            return kind(self.layout, x, states, flat)

    def _failed(self, error: BaseException, tape: Tape, grads: Any, retain: bool) -> None:
        callers = all(a._source is None for a in _arrays(grads))  # not copies of numpy's, which nobody sees
        if getattr(error, "added_in_part", False) and callers:
            error.args = (f"{error}; accumulate_into has been added to in part, and must be made anew",)
            tape._spoil()
        else:
            super()._failed(error, tape, grads, retain)

    def stream(self, weights: tuple[Any, ...], flat: Any, panels: Any, batch: int) -> Any:
        return DeviceStream(self, weights, flat, panels, batch)

    def _taken(self, call: Call, into: Any, wrt: Any, kind: type[G]) -> Any:
        """`into` on the GPU, as far as it is to be written; whether it fits is checked with the rest."""
        if type(into) is not kind:
            return into
        names = (wrt,) if isinstance(wrt, str) else tuple(wrt) if isinstance(wrt, Iterable) else ()
        where = "accumulate_into's gradient of"

        def take(what: str, array: Any) -> Any:
            return call.take(f"{where} {what}", array, self.dtype) if what in names else array

        states = into._states and tuple([take("state", s) for s in into._states])
        return kind(into._layout, take("x", into.x), states, take("params", into.flat))


def _arrays(grads: Grads[Any]) -> Iterable[DeviceArray]:
    held: Any = (grads.x, *(grads._states or ()), grads.flat)
    return (a for a in held if isinstance(a, DeviceArray))


class DeviceStream:
    """Steps of a stack on a GPU, one launch of everything for each: `_core.Stream`'s sibling.

    Unlike there, a step allocates, and with numpy's arrays it waits for the GPU.
    """

    def __init__(
        self, stack: Stack, weights: tuple[Any, ...], flat: Any, panels: Any, batch_size: int
    ) -> None:
        self._stack, self._weights, self._flat, self._panels = stack, weights, flat, panels
        self.batch_size = batch_size
        self._state: Any = None  # a tuple of arrays on the GPU; None for zeros
        self._busy = threading.Lock()

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(
                f"stream.{what}: another thread is using this stream; give each thread a stream of its own"
            )
        try:
            yield
        finally:
            self._busy.release()

    def step(self, x: Any, out: Any = None) -> Any:
        with self._alone("step"):
            return self._step(x, out)

    def _step(self, x: Any, out: Any) -> Any:
        stack, where, B = self._stack, "stream.step", self.batch_size
        with Call(stack.on, where, "x", x) as call:
            taken = call.take("x", x, stack.dtype)
            taken = stack.on.array(where, "x", taken, stack.dtype)
            flat = taken.ndim == 1
            if taken.shape != ((stack.inputs,) if flat and B == 1 else (B, stack.inputs)):
                one = f"({stack.inputs},) or " if B == 1 else ""
                raise _check.shape_error(where, "x", f"{one}({B}, {stack.inputs})", taken.shape)
            shape = (stack.hidden,) if flat else (B, stack.hidden)
            into: Any = None
            if out is not None:
                into = stack.on.out(
                    where, call.take_out("out", out, stack.dtype), stack.dtype, shape, [("x", taken)]
                )
                if not into.flags.c_contiguous:
                    raise ValueError("stream.step: out must be C-contiguous and aligned")
            order((self._flat, self._panels, *(self._state or ())), call.stream)
            taken._source = None
            y: Any
            y, self._state, _ = Stack.forward(
                stack, self._weights, stack.on.ready(taken).reshape(1, B, stack.inputs), self._state, None,
                None if into is None else into.reshape(1, B, stack.hidden), self._flat, self._panels,
            )  # fmt: skip
            if out is None:
                return call.give(y.reshape(shape))
            call.put(into)
            return out

    def set_state(self, state: Any) -> None:
        with self._alone("state"), Call(self._stack.on, self._stack.where, "state", None):
            self._state = None if state is None else tuple(
                [self._zeros() if s is None else s.copy() for s in state]
            )

    @property
    def state(self) -> tuple[DeviceArray, ...]:
        with self._alone("state"):
            if self._state is None:
                return tuple([self._zeros() for _ in range(self._stack.states)])
            return tuple([s.copy() for s in self._state])

    def _zeros(self) -> Any:
        import numpy as np

        from ._dtypes import bits

        stack = self._stack
        host: Array = np.zeros((stack.rows, self.batch_size, stack.hidden), bits(stack.dtype))
        return stack.on.upload(host, stack.dtype)
