"""Fused RNN, LSTM and GRU kernels, forward and backward, for NumPy arrays.

>>> import numpy, fusedrnn
>>> lstm = fusedrnn.LSTM(8, 16)
>>> y, (h, c), tape = lstm.forward(numpy.zeros((5, 3, 8), numpy.float32))
>>> grads = lstm.backward(tape, numpy.ones_like(y))

Layers: LSTM, GRU, RNN; `layer.freeze()` for inference, `.stream()` step by step. Functions over plain arrays:
lstm, gru, rnn and their `_forward`, `_backward` and `_cell`. With `device="cuda"`, or given arrays that are
there, all of them run on a GPU. `fusedrnn.reference` has the same functions in
plain NumPy: the maths, spelt out.
"""

from . import _core, reference
from ._clip import clip_grad_norm
from ._device import device_array
from ._device_array import DeviceArray
from ._dtypes import bfloat16
from ._frozen import Frozen, Stream
from ._functional import (
    gru,
    gru_backward,
    gru_cell,
    gru_forward,
    lstm,
    lstm_backward,
    lstm_cell,
    lstm_forward,
    rnn,
    rnn_backward,
    rnn_cell,
    rnn_forward,
)
from ._layers import GRU, LSTM, RNN, Layer
from ._params import Params
from ._show import show_config
from ._tape import FunctionalGrads, Grads, Tape
from ._tf32 import get_tf32, set_tf32, tf32
from ._threads import get_num_threads, num_threads, set_num_threads

__all__ = [
    "GRU", "LSTM", "RNN", "DeviceArray", "Frozen", "FunctionalGrads", "Grads", "Layer", "Params", "Stream",
    "Tape",
    "gru", "gru_backward", "gru_cell", "gru_forward", "lstm", "lstm_backward", "lstm_cell", "lstm_forward",
    "rnn", "rnn_backward", "rnn_cell", "rnn_forward",
    "bfloat16", "clip_grad_norm", "device_array", "get_num_threads", "get_tf32", "num_threads", "reference",
    "set_num_threads", "set_tf32", "show_config", "tf32",
]  # fmt: skip

_core.isa()  # so that a wrong FUSEDRNN_ISA is an error now, and not in the first call
_core.get_num_threads()  # likewise FUSEDRNN_NUM_THREADS
__version__: str = _core.build_info()["version"]
