"""Layers on a GPU: moves, copies, streams, where things may be, what is refused."""

import copy
import itertools
import os
import pickle
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from bound import (
    OFFERED,
    as_tuple,
    assert_same_bits,
    assert_within_bound,
    at_host,
    draw,
    named,
    run,
    there,
)  # fmt: skip
from devices import EMULATED, PROBLEM, exact, host, needs_gpu, numpy_dtype, on_device, path
from gpu_cases import B, H, I, T, every_cell, every_gpu_dtype, gpu_case, python, results

import fusedrnn as fr
from fusedrnn import _cuda_module, _dtypes

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
    assert copy.deepcopy(frozen_there) is frozen_there and frozen_there.nbytes > moved.flat_params.nbytes


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
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_frozen_layer_packs_its_weights_once(dtype):
    frozen = fr.LSTM(I, H, 2, bidirectional=True, seed=0, device="cuda", dtype=dtype).freeze()
    x = fr.device_array(np.ones((T, B, I), np.float32), "cuda", dtype)
    assert exact(frozen(x)[0]).any()
    one_way = fr.LSTM(I, H, 2, seed=0, device="cuda", dtype=dtype).freeze()
    stream = one_way.stream(B)
    assert exact(stream.step(x[0])).any()
    for packed in frozen._panels, one_way._panels:
        packed[...] = fr.device_array(np.zeros(packed.shape, np.float32), "cuda", dtype)
    assert not exact(frozen(x)[0]).any()  # without W_ih and biases, c stays 0
    stream.reset()
    assert not exact(stream.step(x[0])).any()


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


@pytest.fixture
def fault():
    """A function that makes the n-th launch from now on a faulty one, whose failure later calls report."""
    if PROBLEM is not None or not EMULATED:
        pytest.skip(PROBLEM or "a GPU does not recover from a fault")
    yield _cuda_module.module().fault_after
    _cuda_module.module().fault_after(-1)


@needs_gpu
def test_a_failure_on_the_gpu_is_told_at_a_later_call_with_its_origin(fault):
    call = draw(gpu_case())
    given = there(call)
    for launches in itertools.count():  # until the fault comes with the last launch
        fault(launches)
        try:
            call.layer(given.x, given.state)
            break
        except RuntimeError as error:
            assert "cudaErrorIllegalAddress" in str(error)
    passes = f"forward of lstm \\(float32, T={T}, B={B}, H={H}, num_layers=1\\) on cuda:0"
    with pytest.raises(RuntimeError, match=f"IllegalAddress .*the last one launched was .*{passes}"):
        fr.device_array(call.x)
    fault(-1)
    assert_same_bits({"y": host(call.layer(given.x)[0])}, {"y": call.layer(call.x)[0]})


@needs_gpu
@pytest.mark.parametrize("kind", ["arrays", "numpy"])
def test_what_was_added_in_part_is_not_added_twice(fault, kind):
    call = draw(gpu_case(L=2, state="zeros"))
    given = there(call) if kind == "arrays" else call  # numpy's are added to in a copy
    layer, dy = call.layer, given.dy
    seen = set()
    for launches in itertools.count():
        *_, tape = layer.forward(given.x)
        into = layer.backward(layer.forward(given.x)[-1], dy)
        once = exact(into.flat)
        fault(launches)
        try:
            layer.backward(tape, dy, accumulate_into=into)
            break
        except RuntimeError as error:
            fault(-1)
            in_part = "accumulate_into has been added to in part" in str(error)
        seen.add(in_part)
        if in_part:
            with pytest.raises(RuntimeError, match="tape was used up by a backward pass that failed or"):
                layer.backward(tape, dy)
        else:
            np.testing.assert_array_equal(exact(into.flat), once)
            if kind == "numpy" and repr(tape) == "Tape(used)":  # the results did not arrive
                continue
            layer.backward(tape, dy, accumulate_into=into)
            np.testing.assert_allclose(exact(into.flat), 2 * once, rtol=1e-5, atol=1e-6)
    assert seen == ({False, True} if kind == "arrays" else {False})


@pytest.mark.skipif(not EMULATED, reason="the emulation can be any machine")
@pytest.mark.parametrize(
    ("machine", "text", "info"),
    [
        ({"GPUS": 0}, "cuda: the NVIDIA driver finds no GPU", "finds no GPU"),
        ({"GPUS": -1}, "cuda: CUDA cannot be initialised, as a rule because this process was", "forked"),
        ({"DRIVER": 0}, "cuda: no NVIDIA driver was found", "no NVIDIA driver"),
        ({"DRIVER": 12020}, "supports CUDA 12.2, but CUDA 13.0 or later is needed: update", "12.2"),
        ({"CAPABILITY": 75}, "has compute capability 7.5, but 8.0 or later is needed", "(sm_75, too old)"),
    ],
)
def test_a_machine_that_cannot_says_why(machine, text, info):
    code = """if True:
        import fusedrnn as fr
        try:
            fr.LSTM(2, 3, device="cuda")
        except RuntimeError as error:
            print(error)
        print(fr.show_config("dict")["cuda"])"""
    got = python(code, **{f"FUSEDRNN_EMULATED_{key}": str(value) for key, value in machine.items()})
    assert text in got.splitlines()[0] and info in got.splitlines()[1]


