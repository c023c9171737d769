"""Arrays on a GPU, ours and other libraries': taken without a copy, and given back in the caller's kind."""

import contextlib
import gc
import pickle
import sys
import types
import weakref

import numpy as np
import pytest
from bound import (
    OFFERED,
    as_tuple,
    assert_same_bits,
    draw,
    run,
    there,
)  # fmt: skip
from devices import EMULATED, eps, exact, host, needs_gpu, numpy_dtype, on_device
from gpu_cases import B, H, I, T, every_cell, every_gpu_dtype, gpu_case, results

import fusedrnn as fr
from fusedrnn import _cuda_module, _device_array, _device_interop


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
@pytest.mark.parametrize(
    ("to", "source"),
    [
        (np.s_[...], lambda a: a[::-1]),
        (np.s_[1:], lambda a: a[:-1]),
        (np.s_[:-1], lambda a: a[1:]),
        (np.s_[...], lambda a: a.swapaxes(0, 1)),
    ],
)
def test_an_array_may_be_assigned_from_itself(to, source):
    a = np.arange(16, dtype=np.float32).reshape(4, 4)
    on_gpu = fr.device_array(a)
    on_gpu[to] = source(on_gpu)
    a[to] = source(a.copy())
    assert_same_bits({"a": on_gpu.numpy()}, {"a": a})


@needs_gpu
def test_bfloat16_is_rounded_once():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = np.random.default_rng(0).integers(0x100, 0x7F00, 1000)  # normal numbers, clear of the largest
    half = sum((bits + i).astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float64) for i in (0, 1)) / 2
    half[::2] *= -1
    for scale in (1 - 2.0**-45, 1 + 2.0**-45):  # float32 cannot tell these from the half
        clear = half * (1 + (scale - 1) * 2.0**25)
        got, want = (fr.device_array(a, dtype="bfloat16").numpy(np.float64) for a in (half * scale, clear))
        assert_same_bits({"a": got}, {"a": want})
    alone = fr.device_array(np.array(1.5), dtype="bfloat16")
    assert fr.device_array(alone).dtype == alone.dtype
    assert fr.device_array(alone, dtype="f4").dtype == np.float32
    assert alone.shape == () and alone.numpy(np.float32).shape == () and alone.numpy(np.float32) == 1.5
    ends = fr.device_array(np.array([3.4e38, -3.4e38, np.inf, np.nan, 0.0]), dtype="bfloat16")
    np.testing.assert_array_equal(ends.numpy(np.float32), [np.inf, -np.inf, np.inf, np.nan, 0.0])


@needs_gpu
def test_what_a_device_array_refuses():
    a = fr.device_array(np.zeros((2, 3), np.float32))
    with pytest.raises(TypeError, match=r"is on cuda:0; copy it to the host with \.numpy\(\)"):
        np.asarray(a)
    for key in ([0, 1], True, (0, False)):
        with pytest.raises(TypeError, match="an index must be an integer, a slice, None or"):
            a[key]
    with pytest.raises(ValueError, match="only C-contiguous arrays reshape"):
        a.swapaxes(0, 1).reshape(6)
    with pytest.raises(ValueError, match=r"value must have shape \(3,\), got \(2,\)"):
        a[0] = np.zeros(2, np.float32)
    with pytest.raises(TypeError, match="value must have dtype float32, got float64"):
        a[0] = np.zeros(3)
    with pytest.raises(TypeError, match="array must have dtype float32, .*float16 or bfloat16, got int64"):
        fr.device_array(np.zeros(3, np.int64))
    with pytest.raises(TypeError, match="array must have dtype .*, got complex128"):
        fr.device_array(np.zeros(3, complex), dtype=np.float32)
    with pytest.raises(TypeError, match="dtype must be float32, float64, float16 or bfloat16, got int64"):
        fr.device_array(np.zeros(3), dtype=np.int64)
    with pytest.raises(TypeError, match="array must be a plain numpy.ndarray, got its subclass MaskedArray"):
        fr.device_array(np.ma.masked_array(np.zeros(3), True))
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


