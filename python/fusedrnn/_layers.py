"""The layers: parameters, and the passes over them. What a cell computes stands in reference.py and C++."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from math import sqrt
from typing import Any, ClassVar, Generic, Literal, Self

import numpy as np
import numpy.typing as npt

from . import _check, _config
from ._config import Config, Configured
from ._frozen import Frozen
from ._params import Params, gathered
from ._stack import ALL, stack_on
from ._tape import Grads, Tape
from ._typing import Array, FloatArray, Int, Lengths, Seed, State, StateLike, Wrt


class Layer(Configured, Generic[State]):
    """What LSTM, GRU and RNN have in common; use those.

    Layers pickle and deepcopy. A layer may be called from many threads at once while nobody writes its
    parameters.
    """

    cells: ClassVar[tuple[str, ...]] = ()  # the registered cells that the class offers

    def __init__(self, config: Config, seed: Seed) -> None:
        self._config = config
        if self.dropout and self.num_layers == 1:
            warnings.warn(
                f"{config.cell.family}: dropout acts between layers: "
                f"with num_layers=1, dropout={self.dropout} does nothing",
                stacklevel=3,
            )
        try:
            self._rng = np.random.default_rng(seed)
        except (TypeError, ValueError) as error:  # numpy's own texts name nothing
            text = f"{config.cell.family}: seed must be what numpy.random.default_rng takes, got {seed!r}"
            raise type(error)(text) from None
        size = config.layout().size
        bound = 1 / sqrt(self.hidden_size)
        flat: Array = self._rng.random(size, np.float64 if self.dtype == np.float64 else np.float32)
        flat *= 2 * bound
        flat -= bound
        self._bind(flat)

    def _bind(self, flat: Any) -> None:
        """Take `flat`, on the host or on the layer's own device, as the parameters."""
        config = self._config
        layout = config.layout()
        self._stack = stack_on(config.device, config, layout)
        if config.device != "cpu" and isinstance(flat, np.ndarray):
            flat = self._stack.on.own(flat, config.dtype)
        views = layout.named_views(flat)
        self._flat: Any = flat
        self._weights = tuple(views.values())
        self._params = Params(self._stack.where, views, self._stack.on)

    def __call__(
        self,
        x: FloatArray,
        state: StateLike = None,
        lengths: Lengths | None = None,
        *,
        out: Array | None = None,
    ) -> tuple[Array, State]:
        """Inference: outputs and final state; nothing is kept for a backward pass, and nothing is dropped.

        Parameters
        ----------
        x : ndarray, shape (T, B, I), (B, T, I) with batch_first, or (T, I)
            Any strides; may be read-only.
        state : ndarray or tuple of ndarray, shape (L*D, B, H), or (L*D, H) for x (T, I); optional
            Initial state: h, or (h, c) for an LSTM. None means zeros, for c or h alone too.
        lengths : integer array or list, shape (B,), or an int for x (T, I); optional
            Steps of each sequence, from 0 to T. What lies beyond in x is not read. There y is zero, and the
            final state is that of the sequence's last step; the reverse direction starts at that step.
        out : ndarray of y's shape, optional
            Where to write y: contiguous along its last axis, apart from every input.

        Returns
        -------
        y : ndarray, shape (T, B, D*H), (B, T, D*H) with batch_first, or (T, D*H)
            The last layer's h at every step, the directions side by side.
        state : ndarray or tuple of ndarray
            Final state, of the initial one's shape.

        Raises
        ------
        TypeError
            For an array of another dtype than the layer's, or no array at all.
        ValueError
            For a wrong shape, for lengths outside 0..T, and for an `out` that cannot be written.

        Notes
        -----
        On a CPU the kernels take denormal numbers for zero (below 1.2e-38 in float32, 2.2e-308 in float64):
        many cores need a hundred cycles for each. Outside of them the process's own mode holds.
        """
        stack = self._stack
        y, final, _ = stack.forward(
            self._weights, x, stack.pack_states("state", state), lengths, out, self._flat
        )
        return y, stack.unpack_states(final)

    def forward(
        self,
        x: FloatArray,
        state: StateLike = None,
        lengths: Lengths | None = None,
        seed: Int | None = None,
        *,
        out: Array | None = None,
    ) -> tuple[Array, State, Tape]:
        """Training: as calling the layer, with dropout between its layers, and a tape for `backward`.

        Parameters
        ----------
        x, state, lengths, out
            As in calling the layer. x must stay as it is until the backward pass.
        seed : int, optional
            Of this call's dropout masks, from 0 to 2**64 - 1; by default drawn from the layer's own
            generator. `tape.seed` has it.

        Returns
        -------
        y, state
            As in calling the layer.
        tape : Tape
            For one `backward` of this layer.
        """
        stack = self._stack
        if seed is not None:
            seed = _check.dropout_seed(stack.where, seed)
        dropout = self.dropout if self.num_layers > 1 else 0.0
        if seed is None and dropout:
            seed = int(self._rng.integers(0, 2**64, dtype=np.uint64))
        y, final, tape = stack.forward(
            self._weights, x, stack.pack_states("state", state), lengths, out, self._flat,
            training=True, dropout=dropout, seed=seed or 0,
        )  # fmt: skip
        return y, stack.unpack_states(final), tape  # type: ignore[return-value]

    def backward(
        self,
        tape: Tape,
        dy: FloatArray | None = None,
        dstate: StateLike = None,
        *,
        wrt: Wrt = ALL,
        retain: bool = False,
        accumulate_into: Grads[State] | None = None,
    ) -> Grads[State]:
        """Gradients of a loss from its gradients dy, of the outputs, and dstate, of the final state.

        Parameters
        ----------
        tape : Tape
            Of this layer's `forward`. It is used up, unless `retain` is true.
        dy : ndarray of y's shape, optional
            Any strides; None means zeros. Beyond a sequence's length it is not read.
        dstate : ndarray or tuple of ndarray of the state's shapes, optional
            None means zeros. One of dy and dstate must be given.
        wrt : collection of "x", "state", "params"
            What to compute; the rest of the work is left out.
        retain : bool
            Keep the tape for another backward.
        accumulate_into : Grads, optional
            Gradients of this layer that an earlier backward made: what `wrt` names is added to them, and they
            are returned.

        Raises
        ------
        RuntimeError
            If the tape is used up, or if x or the parameters are no longer what they were in the forward
            pass; on a GPU also if CUDA reports an error. If it does so while gradients are added to those of
            `accumulate_into` there, these are undefined, the error says so, and the tape is used up.
        TypeError, ValueError
            As in calling the layer; and for another layer's tape. Then the tape and `accumulate_into` are as
            they were.
        """
        return self._stack.backward(
            tape, dy, self._stack.pack_states("dstate", dstate), wrt, retain, accumulate_into, Grads
        )

    @property
    def params(self) -> Params:
        """Writable views into `flat_params` by PyTorch's names; assigning to a key copies in.

        On a GPU they are `DeviceArray`s.
        """
        return self._params

    @property
    def flat_params(self) -> Array:
        """All parameters in PyTorch's order: one writable buffer, the same for the layer's whole life.

        Assigning copies in, so `layer.flat_params -= step` works as on any array. On a GPU it is a
        `DeviceArray`, without arithmetic: a library updates it, as in
        `torch.from_dlpack(layer.flat_params).sub_(step)`.
        """
        return self._flat  # type: ignore[no-any-return]

    @flat_params.setter
    def flat_params(self, values: Array) -> None:
        if values is not self._flat:
            self._flat[...] = self._stack.on.shaped(
                self._stack.where, "flat_params", values, self._flat.dtype, self._flat.shape
            )

    def state_dict(self) -> dict[str, Array]:
        """Copies of the parameters by PyTorch's names."""
        return {name: view.copy() for name, view in self._params.items()}

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        """Copy parameters in from a mapping of PyTorch's names to arrays.

        Also the tensors of a PyTorch module's `state_dict()`: on the CPU whatever has `__array__`, on a GPU
        whatever has DLPack.

        Raises
        ------
        ValueError
            For missing or unexpected keys and for wrong shapes; then no parameter has changed.
        TypeError
            For another dtype than the layer's; likewise.
        """
        stack = self._stack
        self._flat[...] = gathered(stack.where, mapping, stack.layout, stack.dtype, stack.on)

    def to(self, device: Any = None, dtype: npt.DTypeLike | None = None) -> Self:
        """The layer on another device, or in another dtype: a new one, or this one where nothing changes.

        The parameters are copied, and rounded where the dtype is narrower; the generator of dropout's seeds
        goes on from where it is in both.

        Parameters
        ----------
        device : "cpu", "cuda" or "cuda:N"; optional
            "cuda" is the current device.
        dtype : optional
            numpy.float32 or float64, on a GPU also numpy.float16 or "bfloat16".

        Raises
        ------
        TypeError, ValueError
            For a device or dtype that there is not, and for float16 or bfloat16 on the CPU.
        RuntimeError
            If there is no GPU that can be used.
        """
        config = self._config.moved(device, dtype)
        if config == self._config:
            return self
        other = copy.copy(self)
        other._config = config
        other._rng = copy.deepcopy(self._rng)
        other._bind(stack_on(config.device, config, config.layout()).on.own(self._flat, config.dtype))
        return other

    def freeze(self) -> Frozen[State]:
        """An immutable layer for inference with the parameters as they are now."""
        return Frozen(self._config.plain(), self._flat)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for derived in ("_stack", "_weights", "_params"):
            del state[derived]
        state["_config"] = self._config.plain()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._config = Config.from_plain(state["_config"])
        self._bind(
            np.require(self._flat, requirements=["C", "A", "W"])  # out-of-band pickles may be read-only
            if isinstance(self._flat, np.ndarray)
            else self._flat
        )

    def __repr__(self) -> str:
        option = f", {self._option()}" if self.cell != self.cells[0] else ""
        return f"{type(self).__name__}({self._config}{option})"

    def _option(self) -> str:
        """The argument that chose a cell other than the class's first, as repr shows it."""
        return ""


