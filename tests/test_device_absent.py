"""Without a GPU: what is said where one is wanted, and what of dtypes and options needs none."""

import copy
import pickle
import threading

import numpy as np
import pytest
from gpu_cases import B, H, I, T, python

import fusedrnn as fr
from fusedrnn import _dtypes


def test_nothing_of_the_gpu_is_loaded_before_it_is_asked_for():
    code = """if True:
        import sys, numpy, fusedrnn as fr
        layer = fr.LSTM(3, 4)
        layer(numpy.zeros((2, 1, 3), numpy.float32))
        fr.lstm(numpy.zeros((2, 1, 3), numpy.float32), *layer.params.values())
        layer.to("cpu").freeze().stream()
        print([m for m in sys.modules if m == "fusedrnn._cuda" or m.partition(".")[0] == "cuda"])"""
    assert python(code).strip() == "[]"


def test_without_the_module_the_error_says_how_to_get_it():
    code = """if True:
        import sys
        sys.modules["fusedrnn._cuda"] = None  # as if it were not installed
        import fusedrnn as fr
        try:
            fr.LSTM(3, 4, device="cuda")
        except RuntimeError as error:
            print(error)
        print(fr.show_config("dict")["cuda"])"""
    error, config = python(code).splitlines()
    assert error.startswith("cuda: this fusedrnn was built without its GPU kernels: install it where CMake")
    assert config == "not built"


@pytest.mark.parametrize("dtype", [np.float16, "float16", "bfloat16", fr.bfloat16])
def test_16_bits_need_a_gpu(dtype):
    name = _dtypes.named(dtype)
    text = f"^lstm: dtype must be float32 or float64, got {name}; it needs device='cuda'"
    with pytest.raises(TypeError, match=text):
        fr.LSTM(I, H, dtype=dtype)
    with pytest.raises(TypeError, match=text):
        fr.LSTM(I, H).to(dtype=dtype)


@pytest.mark.parametrize(
    ("device", "kind"), [("gpu", ValueError), ("cuda:", ValueError), ("cuda:-1", ValueError), (0, TypeError)]
)
def test_what_is_no_device(device, kind):
    for make in (lambda: fr.GRU(I, H, device=device), lambda: fr.GRU(I, H).to(device)):
        with pytest.raises(kind, match="^gru: device must be 'cpu', 'cuda' or 'cuda:N', got "):
            make()


def test_a_layer_is_on_the_cpu_unless_told():
    layer = fr.GRU(I, H)
    assert layer.device == layer.freeze().device == "cpu" and "device" not in repr(layer)
    assert layer.to("cpu") is layer and layer.to() is layer
    frozen = layer.freeze()
    assert frozen.to("cpu") is frozen


def test_a_layer_in_another_dtype_has_its_own_rounded_parameters():
    layer = fr.LSTM(I, H, dropout=0.5, num_layers=2, seed=0)
    other = layer.to(dtype=np.float64)
    assert other.dtype == np.float64 and layer.dtype == np.float32
    np.testing.assert_array_equal(other.flat_params, layer.flat_params)
    other.flat_params[:] = 0
    assert layer.flat_params.all()
    x = np.ones((T, B, I))
    assert layer.forward(x.astype(np.float32))[-1].seed == other.forward(x)[-1].seed  # the same generator's


def test_tf32_is_off_and_belongs_to_the_context():
    assert not fr.get_tf32()
    with fr.tf32():
        assert fr.get_tf32()
        with fr.tf32(False):
            assert not fr.get_tf32()
        seen = []
        thread = threading.Thread(target=lambda: seen.append(fr.get_tf32()))
        thread.start()
        thread.join()
        assert seen == [False]
    assert not fr.get_tf32()
    fr.set_tf32(True)
    try:
        assert fr.get_tf32()
    finally:
        fr.set_tf32(False)
    with pytest.raises(TypeError, match="set_tf32: enabled must be True or False, got 1"):
        fr.set_tf32(1)


def test_bfloat16_rounds_to_the_nearest_even():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 2**32, 20000, np.uint32).view(np.float32)
    wide = np.concatenate([wide, np.float32([0, -0.0, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38])])
    wide = wide[~np.isnan(wide)]
    with np.errstate(over="ignore"):
        want = wide.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(_dtypes.narrowed(wide, fr.bfloat16), want.view(np.uint16))
    back = _dtypes.widened(want.view(np.uint16), fr.bfloat16)
    np.testing.assert_array_equal(back, want.astype(np.float32))
    assert np.isnan(_dtypes.widened(_dtypes.narrowed(np.float32([np.nan]), fr.bfloat16), fr.bfloat16)).all()


def test_bfloat16_is_one_dtype_by_all_its_names():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert _dtypes.named("bfloat16") is _dtypes.named(ml_dtypes.bfloat16) is fr.bfloat16
    assert fr.bfloat16 == np.dtype(ml_dtypes.bfloat16) and np.dtype(ml_dtypes.bfloat16) == fr.bfloat16
    assert fr.bfloat16 != np.dtype(np.float16) and str(fr.bfloat16) == "bfloat16"
    assert pickle.loads(pickle.dumps(fr.bfloat16)) is fr.bfloat16 is copy.deepcopy(fr.bfloat16)