class _Torchs:
    """An array of PyTorch's, as that lends it: from its current device only, for a stream's plain number."""

    __module__ = "torch.fake"
    device = "cuda:1"
    current: list[str] = []

    def __dlpack__(self, *, stream=None, max_version=None):
        if type(stream) is not int:
            raise TypeError("stream must be int or none")
        if self.current != [self.device]:
            raise BufferError("on a different device")
        return stream


def test_pytorch_is_asked_on_the_arrays_device_and_with_a_plain_number(monkeypatch):
    @contextlib.contextmanager
    def device(which):
        _Torchs.current.append(which)
        yield
        _Torchs.current.remove(which)

    torch = types.ModuleType("torch")
    torch.cuda = types.SimpleNamespace(device=device)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(_device_interop, "emulated", lambda: False)
    for stream, given in ((5, 5), (0, 1)):
        handle = _device_array.StreamHandle(stream, None)
        assert _device_interop._capsule("lstm", "x", _Torchs(), handle) == given
    assert not _Torchs.current


@needs_gpu
@pytest.mark.skipif(EMULATED, reason="PyTorch's streams are a real GPU's")
def test_a_call_runs_on_pytorchs_current_stream():
    torch = pytest.importorskip("torch")
    call = draw(gpu_case(state="zeros"))
    x, dy = (torch.from_numpy(a).cuda() for a in (call.x, call.dy))
    torch.cuda.synchronize()

    def compute():
        y, _, tape = call.layer.forward(x)
        grads = call.layer.backward(tape, dy)
        return {"y": y.cpu().numpy(), "dx": grads.x.cpu().numpy(), "flat": grads.flat.cpu().numpy()}

    want = compute()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert_same_bits(compute(), want)


class _Pinned(_Lender):
    """An array in the host's memory that is locked for a GPU."""

    def __dlpack__(self, **_):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return 3, 0


@needs_gpu
def test_pinned_memory_is_the_hosts():
    call = draw(gpu_case(state="zeros", given="y"))
    lengths = np.array([T, 1, T - 1][:B] + [T] * (B - 3))
    want = call.layer(call.x, lengths=lengths)[0]
    assert_same_bits({"y": call.layer(call.x, lengths=_Pinned(lengths, {}))[0]}, {"y": want})
    state = {name: _Pinned(a.numpy(), {}) for name, a in call.layer.params.items()}
    other = fr.LSTM(I, H, device="cuda", seed=9)
    other.load_state_dict(state)
    assert_same_bits({"flat": other.flat_params.numpy()}, {"flat": call.layer.flat_params.numpy()})
    with pytest.raises(ValueError, match="x must be on cuda:0, .* got an array on cpu"):
        call.layer(_Pinned(call.x, {}))


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
def test_what_is_not_aligned_to_its_elements_is_refused():
    call = draw(gpu_case(given="y", state="zeros"))
    x = on_device(call.x)
    address = x.__cuda_array_interface__["data"][0]
    shifted = _Interface(x, data=(address + 2, False))
    between = _Interface(x, strides=(x.strides[0], x.strides[1] + 1, 4))
    for wrong in (shifted, between):
        with pytest.raises(ValueError, match="lstm: x must be aligned to its elements of 4 bytes, got"):
            call.layer(wrong)


@needs_gpu
@pytest.mark.skipif(not EMULATED, reason="there is no stream 7")
def test_a_call_runs_on_the_stream_that_its_array_is_ready_on(monkeypatch):
    call = draw(gpu_case(state="zeros"))
    x = _Interface(on_device(call.x), stream=7)
    cuda, seen = _cuda_module.module(), []
    for name in ("wait", "expect_no_capture"):
        monkeypatch.setattr(cuda, name, lambda *_: None)
    monkeypatch.setattr(cuda, "synchronize", lambda _, stream: seen.append(("waited for", stream)))
    monkeypatch.setattr(cuda, "forward", lambda spec, index, stream, *_: seen.append(("ran on", stream)))
    y, _ = call.layer(x)
    assert seen == [("ran on", 7), ("waited for", 7)]
    assert y._memory.stream.keeps is x  # which may be what keeps the stream alive


