"""Bad options of the layers: the error names the option, what was expected and what came."""

import numpy as np
import pytest

import fusedrnn as fr

I, H = 4, 6
SIZES = {"input_size": I, "hidden_size": H}
OPTIONS = {
    "no inputs": ({"input_size": 0}, ValueError, "input_size must be at least 1, got 0"),
    "no units": ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
    "negative units": ({"hidden_size": -3}, ValueError, "hidden_size must be at least 1, got -3"),
    "no layers": ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
    "real size": ({"input_size": 3.0}, TypeError, "input_size must be an integer, got 3.0"),
    "array for a size": ({"input_size": np.array([3, 4])}, TypeError, "input_size must be an integer, got a"),
    "real array for a size": ({"num_layers": np.array(1.5)}, TypeError, "num_layers must be an integer, got"),
    "huge dropout": ({"dropout": 10**400}, ValueError, r"dropout must be in \[0, 1\), got 1000"),
    "bool for a size": ({"num_layers": True}, TypeError, "num_layers must be an integer, got True"),
    "number for bias": ({"bias": 1}, TypeError, "bias must be True or False, got 1"),
    "number for batch_first": ({"batch_first": 0.5}, TypeError, "batch_first must be True or False, got 0.5"),
    "None for bidirectional": ({"bidirectional": None}, TypeError, "bidirectional must be True or False"),
    "all dropped": ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    "negative dropout": ({"dropout": -0.1}, ValueError, r"dropout must be in \[0, 1\), got -0.1"),
    "nan for dropout": ({"dropout": float("nan")}, ValueError, r"dropout must be in \[0, 1\), got nan"),
    "bool for dropout": ({"dropout": True}, TypeError, "dropout must be a number, got True"),
    "projection": ({"proj_size": 2}, NotImplementedError, "projections are not supported: .*got 2"),
    "negative projection": ({"proj_size": -1}, ValueError, "proj_size must be at least 0, got -1"),
    "half": ({"dtype": np.float16}, TypeError, "dtype must be float32 or float64, got float16; it needs"),
    "complex": ({"dtype": complex}, TypeError, "dtype must be float32 or float64, got complex128"),
    "swapped bytes": ({"dtype": np.dtype("=f4").newbyteorder()}, TypeError, "dtype must be float32 or"),
    "misspelt dtype": ({"dtype": "fp32"}, TypeError, "dtype must be float32 or float64, got 'fp32'"),
    "dtype of fields": ({"dtype": "f4,,"}, TypeError, "dtype must be float32 or float64, got 'f4,,'"),
    "no dtype": ({"dtype": None}, TypeError, "dtype must be float32 or float64, got None"),
    "negative seed": ({"seed": -1}, ValueError, "seed must be what numpy.random.default_rng takes, got -1"),
    "name for a seed": ({"seed": "a"}, TypeError, "seed must be what numpy.random.default_rng takes, got"),
    "too many layers": ({"num_layers": 2**40}, ValueError, "num_layers must be at most 65536, got"),
    "overflow": ({"hidden_size": 2**40}, ValueError, "the parameters would hold .*can be addressed"),
    "beyond int64": ({"input_size": 2**70}, ValueError, "the parameters would hold .*can be addressed"),
    "no memory": ({"hidden_size": 2**24}, MemoryError, None),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("kind", [fr.LSTM, fr.GRU, fr.RNN])
def test_bad_options(kind, case):
    options, error, text = OPTIONS[case]
    with pytest.raises(error, match=text and f"^{kind.__name__.lower()}: {text}"):
        kind(**{**SIZES, **options})


def test_unknown_variants():
    with pytest.raises(ValueError, match="rnn: nonlinearity must be one of 'tanh', 'relu', got 'sigmoid'"):
        fr.RNN(I, H, nonlinearity="sigmoid")
    with pytest.raises(TypeError, match="gru: reset_after must be True or False, got 'yes'"):
        fr.GRU(I, H, reset_after="yes")
