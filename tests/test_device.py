"""Layers and functions on a GPU: whose arrays go in and come out, where things may be, what is refused."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import types
import weakref

import numpy as np
import pytest
from bound import (
    OFFERED,
    Case,
    as_tuple,
    assert_same_bits,
    assert_within_bound,
    at_host,
    draw,
    named,
    run,
    there,
)  # fmt: skip
from devices import EMULATED, PROBLEM, eps, exact, host, needs_gpu, numpy_dtype, on_device, path

import fusedrnn as fr
from fusedrnn import _cuda_module, _device_interop, _dtypes

T, B, I, H = 5, 3, 4, 6
every_cell = pytest.mark.parametrize("cell", OFFERED)
every_gpu_dtype = pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])


def gpu_case(cell="lstm", dtype="float32", **options):
    return Case(cell, dtype, T, B, I, H, device="cuda", **options)


def results(call, given):
    y, final, tape = call.layer.forward(given.x, given.state, given.lengths)
    grads = call.layer.backward(tape, given.dy, given.dstate)
    return named(y, final, grads.x, grads.state, dict(grads.params))


# --- Without a GPU ------------------------------------------------------------------------------------------


def python(code, **env):
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


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


# --- Arrays -------------------------------------------------------------------------------------------------


@needs_gpu
@every_gpu_dtype
def test_arrays_go_there_and_come_back(dtype):
    a = np.random.default_rng(0).standard_normal((4, 5, 6)).astype(numpy_dtype(dtype))
    there_ = fr.device_array(a)
    assert (there_.shape, there_.strides, there_.ndim, there_.size) == (a.shape, a.strides, 3, a.size)
    assert there_.dtype == a.dtype and there_.device == "cuda:0" and len(there_) == 4
    assert repr(there_) == f"DeviceArray(shape=(4, 5, 6), dtype={dtype}, device='cuda:0')"
    assert_same_bits({"a": there_.numpy()}, {"a": a})
    for view in (lambda x: x[1:, ::2], lambda x: x[2], lambda x: x.swapaxes(0, 2), lambda x: x[::-1, None]):
        assert_same_bits({"a": view(there_).numpy()}, {"a": view(a)})
        assert_same_bits({"a": view(there_).copy().numpy()}, {"a": view(a)})
    assert_same_bits({"a": there_.reshape(20, 6).numpy()}, {"a": a.reshape(20, 6)})
    np.testing.assert_array_equal(there_.numpy(np.float32), a.astype(np.float32))
    other = pickle.loads(pickle.dumps(there_))
    there_[:, 1] = a[:, 0].copy()
    there_[0] = there_[3]
    want = a.copy()
    want[:, 1], want[0] = a[:, 0], a[3]
    want[0, 1] = a[3, 0]
    assert_same_bits({"a": there_.numpy()}, {"a": want})
    assert_same_bits({"a": other.numpy()}, {"a": a})


@needs_gpu
def test_what_a_device_array_refuses():
    a = fr.device_array(np.zeros((2, 3), np.float32))
    with pytest.raises(TypeError, match=r"is on cuda:0; copy it to the host with \.numpy\(\)"):
        np.asarray(a)
    with pytest.raises(TypeError, match="an index must be an integer, a slice, None or"):
        a[[0, 1]]
    with pytest.raises(ValueError, match="only C-contiguous arrays reshape"):
        a.swapaxes(0, 1).reshape(6)
    with pytest.raises(ValueError, match=r"value must have shape \(3,\), got \(2,\)"):
        a[0] = np.zeros(2, np.float32)
    with pytest.raises(TypeError, match="value must have dtype float32, got float64"):
        a[0] = np.zeros(3)
    with pytest.raises(TypeError, match="dtype must be float32, float64, float16 or bfloat16, got int64"):
        fr.device_array(np.zeros(3, np.int64))
    with pytest.raises(TypeError, match="array must be a numpy.ndarray or a DeviceArray, got list"):
        fr.device_array([1.0])
    with pytest.raises(TypeError, match="cannot be iterated over"):
        list(a)


@needs_gpu
def test_arrays_are_lent_by_dlpack_and_taken_back():
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    ours = fr.device_array(a)
    for options in ({}, {"max_version": (1, 0)}):
        taken = _device_interop.taken("test", "x", _Lender(ours, options), 0)
        assert (taken.shape, taken.strides, taken.dtype) == (ours.shape, ours.strides, ours.dtype)
        taken[0] = a[2].copy()
        np.testing.assert_array_equal(ours.numpy()[0], a[2])
    frozen = fr.LSTM(I, H, device="cuda").freeze()
    with pytest.raises(BufferError, match="is read-only, which DLPack before version 1 cannot say"):
        frozen.params["weight_hh_l0"].__dlpack__()
    with pytest.raises(BufferError, match="not copied to another device"):
        ours.__dlpack__(dl_device=(4, 0))


class _Lender:
    """An array of another library, with DLPack alone."""

    def __init__(self, array, options):
        self.array, self.options = array, options

    def __dlpack__(self, *, stream=None):
        return self.array.__dlpack__(stream=stream, **self.options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class _Interface:
    """An array of another library, with __cuda_array_interface__ alone."""

    def __init__(self, array, **changes):
        self.array = array
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, **changes}


# --- Whose arrays come out ----------------------------------------------------------------------------------


@needs_gpu
@every_cell
@every_gpu_dtype
def test_numpy_in_numpy_out_with_the_bits_of_arrays_there(cell, dtype):
    call = draw(gpu_case(cell, dtype, L=2, D=2, ragged=True))
    got = results(call, call)
    assert all(type(a) is np.ndarray and a.dtype == numpy_dtype(dtype) for a in got.values())
    assert_same_bits(got, run(call))


@needs_gpu
@every_cell
def test_device_arrays_in_device_arrays_out(cell):
    call = draw(gpu_case(cell))
    got = results(call, there(call))
    assert all(type(a) is fr.DeviceArray for a in got.values())


@needs_gpu
@every_cell
@every_gpu_dtype
def test_torch_in_torch_out_on_the_same_memory(cell, dtype):
    torch = pytest.importorskip("torch")
    place = "cpu" if EMULATED else "cuda"
    if not EMULATED and not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")

    def tensor(a):
        exactly = torch.from_numpy(np.ascontiguousarray(exact(a)))
        return exactly.to(device=place, dtype=getattr(torch, dtype))

    def tensors(state):
        return tuple(map(tensor, state)) if isinstance(state, tuple) else tensor(state)

    def numbers(t):
        return t.detach().cpu().double().numpy()

    call = draw(gpu_case(cell, dtype, L=2, ragged=True))
    given = call._replace(
        x=tensor(call.x), dy=tensor(call.dy), state=tensors(call.state), dstate=tensors(call.dstate)
    )
    want = {name: exact(a) for name, a in run(call).items()}
    got = results(call, given)
    for name, t in got.items():
        assert isinstance(t, torch.Tensor) and t.dtype == getattr(torch, dtype), name
        np.testing.assert_array_equal(numbers(t), want[name])

    out = torch.full((T, B, 2 * H), torch.nan, dtype=getattr(torch, dtype), device=place)[..., :H]
    y, _ = call.layer(given.x, given.state, call.lengths, out=out)
    assert y is out
    np.testing.assert_array_equal(numbers(out), want["y"])

    flat = torch.from_dlpack(call.layer.flat_params)  # an optimiser's view
    flat.mul_(0)
    assert not call.layer.flat_params.numpy().astype(bool).any()
    with pytest.raises(TypeError, match="x cannot be taken from its library: .*detach"):
        call.layer(given.x.requires_grad_())


@needs_gpu
@every_cell
def test_functional_forms_answer_in_kind(cell):
    call = draw(gpu_case(cell))
    _, options, name = OFFERED[cell]
    forward, backward = getattr(fr, f"{name}_forward"), getattr(fr, f"{name}_backward")
    weights = tuple(call.layer.params.values())
    lent = [_Lender(a, {}) for a in (on_device(call.x), *weights)]
    *out, tape = forward(*lent, **options)
    grads = backward(tape, on_device(call.dy))
    assert all(type(a) is fr.DeviceArray for a in (*out, grads.x, grads.flat, grads.w_hh, grads.h0))
    y, *_ = getattr(fr, name)(on_device(call.x), *weights, **options)
    assert_same_bits({"y": out[0].numpy()}, {"y": y.numpy()})
    step = getattr(fr, f"{name}_cell")
    states = [None] * len(as_tuple(call.state))
    h, *_ = as_tuple(step(on_device(call.x[0]), *states, *weights, **options))
    bound = 8 * (I + H) * eps(np.dtype(np.float32))
    assert type(h) is fr.DeviceArray and np.abs(h.numpy() - host(y)[0]).max() <= bound


@needs_gpu
@every_cell
@every_gpu_dtype
@pytest.mark.parametrize("lay_out", [np.asfortranarray, lambda a: np.repeat(a, 2, axis=-1)[..., ::2]])
def test_weights_and_states_of_any_strides_give_the_same_bits(cell, dtype, lay_out):
    call = draw(gpu_case(cell, dtype))
    _, options, name = OFFERED[cell]

    def compute(arrange):
        given = [arrange(a) for a in (call.x, *map(host, call.layer.params.values()))]
        states = [arrange(s[0]) for s in as_tuple(call.state)]
        *out, tape = getattr(fr, f"{name}_forward")(*map(on_device, (*given, *states)), **options)
        grads = getattr(fr, f"{name}_backward")(tape, on_device(arrange(call.dy)))
        return {str(k): host(a) for k, a in enumerate((*out, grads.x, grads.flat))}

    assert_same_bits(compute(lay_out), compute(np.ascontiguousarray))


@needs_gpu
def test_cuda_array_interface_is_taken_and_given():
    call = draw(gpu_case(given="y", state="zeros"))
    x = on_device(call.x)
    want = call.layer(x)[0].numpy()
    for changes in ({}, {"stream": None}, {"strides": x.strides}, {"version": 2}):
        y, _ = call.layer(_Interface(x, **changes))
        np.testing.assert_array_equal(y.numpy(), want)
    assert "stream" in y.__cuda_array_interface__ and y.__cuda_array_interface__["typestr"] == "<f4"
    with pytest.raises(TypeError, match="x must have dtype float32, float64 or float16, got int32"):
        call.layer(_Interface(x, typestr="<i4"))
    with pytest.raises(ValueError, match="out must be writeable, got a read-only array"):
        call.layer(x, out=_Interface(on_device(call.dy), data=(y.__cuda_array_interface__["data"][0], True)))


@needs_gpu
def test_memory_of_another_stream_is_taken_after_its_work_and_given_back_after_the_call(monkeypatch):
    call = draw(gpu_case())
    x, other, waits = on_device(call.x), 7, []
    cuda = _cuda_module.module()
    monkeypatch.setattr(cuda, "wait", lambda _, waiter, before: waits.append((waiter, before)))
    monkeypatch.setattr(call.layer.flat_params._memory, "stream", other)
    call.layer(x)
    assert waits == [(0, other), (other, 0)]


class _CupysStream:
    """A stream as CuPy has it: gone with its object."""

    ptr = 0


class _Cupys(_Lender):
    __module__ = "cupy.fake"


@needs_gpu
@pytest.mark.parametrize("kept", ["y", "state", "tape", "grads", "out", "stream"])
def test_what_a_call_leaves_keeps_its_stream_alive(monkeypatch, kept):
    current = [_CupysStream()]
    gone = weakref.ref(current[0])
    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(get_current_stream=lambda: current[0])
    cupy.from_dlpack = lambda array: _cuda_module.module().from_dlpack(array.__dlpack__())
    monkeypatch.setitem(sys.modules, "cupy", cupy)

    call = draw(gpu_case(state="zeros", given="y"))
    x, dy = _Cupys(on_device(call.x), {}), _Cupys(on_device(call.dy), {})
    y, state, tape = call.layer.forward(x)
    steps = call.layer.freeze().stream(B)
    left = {
        "y": y, "state": state, "tape": tape, "stream": steps, "out": steps.step(_Cupys(x.array[0], {})),
        "grads": call.layer.backward(call.layer.forward(x)[-1], dy).x,
    }[kept]  # fmt: skip
    del y, state, tape, steps
    current[0] = _CupysStream()
    gc.collect()
    assert gone() is not None
    if kept == "tape":
        call.layer.backward(left, dy)
    del left
    gc.collect()
    assert gone() is None


@needs_gpu
@every_cell
@pytest.mark.parametrize("kind", ["numpy", "arrays"])
def test_accumulation_is_into_the_callers_arrays(cell, kind):
    call = draw(gpu_case(cell, L=2))
    given = call if kind == "numpy" else there(call)
    _, _, tape = call.layer.forward(given.x, given.state)
    once = call.layer.backward(tape, given.dy, given.dstate, retain=True)
    total = call.layer.backward(tape, given.dy, given.dstate, retain=True)
    held = total.x, total.flat, *as_tuple(total.state)
    assert call.layer.backward(tape, given.dy, given.dstate, accumulate_into=total) is total
    for before, a, b in zip(held, (total.x, total.flat, *as_tuple(total.state)),
                            (once.x, once.flat, *as_tuple(once.state)), strict=True):  # fmt: skip
        assert a is before
        np.testing.assert_allclose(host(a), 2 * host(b), rtol=1e-5, atol=1e-6)


# --- Parameters, copies, moves ------------------------------------------------------------------------------


@needs_gpu
@every_cell
@every_gpu_dtype
def test_layers_move_there_and_back(cell, dtype):
    kind, options, _ = OFFERED[cell]
    layer = kind(I, H, 2, seed=3, **options)
    moved = layer.to("cuda", dtype)
    assert (moved.device, moved.dtype) == ("cuda:0", _dtypes.named(dtype))
    assert moved.to("cuda") is moved and layer.device == "cpu"
    fresh = kind(I, H, 2, seed=3, device="cuda", dtype=dtype, **options)
    if dtype != "float64":  # which is drawn anew, not rounded
        assert_same_bits({"p": moved.flat_params.numpy()}, {"p": fresh.flat_params.numpy()})
    back = moved.to("cpu", np.float64)
    np.testing.assert_array_equal(back.flat_params, exact(moved.flat_params))
    x = np.random.default_rng(0).standard_normal((T, B, I))
    frozen, frozen_there = layer.freeze(), moved.freeze()
    rounded = frozen.to("cuda", dtype)
    given = x.astype(numpy_dtype(dtype))
    assert_same_bits({"y": rounded(given)[0]}, {"y": frozen_there(given)[0]})
    assert_same_bits({"y": moved(given)[0]}, {"y": frozen_there(given)[0]})
    for copied in (copy.deepcopy(moved), pickle.loads(pickle.dumps(moved))):
        assert repr(copied) == repr(moved)
        assert_same_bits({"y": copied(given)[0]}, {"y": frozen_there(given)[0]})
    thawed = pickle.loads(pickle.dumps(frozen_there))
    assert_same_bits({"y": thawed(given)[0]}, {"y": frozen_there(given)[0]})
    assert copy.deepcopy(frozen_there) is frozen_there and frozen_there.nbytes == moved.flat_params.nbytes


@needs_gpu
def test_parameters_are_views_of_one_buffer():
    layer, other = (fr.LSTM(I, H, 2, seed=s, device="cuda") for s in (0, 1))
    before = layer.flat_params
    state = other.state_dict()
    layer.load_state_dict(state)
    assert layer.flat_params is before
    np.testing.assert_array_equal(before.numpy(), other.flat_params.numpy())
    layer.load_state_dict({k: v.numpy() for k, v in fr.LSTM(I, H, 2, seed=5, device="cuda").params.items()})
    layer.params["bias_hh_l1"] = np.zeros(4 * H, np.float32)
    layer.params["bias_ih_l1"] = other.params["bias_ih_l1"]
    np.testing.assert_array_equal(layer.params["bias_ih_l1"].numpy(), other.params["bias_ih_l1"].numpy())
    np.testing.assert_array_equal(before.numpy()[-4 * H :], np.zeros(4 * H))
    layer.flat_params = np.zeros(before.shape, np.float32)
    assert not before.numpy().any() and layer.flat_params is before
    with pytest.raises(ValueError, match=r"lstm: flat_params must have shape \(\d+,\), got \(1,\)"):
        layer.flat_params = np.zeros(1, np.float32)
    with pytest.raises(ValueError, match="read-only"):
        layer.freeze().params["bias_hh_l0"] = np.zeros(4 * H, np.float32)
    on_cpu = fr.LSTM(I, H, 2)
    on_cpu.load_state_dict(other.state_dict())
    np.testing.assert_array_equal(on_cpu.flat_params, other.flat_params.numpy())


@needs_gpu
@pytest.mark.parametrize("kind", ["x", "weights"])
def test_what_changed_since_the_forward_is_an_error(kind):
    call = draw(gpu_case())
    given = there(call)
    _, _, tape = call.layer.forward(given.x, given.state)
    changed = given.x if kind == "x" else call.layer.params["weight_hh_l0"]
    was = changed.numpy()
    other = was.copy()
    other.flat[-1] += 1
    changed[...] = other
    with pytest.raises(RuntimeError, match="changed"):
        call.layer.backward(tape, given.dy)
    changed[...] = was
    call.layer.backward(tape, given.dy)


@needs_gpu
def test_a_numpy_input_may_change_for_the_tape_has_a_copy():
    call = draw(gpu_case())
    want = results(call, call)
    _, _, tape = call.layer.forward(call.x, call.state)
    call.x[...] = 0
    grads = call.layer.backward(tape, call.dy, call.dstate)
    assert_same_bits({"dx": grads.x}, {"dx": want["dx"]})


@needs_gpu
@every_cell
@every_gpu_dtype
def test_results_repeat_bit_for_bit(cell, dtype):
    call = draw(gpu_case(cell, dtype, L=2, D=2, ragged=True, dropout=0.3))
    assert_same_bits(run(call, seed=7), run(call, seed=7))


@needs_gpu
@every_cell
@pytest.mark.parametrize("number", [-1, 0])
def test_tf32_rounds_where_it_is_asked_for_and_backward_as_its_forward(cell, number):
    call = draw(gpu_case(cell, L=2, D=2))
    with path(number):
        plain = run(call)
        with fr.tf32():
            rounded = run(call)
            given = there(call)
            y, final, tape = call.layer.forward(given.x, given.state)
        grads = call.layer.backward(tape, given.dy, given.dstate)  # outside of the block
        assert_same_bits(run(call), plain)
    assert_same_bits(at_host(named(y, final, grads.x, grads.state, dict(grads.params))), rounded)
    for name, want in plain.items():
        error = np.linalg.norm(rounded[name] - want)
        assert error <= 64 * 2.0**-10 * max(np.linalg.norm(want), np.sqrt(want.size)), name
    assert any(rounded[name].tobytes() != want.tobytes() for name, want in plain.items())


# --- Streams ------------------------------------------------------------------------------------------------


@needs_gpu
@every_cell
@every_gpu_dtype
def test_steps_compute_the_sequence(cell, dtype):
    case = gpu_case(cell, dtype, L=2, state="zeros")
    call = draw(case)
    frozen = call.layer.freeze()
    want = frozen(call.x)
    for given, out in ((call.x, False), (on_device(call.x), False), (call.x, True)):
        stream = frozen.stream(B)
        ys = []
        for t in range(T):
            buffer = np.full((B, H), np.nan, numpy_dtype(dtype)) if out else None
            h = stream.step(given[t], out=buffer)
            assert (h is buffer) if out else type(h) is type(given)
            ys.append(host(h))
        assert_within_bound(
            {"y": np.stack(ys), "h_n": host(as_tuple(stream.state)[0])},
            {"y": exact(want[0]), "h_n": exact(as_tuple(want[1])[0])}, case,
        )  # fmt: skip
    other = copy.deepcopy(stream)
    np.testing.assert_array_equal(host(stream.step(call.x[0])), host(other.step(call.x[0])))
    stream.reset()
    np.testing.assert_array_equal(stream.step(call.x[0]), ys[0])
    one = frozen.stream()
    assert one.step(call.x[0, 0]).shape == (H,) and one.step(call.x[:1, 0]).shape == (1, H)


@needs_gpu
def test_a_stream_on_a_gpu_refuses_as_on_the_cpu():
    frozen = fr.LSTM(I, H, 2, device="cuda").freeze()
    stream, x = frozen.stream(B), np.zeros((B, I), np.float32)
    for kind, text, call in (
        (ValueError, r"^stream\.step: x must have shape \(3, 4\), got \(3, 5\)", lambda: stream.step(
            np.zeros((B, 5), np.float32))),
        (TypeError, r"^stream\.step: x must have dtype float32, got float64", lambda: stream.step(
            np.zeros((B, I)))),
        (ValueError, r"^stream\.step: out must have shape \(3, 6\), got \(2, 6\)", lambda: stream.step(
            x, np.zeros((2, H), np.float32))),
        (ValueError, "^lstm: a bidirectional layer cannot stream", lambda: fr.LSTM(
            I, H, bidirectional=True, device="cuda").freeze().stream()),
        (TypeError, r"state must be a tuple \(h, c\) or None", lambda: setattr(stream, "state", x)),
    ):  # fmt: skip
        with pytest.raises(kind, match=text):
            call()
    zeros = np.zeros((2, B, H), np.float32)
    stream.state = (zeros + 1, None)
    h, c = stream.state
    assert host(h).all() and not host(c).any()


# --- Mixed devices, and what else is refused ----------------------------------------------------------------


@needs_gpu
def test_mixed_devices_are_an_error_that_names_both():
    call = draw(gpu_case())
    given, cpu = there(call), fr.LSTM(I, H, seed=0)
    weights, there_weights = tuple(cpu.params.values()), tuple(call.layer.params.values())
    on_gpu, on_cpu = "must be on cuda:0, .*got an array on the cpu", "must be on the cpu, .*on cuda:0"
    *_, tape = call.layer.forward(given.x)
    *_, function_tape = fr.lstm_forward(call.x, *weights)
    for text, wrong in (
        (f"^lstm: x {on_cpu}", lambda: cpu(given.x)),
        (f"^lstm: x {on_cpu}", lambda: cpu.freeze()(given.x)),
        (f"^lstm: h0 {on_gpu}", lambda: call.layer(given.x, call.state)),
        (f"^lstm: out {on_gpu}", lambda: call.layer(given.x, out=np.zeros((T, B, H), np.float32))),
        ("^lstm: h0 must be on the cpu .*on cuda:0", lambda: call.layer(call.x, given.state)),
        ("^lstm: out must be on the cpu .*on cuda:0", lambda: call.layer(call.x, out=given.dy)),
        (f"^lstm: w_ih {on_gpu}", lambda: fr.lstm(given.x, *weights)),
        (f"^lstm: w_ih {on_cpu}", lambda: fr.lstm(call.x, *there_weights)),
        (f"^lstm: h0 {on_gpu}", lambda: fr.lstm(given.x, *there_weights, h0=call.state[0][0])),
        (f"^lstm: h0 {on_cpu}", lambda: fr.lstm(call.x, *weights, h0=given.state[0][0])),
        (f"^lstm: w_hh {on_gpu}", lambda: fr.lstm_cell(
            given.x[0], None, None, there_weights[0], weights[1])),
        (f"^lstm: dh_n {on_gpu}", lambda: call.layer.backward(tape, given.dy, call.dstate)),
        (f"^lstm: dy {on_cpu}", lambda: fr.lstm_backward(function_tape, given.dy)),
        (f"^lstm: bias_hh_l0 {on_cpu}", lambda: cpu.params.__setitem__("bias_hh_l0", there_weights[3])),
        ("^lstm: lengths must be on the cpu|lengths must have an integer", lambda: call.layer(
            given.x, lengths=given.x)),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=text):
            wrong()
    call.layer.backward(tape, given.dy)  # as good as it was


@needs_gpu
def test_a_device_that_there_is_not():
    with pytest.raises(ValueError, match="lstm: device must be cuda:0 to cuda:\\d+ on this machine, got"):
        fr.LSTM(I, H, device="cuda:99")


@needs_gpu
def test_out_on_the_gpu_must_not_overlap_what_is_read():
    call = draw(gpu_case(state="zeros"))
    whole = fr.device_array(np.zeros(T * B * (I + H), np.float32))
    x, out = whole[: T * B * I].reshape(T, B, I), whole[I : I + T * B * H].reshape(T, B, H)
    with pytest.raises(ValueError, match="lstm: out must not overlap x, got an array that shares memory"):
        call.layer(x, out=out)
    with pytest.raises(ValueError, match="out must not overlap the parameters"):
        call.layer(x, out=call.layer.flat_params[: T * B * H].reshape(T, B, H))
    apart = whole[T * B * I :].reshape(T, B, H)
    assert call.layer(x, out=apart)[0] is apart


@needs_gpu
def test_more_memory_than_there_is_leaves_the_layer_usable():
    layer = fr.RNN(1, 2, device="cuda", seed=0)
    zero = fr.device_array(np.zeros(1, np.float32))
    shadow = np.broadcast_to(zero._shadow, (2**30, 2**10, 1))
    with pytest.raises(MemoryError):
        layer(fr.DeviceArray(shadow, zero.dtype, zero._memory))
    assert layer(np.zeros((T, B, 1), np.float32))[0].shape == (T, B, 2)


@needs_gpu
def test_clipping_leaves_arrays_there_to_their_library():
    call = draw(gpu_case())
    given = there(call)
    grads = call.layer.backward(call.layer.forward(given.x)[-1], given.dy)
    with pytest.raises(TypeError, match="grads must be numpy arrays, got a DeviceArray on cuda:0"):
        fr.clip_grad_norm(grads, 1.0)


@needs_gpu
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_a_fork_the_gpu_is_refused_with_a_reason():
    code = """if True:
        import os, warnings
        import numpy as np, fusedrnn as fr
        warnings.simplefilter("ignore")
        layer = fr.LSTM(3, 4, device="cuda")
        x = np.zeros((2, 1, 3), np.float32)
        layer(x)
        child = os.fork()
        if child == 0:
            try:
                layer(x)
            except RuntimeError as error:
                print(error, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        layer(x)"""
    assert "cuda: this process was forked from one that had used the GPU" in python(code)


@needs_gpu
def test_threads_share_a_layer_there():
    call = draw(gpu_case(L=2))
    frozen, given = call.layer.freeze(), there(call)
    want, failures = frozen(call.x)[0], []

    def work():
        try:
            for x in (call.x, given.x):
                np.testing.assert_array_equal(host(frozen(x)[0]), want)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_what_was_found_is_told():
    text = fr.show_config("dict")["cuda"]
    if PROBLEM is None:
        assert "driver for" in text and "cuda:0" in text and "cuBLASLt" in text
    else:
        assert text == "not built" or text.startswith("built for ")
