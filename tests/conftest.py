"""Fixtures of the API's tests: cells and dtypes, arrays, layers and functions by the cell's name."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from bound import OFFERED, as_tuple, assert_close
from devices import exact, host, needs_gpu

import fusedrnn as fr


def pytest_terminal_summary(terminalreporter):
    """Why tests were skipped: each reason once, where -rs has a line for every place."""
    skipped = terminalreporter.stats.get("skipped", ())
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")


@pytest.fixture(params=OFFERED)
def cell(request) -> str:
    return request.param


@pytest.fixture(params=["float32", "float64"])
def dtype(request) -> np.dtype:
    return np.dtype(request.param)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request) -> str:
    return request.param


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
    """functions(cell, module): a module's four functions by their suffix, with the cell chosen."""

    def choose(cell: str, module) -> dict[str, Callable]:
        _, chosen, name = OFFERED[cell]

        def chosen_form(form: Callable) -> Callable:
            return lambda *args, **kwargs: form(*args, **chosen, **kwargs)

        forms = {s: chosen_form(getattr(module, f"{name}{s}")) for s in ("", "_forward", "_cell")}
        return {**forms, "_backward": getattr(module, f"{name}_backward")}

    return choose


@pytest.fixture
def reference_of() -> Callable:
    """reference_of(layer, x, state, lengths): y, final states and tape, time-major and without dropout."""

    def run(layer, x, state=None, lengths=None):
        return fr.reference.stack_forward(
            layer.cell, x, tuple(map(exact, layer.params.values())),
            None if state is None else as_tuple(state), lengths,
            layer.num_layers, 2 if layer.bidirectional else 1, layer.bias,
        )  # fmt: skip

    return run


@pytest.fixture
def close() -> Callable[..., None]:
    """close(got, want, terms, scale=1, backward=False): got is `want` but for rounding; see bound.py."""

    def check(got, want, terms: int, scale: float = 1.0, backward: bool = False) -> None:
        assert_close("result", got, want, terms, scale, backward)

    return check


@pytest.fixture
def unchanged() -> Callable:
    """unchanged(*arrays): a block after which every byte of them must be what it was."""

    @contextmanager
    def block(*arrays: np.ndarray) -> Iterator[None]:
        before = [host(a).tobytes() for a in arrays]
        yield
        for index, (array, was) in enumerate(zip(arrays, before, strict=True)):
            assert host(array).tobytes() == was, f"array {index} was written"

    return block