class LSTM(Layer[tuple[Array, Array]]):
    """Long short-term memory: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000.

    With sigmoid σ and elementwise product ∘::

        i, f, o = σ(W_ih x + b_ih + W_hh h + b_hh)
        g       = tanh(W_ih x + b_ih + W_hh h + b_hh)      each with its own rows of W and b
        c'      = f∘c + i∘g
        h'      = o∘tanh(c')

    Equations, gate order (i, f, g, o), parameter names and defaults are PyTorch's. Sizes: T steps, B
    sequences, I inputs, H hidden units, L layers, D directions. The state is a pair (h, c), each (L*D, B, H).

    Parameters
    ----------
    input_size, hidden_size : int
        I and H.
    num_layers : int
        L: each layer after the first takes the one before's outputs, D*H wide.
    bias : bool
        Whether there are b_ih and b_hh.
    batch_first : bool
        x and y are (B, T, ...) instead of (T, B, ...); states are not affected.
    dropout : float
        Probability, below 1, of zeroing an element of the outputs between two layers in `forward`; the rest
        are scaled up.
    bidirectional : bool
        A second direction runs from each sequence's last step to its first: D = 2.
    proj_size : int
        Must be 0: projections are not supported.
    dtype : numpy.float32 or numpy.float64; on a GPU also numpy.float16 or "bfloat16"
        Of the parameters, and of every array that comes in and goes out.
    seed : int, SeedSequence, Generator or None
        For numpy.random.default_rng, which draws the parameters from U(-1/√H, 1/√H), and later the seeds of
        dropout.
    device : "cpu", "cuda" or "cuda:N"
        Where the parameters are and the kernels run. On a GPU a call takes numpy arrays, which it copies
        there and whose results it copies back, or arrays on that GPU (of PyTorch, CuPy, JAX; `DeviceArray`),
        which it uses without a copy and answers in kind. With PyTorch's and CuPy's it runs on their current
        stream, and `forward` returns without waiting for the GPU; with other libraries' every call waits.
        `lengths` are on the host.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong kind or out of range, and for sizes that cannot be addressed.
    NotImplementedError
        For a proj_size other than 0.
    MemoryError
        When there is no memory for the parameters.

    Notes
    -----
    The parameters of layer k are weight_ih_l{k} (4*H, I), for k > 0 (4*H, D*H), weight_hh_l{k} (4*H, H),
    bias_ih_l{k} and bias_hh_l{k} (4*H,); those of its second direction end in `_reverse`.

    Examples
    --------
    >>> lstm = fusedrnn.LSTM(8, 16, seed=0)
    >>> y, (h, c), tape = lstm.forward(numpy.zeros((5, 3, 8), numpy.float32))
    >>> grads = lstm.backward(tape, numpy.ones_like(y))
    >>> lstm.flat_params[:] -= 0.1 * grads.flat
    """

    cells = ("lstm",)

    def __init__(
        self,
        input_size: Int,
        hidden_size: Int,
        num_layers: Int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: Int = 0,
        *,
        dtype: npt.DTypeLike = np.float32,
        seed: Seed = None,
        device: Any = "cpu",
    ) -> None:
        config = _config.checked(
            "lstm", input_size, hidden_size, num_layers, bias, batch_first,
            dropout, bidirectional, proj_size, dtype, device,
        )  # fmt: skip
        super().__init__(config, seed)