@needs_gpu
def test_a_subclass_of_a_librarys_arrays_is_that_librarys():
    torch = pytest.importorskip("torch")

    class Named(torch.Tensor):
        pass

    call = draw(gpu_case(state="zeros"))
    x = torch.from_numpy(call.x).to("cpu" if EMULATED else "cuda")
    y, _ = call.layer(x.as_subclass(Named))
    assert isinstance(y, torch.Tensor)
    assert_same_bits({"y": y.cpu().numpy()}, {"y": call.layer(call.x)[0]})


@needs_gpu
@pytest.mark.parametrize("of", ["layer", "frozen", "stream"])
def test_memory_of_another_stream_is_taken_after_its_work_and_given_back_after_the_call(monkeypatch, of):
    call = draw(gpu_case())
    frozen = call.layer.freeze()
    stream = frozen.stream(B)
    x, other, waits = on_device(call.x), 7, []
    cuda = _cuda_module.module()
    monkeypatch.setattr(cuda, "wait", lambda _, waiter, before: waits.append((waiter, before)))
    memory = call.layer.flat_params if of == "layer" else frozen._panels
    monkeypatch.setattr(memory._memory, "stream", other)
    {"layer": call.layer, "frozen": frozen, "stream": lambda x: stream.step(x[0])}[of](x)
    assert waits == [(0, other), (other, 0)]


class _CupysStream:
    """A stream as CuPy has it: gone with its object."""

    ptr = 0


class _Cupys(_Lender):
    __module__ = "cupy.fake"


@needs_gpu
@pytest.mark.parametrize(("handle", "stream"), [(0, 0), (1, 0), (2, 0), (77, 77)])
def test_cupys_default_streams_are_one(monkeypatch, handle, stream):
    current = types.SimpleNamespace(ptr=handle)
    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(get_current_stream=lambda index: current)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    found = _device_interop.library(_Cupys(fr.device_array(np.zeros(2)), {}), 0)
    assert found.stream == stream and found.stream.keeps is current and not found.waits


@needs_gpu
def test_a_streams_state_is_copied_after_what_made_it_and_before_it_may_change(monkeypatch):
    call = draw(gpu_case())
    stream = call.layer.freeze().stream(B)
    h = fr.device_array(np.arange(H * B, dtype=np.float32).reshape(1, H, B)).swapaxes(1, 2)  # not contiguous
    waits, other, cuda = [], 7, _cuda_module.module()
    monkeypatch.setattr(cuda, "wait", lambda _, waiter, before: waits.append((waiter, before)))
    monkeypatch.setattr(h._memory, "stream", other)
    stream.state = (h, None)
    assert waits == [(0, other), (other, 0)]
    np.testing.assert_array_equal(stream.state[0].numpy(), np.arange(H * B).reshape(1, H, B).swapaxes(1, 2))


@needs_gpu
def test_a_streams_state_belongs_to_who_steps_it():
    stream = draw(gpu_case()).layer.freeze().stream(B)
    x = np.zeros((B, I), np.float32)
    with stream._kernel._alone("step"):  # as while a step runs
        for use in (stream.reset, lambda: stream.state):
            with pytest.raises(RuntimeError, match=r"^stream\.state: another thread is using this stream"):
                use()
        with pytest.raises(RuntimeError, match=r"^stream\.step: another thread is using this stream"):
            stream.step(x)
    stream.reset()


@needs_gpu
@pytest.mark.parametrize("kept", ["y", "state", "tape", "grads", "out", "stream"])
def test_what_a_call_leaves_keeps_its_stream_alive(monkeypatch, kept):
    current = [_CupysStream()]
    gone = weakref.ref(current[0])
    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(get_current_stream=lambda index: current[0])
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
