"""What several test files share: layers by the cell's name, their reference, and the bound on the difference."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil, log2

import numpy as np
import pytest

import fusedrnn as fr

# cell: class, options that choose it, name of the functional forms
OFFERED = {
    "lstm": (fr.LSTM, {}, "lstm"),
    "gru": (fr.GRU, {"reset_after": True}, "gru"),
    "gru_reset_before": (fr.GRU, {"reset_after": False}, "gru"),
    "rnn_tanh": (fr.RNN, {"nonlinearity": "tanh"}, "rnn"),
    "rnn_relu": (fr.RNN, {"nonlinearity": "relu"}, "rnn"),
}


@pytest.fixture(params=OFFERED)
def cell(request) -> str:
    return request.param


@pytest.fixture(params=["float32", "float64"])
def dtype(request) -> np.dtype:
    return np.dtype(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240607)


@pytest.fixture
def normal(rng) -> Callable[..., np.ndarray]:
    """normal(*shape, dtype=float32): an array from N(0, 1)."""
    return lambda *shape, dtype=np.float32: rng.standard_normal(shape).astype(dtype)


@pytest.fixture
def make_layer() -> Callable[..., fr.Layer]:
    """make_layer(cell, ...): the layer that offers a cell, seeded."""

    def make(cell: str, *args, **options) -> fr.Layer:
        kind, chosen, _ = OFFERED[cell]
        return kind(*args, **{"seed": 1, **chosen, **options})

    return make


@pytest.fixture
def functions() -> Callable[[str, object], dict[str, Callable]]:
    """functions(cell, module): a module's four functions for a cell, with the cell chosen, by their suffix."""

    def choose(cell: str, module) -> dict[str, Callable]:
        _, chosen, name = OFFERED[cell]

        def chosen_form(form: Callable) -> Callable:
            return lambda *args, **kwargs: form(*args, **chosen, **kwargs)

        forms = {s: chosen_form(getattr(module, f"{name}{s}")) for s in ("", "_forward", "_cell")}
        return {**forms, "_backward": getattr(module, f"{name}_backward")}

    return choose


def as_tuple(state) -> tuple:
    return state if isinstance(state, tuple) else (state,)


@pytest.fixture
def states_of() -> Callable[[object], tuple]:
    """A state as a tuple, whatever the cell."""
    return as_tuple


@pytest.fixture
def reference_of() -> Callable:
    """reference_of(layer, x, state, lengths): y, final states and tape of a time-major layer, without dropout."""

    def run(layer, x, state=None, lengths=None):
        return fr.reference.stack_forward(
            layer.cell, x, tuple(layer.params.values()), None if state is None else as_tuple(state), lengths,
            layer.num_layers, 2 if layer.bidirectional else 1, layer.bias,
        )  # fmt: skip

    return run


@pytest.fixture
def close() -> Callable[..., None]:
    """close(got, want, terms, scale=1, backward=False): got is the float64 `want` but for rounding.

    ||got - want|| <= 4 (8 backward) * max(4, ceil(log2 terms)) * eps * max(||want||, scale * sqrt(n)): `terms` is the
    number of products behind an element, over all steps, and `scale` the natural size of one.
    """

    def check(got, want, terms: int, scale: float = 1.0, backward: bool = False) -> None:
        assert got.shape == want.shape
        error = np.abs(got.astype(np.float64) - want)
        factor = (8 if backward else 4) * max(4, ceil(log2(max(terms, 1))))
        natural = max(np.linalg.norm(want), scale * np.sqrt(want.size))
        bound = factor * np.finfo(got.dtype).eps * natural
        if not np.linalg.norm(error) <= bound:
            worst = np.unravel_index(np.nanargmax(error), error.shape)
            pytest.fail(
                f"off by {np.linalg.norm(error):.3g}, bound {bound:.3g}; "
                f"worst at {tuple(map(int, worst))}: got {got[worst]!r}, want {want[worst]!r}"
            )

    return check


@pytest.fixture
def unchanged() -> Callable:
    """unchanged(*arrays): a block after which every byte of them must be what it was."""

    @contextmanager
    def block(*arrays: np.ndarray) -> Iterator[None]:
        before = [a.tobytes() for a in arrays]
        yield
        for index, (array, was) in enumerate(zip(arrays, before, strict=True)):
            assert array.tobytes() == was, f"array {index} was written"

    return block
