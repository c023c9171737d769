"""What a stack of layers is apart from its weights: its cell, sizes and options, checked once."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import _check, _core, _cuda_module, _dtypes
from ._params import Layout
from ._typing import Int


class Cell(NamedTuple):
    """A row of the registry of cells."""

    name: str  # begins with its family's: gru_reset_before is a gru
    gates: int
    states: int  # h, then c

    @property
    def family(self) -> str:
        return self.name.partition("_")[0]


#: The registry itself is kept in C++.
CELLS = {row["name"]: Cell(row["name"], row["gates"], row["states"]) for row in _core.CELLS}


def gru_cell(reset_after: bool) -> str:
    return "gru" if _check.flag("gru", "reset_after", reset_after) else "gru_reset_before"


def rnn_cell(nonlinearity: str) -> str:
    return "rnn_" + _check.choice("rnn", "nonlinearity", nonlinearity, ("tanh", "relu"))


class Config(NamedTuple):
    """A checked configuration; its fields are the constructors' arguments."""

    cell: Cell
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    dtype: np.dtype[Any]
    device: str = "cpu"

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def layout(self) -> Layout:
        rows = self.cell.gates * self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.num_layers):
            inputs = self.directions * self.hidden_size if layer else self.input_size
            for suffix in ("", "_reverse")[: self.directions]:
                shapes[f"weight_ih_l{layer}{suffix}"] = (rows, inputs)
                shapes[f"weight_hh_l{layer}{suffix}"] = (rows, self.hidden_size)
                if self.bias:
                    shapes[f"bias_ih_l{layer}{suffix}"] = (rows,)
                    shapes[f"bias_hh_l{layer}{suffix}"] = (rows,)
        return Layout(shapes)

    def plain(self) -> dict[str, Any]:
        """Builtin values only, to be pickled."""
        return {**self._asdict(), "cell": self.cell.name, "dtype": self.dtype.name}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Config:
        return cls(**{**plain, "cell": CELLS[plain["cell"]], "dtype": _dtypes.named(plain["dtype"])})

    def __str__(self) -> str:
        """The arguments of a constructor's call, without those at their defaults."""
        parts = [str(self.input_size), str(self.hidden_size)]
        parts += [
            f"{name}={getattr(self, name)}"
            for name, usual in _DEFAULTS.items()
            if getattr(self, name) != usual
        ]
        parts.append(f"dtype={self.dtype}")
        return ", ".join(parts if self.device == "cpu" else [*parts, f"device={self.device!r}"])

    def moved(self, device: Any, dtype: Any) -> Config:
        """The same, elsewhere or in another dtype; None leaves it."""
        where = self.cell.family
        device = self.device if device is None else _cuda_module.parsed(where, device)
        return self._replace(
            device=device,
            dtype=_check.float_dtype(where, self.dtype if dtype is None else dtype, device),
        )


_MOST_LAYERS = 1 << 16  # each has names and views of its own, which more than this would fill the memory with
_DEFAULTS = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}


def checked(
    cell: str,
    input_size: Int,
    hidden_size: Int,
    num_layers: Int,
    bias: bool,
    batch_first: bool,
    dropout: float,
    bidirectional: bool,
    proj_size: Int,
    dtype: Any,
    device: Any,
) -> Config:
    row = CELLS[cell]
    where = row.family
    place = _cuda_module.parsed(where, device)
    config = Config(
        row,
        _check.integer(where, "input_size", input_size, 1),
        _check.integer(where, "hidden_size", hidden_size, 1),
        _check.integer(where, "num_layers", num_layers, 1, _MOST_LAYERS),
        _check.flag(where, "bias", bias),
        _check.flag(where, "batch_first", batch_first),
        _check.probability(where, "dropout", dropout),
        _check.flag(where, "bidirectional", bidirectional),
        _check.float_dtype(where, dtype, place),
        place,
    )
    if _check.integer(where, "proj_size", proj_size, 0):
        raise NotImplementedError(
            f"{where}: projections are not supported: proj_size must be 0, got {proj_size}"
        )
    _, I, H, L, *_ = config
    D = config.directions
    columns = (I + H) + (L - 1) * (D * H + H) + 2 * L * bias
    _check.array_bytes(where, "the parameters", D * row.gates * H * columns, config.dtype)
    return config


class Configured:
    """The read-only attributes that say what a layer or a frozen layer is."""

    __slots__ = ()
    _config: Config

    @property
    def cell(self) -> str:
        """Name of the cell in the registry, for example "lstm" or "gru_reset_before"."""
        return self._config.cell.name

    @property
    def input_size(self) -> int:
        """I, the number of inputs per step."""
        return self._config.input_size

    @property
    def hidden_size(self) -> int:
        """H, the number of hidden units per direction."""
        return self._config.hidden_size

    @property
    def num_layers(self) -> int:
        """L, the number of stacked layers."""
        return self._config.num_layers

    @property
    def bias(self) -> bool:
        """Whether there are b_ih and b_hh."""
        return self._config.bias

    @property
    def batch_first(self) -> bool:
        """Whether x and y are (B, T, ...) instead of (T, B, ...). States are (L*D, B, H) either way."""
        return self._config.batch_first

    @property
    def dropout(self) -> float:
        """Probability of zeroing an element between two layers, in training."""
        return self._config.dropout

    @property
    def bidirectional(self) -> bool:
        """Whether a second direction runs from each sequence's end to its start (D = 2)."""
        return self._config.bidirectional

    @property
    def proj_size(self) -> int:
        """P; always 0, since projections are not supported."""
        return 0

    @property
    def dtype(self) -> np.dtype[Any]:
        """numpy.float32 or float64, on a GPU also float16 or bfloat16: that of every array of this layer."""
        return self._config.dtype

    @property
    def device(self) -> str:
        """Where the parameters are and the kernels run: "cpu", or for example "cuda:0"."""
        return self._config.device