class GRU(Layer[Array]):
    """Gated recurrent unit (Cho et al. 2014, arXiv:1406.1078).

    With sigmoid σ and elementwise product ∘::

        r  = σ(W_ir x + b_ir + W_hr h + b_hr)
        z  = σ(W_iz x + b_iz + W_hz h + b_hz)
        n  = tanh(W_in x + b_in + r∘(W_hn h + b_hn))    reset_after=True: cuDNN's, PyTorch's, Keras' default
        n  = tanh(W_in x + b_in + W_hn (r∘h) + b_hn)    reset_after=False: the original, ONNX's default
        h' = z∘h + (1-z)∘n

    The gate order is (r, z, n). The state is h, (L*D, B, H). Weights are (3*H, ...). Everything else is as in
    `LSTM`.

    Parameters
    ----------
    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size
    dtype, seed, device
        As in `LSTM`.
    reset_after : bool
        Whether the reset gate acts after the product with W_hn, or before it. The two are different
        functions.
    """

    cells = ("gru", "gru_reset_before")

    def __init__(
        self,
        input_size: Int,
        hidden_size: Int,
        num_layers: Int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: Int = 0,
        *,
        reset_after: bool = True,
        dtype: npt.DTypeLike = np.float32,
        seed: Seed = None,
        device: Any = "cpu",
    ) -> None:
        cell = _config.gru_cell(reset_after)
        config = _config.checked(
            cell, input_size, hidden_size, num_layers, bias, batch_first,
            dropout, bidirectional, proj_size, dtype, device,
        )  # fmt: skip
        super().__init__(config, seed)

    @property
    def reset_after(self) -> bool:
        """Whether the reset gate acts after the product with W_hn."""
        return self.cell == "gru"

    def _option(self) -> str:
        return f"reset_after={self.reset_after}"


class RNN(Layer[Array]):
    """Simple recurrent network (Elman 1990)::

        h' = tanh(W_ih x + b_ih + W_hh h + b_hh)           or relu in place of tanh

    The state is h, (L*D, B, H). Weights are (H, ...). Everything else is as in `LSTM`.

    Parameters
    ----------
    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size
    dtype, seed, device
        As in `LSTM`.
    nonlinearity : "tanh" or "relu"
        What is applied to the sum.
    """

    cells = ("rnn_tanh", "rnn_relu")

    def __init__(
        self,
        input_size: Int,
        hidden_size: Int,
        num_layers: Int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: Int = 0,
        *,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        dtype: npt.DTypeLike = np.float32,
        seed: Seed = None,
        device: Any = "cpu",
    ) -> None:
        cell = _config.rnn_cell(nonlinearity)
        config = _config.checked(
            cell, input_size, hidden_size, num_layers, bias, batch_first,
            dropout, bidirectional, proj_size, dtype, device,
        )  # fmt: skip
        super().__init__(config, seed)

    @property
    def nonlinearity(self) -> str:
        """ "tanh" or "relu"."""
        return self.cell.partition("_")[2]

    def _option(self) -> str:
        return f"nonlinearity={self.nonlinearity!r}"