def _refused(layer, f, a, w, wrong):
    """Calls with one wrong argument each: `a` has x, y and a state, `w` are the functional form's weights."""
    *_, tape = layer.forward(a.x)
    *_, form = fr.lstm_forward(a.x, *w)
    yield lambda: layer(wrong(a.x))
    yield lambda: layer(a.x, (wrong(a.h), a.h))
    yield lambda: layer(a.x, (a.h, wrong(a.h)))
    yield lambda: layer(a.x, lengths=[T + 1] * B)
    yield lambda: layer(a.x, lengths=[0])
    yield lambda: layer(a.x, out=wrong(a.y))
    yield lambda: layer.backward(tape, wrong(a.y))
    yield lambda: layer.backward(tape, a.y, (wrong(a.h), None))
    yield lambda: layer.backward(tape, a.y, (a.h, wrong(a.h)))
    yield lambda: layer.backward(tape)
    yield lambda: f(wrong(a.x), *w)
    for i in range(4):
        yield lambda i=i: f(a.x, *w[:i], wrong(w[i]), *w[i + 1 :])
    yield lambda: f(a.x, *w[:3])
    yield lambda: f(a.x, *w, wrong(a.h[0]))
    yield lambda: f(a.x, *w, None, wrong(a.h[0]))
    yield lambda: f(a.x, *w, a.h[0], a.h[0], [T + 1] * B)
    yield lambda: f(a.x, *w, out=wrong(a.y))
    yield lambda: fr.lstm_backward(form, wrong(a.y))
    yield lambda: fr.lstm_backward(form, a.y, wrong(a.h[0]))
    yield lambda: fr.lstm_cell(a.x[0], wrong(a.h[0]), None, *w)


@needs_gpu
@pytest.mark.parametrize("wrong", ["shape", "dtype"])
def test_arrays_there_are_refused_as_on_the_cpu_before_any_launch(wrong, monkeypatch):
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    cpu = fr.LSTM(I, H, seed=0)
    at_cpu = SimpleNamespace(x=drawn(T, B, I), y=drawn(T, B, H), h=drawn(1, B, H))
    at_gpu = SimpleNamespace(**{k: on_device(v) for k, v in vars(at_cpu).items()})
    # None of the functional form's arrays is contiguous, so that each would be copied by a kernel.
    weights = [np.asfortranarray(drawn(*s)) for s in ((4 * H, I), (4 * H, H))]
    weights += [drawn(8 * H)[::2] for _ in range(2)]
    there_weights = [on_device(w) for w in weights]
    spoils = {
        "shape": (lambda a: a[..., :-1], lambda a: a[..., :-1]),
        "dtype": (lambda a: a.astype(np.float64), lambda a: on_device(host(a).astype(np.float64))),
    }[wrong]
    made = [
        list(_refused(layer, fr.lstm, arrays, w, spoil))
        for layer, arrays, w, spoil in zip(
            (cpu, cpu.to("cuda")), (at_cpu, at_gpu), (weights, there_weights), spoils, strict=True)
    ]  # fmt: skip
    launched = []
    cuda = _cuda_module.module()
    for name in ("forward", "backward"):
        monkeypatch.setattr(cuda, name, lambda *_, name=name: launched.append(name))
    copy_there = cuda.copy
    monkeypatch.setattr(cuda, "copy", lambda *a: launched.append("copy") or copy_there(*a))
    real = fr.DeviceArray._host
    monkeypatch.setattr(fr.DeviceArray, "_host", lambda a: _unseen(launched, real, a))
    for on_cpu, on_gpu in zip(*made, strict=True):
        with pytest.raises((TypeError, ValueError)) as expected:
            on_cpu()
        with pytest.raises(expected.type) as got:
            on_gpu()
        assert str(got.value).partition(";")[0] == str(expected.value).partition(";")[0]
        assert not launched, str(got.value)


def _unseen(launched, real, array):
    """What the test itself copies to the host is not counted."""
    before = list(launched)
    made = real(array)
    launched[:] = before
    return made


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
@pytest.mark.parametrize("wrong", ["4G", "-1", "1e9", "99999999999999999999"])
def test_what_the_pool_keeps_is_a_number_of_bytes(wrong):
    code = """if True:
        import numpy as np, fusedrnn as fr
        try:
            fr.LSTM(3, 4, device="cuda")(np.zeros((2, 1, 3), np.float32))
        except ValueError as error:
            print(error)"""
    told = f"FUSEDRNN_CUDA_POOL_BYTES must be a number of bytes, got '{wrong}'\n"
    assert python(code, FUSEDRNN_CUDA_POOL_BYTES=wrong) == told
    assert python(code, FUSEDRNN_CUDA_POOL_BYTES="0") == ""


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
        assert text == "not built" or text.startswith(("built for ", "CUDA "))
