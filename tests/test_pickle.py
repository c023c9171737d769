"""Copies: layers, frozen layers and streams pickle, deepcopy and share what they should and nothing else."""

import copy
import pickle
import threading

import numpy as np
import pytest
from bound import as_tuple
from devices import every_device, host, shares_memory, sized

import fusedrnn as fr

T, B, I, H = 6, 3, 4, 5
COPIES = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "protocol 2": lambda thing: pickle.loads(pickle.dumps(thing, protocol=2)),
    "deepcopy": copy.deepcopy,
}


@pytest.fixture(params=COPIES)
def copied(request):
    return COPIES[request.param]


def test_layers(cell, device, dtype, copied, make_layer, normal):
    layer = make_layer(cell, I, H, 2, True, True, 0.5, True, dtype=dtype, device=device)
    other = copied(layer)
    x = normal(B, T, I, dtype=dtype)
    assert repr(other) == repr(layer) and type(other) is type(layer)
    np.testing.assert_array_equal(host(other.flat_params), host(layer.flat_params))
    assert not shares_memory(other.flat_params, layer.flat_params)
    assert all(shares_memory(view, other.flat_params) for view in other.params.values())
    for got, want in zip(as_tuple(other(x)), as_tuple(layer(x)), strict=True):
        np.testing.assert_array_equal(as_tuple(got), as_tuple(want))
    np.testing.assert_array_equal(other.forward(x)[0], layer.forward(x)[0])  # the same generator of masks
    other.params["bias_hh_l0"] = np.zeros(layer.params["bias_hh_l0"].shape, dtype)
    assert host(layer.params["bias_hh_l0"]).any()


class Scaled(fr.GRU):
    def __init__(self, scale, *args, **options):
        super().__init__(*args, **options)
        self.scale = scale


@every_device
def test_subclasses_keep_what_they_add(copied, device):
    other = copied(Scaled(3, I, H, reset_after=False, device=device))
    assert other.device.startswith(device)
    assert type(other) is Scaled and other.scale == 3 and other.cell == "gru_reset_before"


@every_device
def test_layers_from_read_only_buffers_can_be_trained(device):
    layer = fr.LSTM(I, H, seed=0, device=device)
    buffers = []
    data = pickle.dumps(layer, protocol=5, buffer_callback=buffers.append)
    other = pickle.loads(data, buffers=[bytes(b.raw()) for b in buffers])
    other.flat_params[:] = np.zeros(other.flat_params.shape, np.float32)
    assert host(layer.flat_params).all() and not host(other.flat_params).any()


@every_device
def test_a_layer_pickles_its_parameters_once(device):
    layer = fr.LSTM(64, 64, device=device)
    assert len(pickle.dumps(layer)) < layer.flat_params.nbytes + 2000


# --- Frozen ---------------------------------------------------------------------------------------


def test_frozen_layers_give_the_layers_bits_and_keep_their_own_weights(
    cell, device, dtype, make_layer, normal
):
    layer = make_layer(cell, I, H, 2, bidirectional=True, dtype=dtype, device=device)
    frozen, x = layer.freeze(), normal(T, B, I, dtype=dtype)
    y, state = layer(x)
    layer.flat_params[:] = np.zeros(layer.flat_params.shape, dtype)
    got, final = frozen(x)
    np.testing.assert_array_equal(got, y)
    np.testing.assert_array_equal(as_tuple(final), as_tuple(state))
    assert frozen.nbytes >= layer.flat_params.nbytes
    assert not any(view.flags.writeable for view in frozen.params.values())
    state_dict = frozen.state_dict()
    state_dict["weight_hh_l0"][...] = np.zeros(state_dict["weight_hh_l0"].shape, dtype)
    assert host(frozen.params["weight_hh_l0"]).any()


def test_frozen_layers_pickle_their_weights_and_not_their_panels(cell, device, make_layer, normal):
    frozen = make_layer(cell, 32, 64, device=device).freeze()
    weights = sum(view.nbytes for view in frozen.params.values())
    data = pickle.dumps(frozen)
    assert len(data) < weights + 2000
    x, other = normal(T, B, 32), pickle.loads(data)
    assert repr(other) == repr(frozen) and other.nbytes == frozen.nbytes
    np.testing.assert_array_equal(other(x)[0], frozen(x)[0])
    assert copy.copy(frozen) is frozen and copy.deepcopy(frozen) is frozen


def test_frozen_layers_are_shared_between_threads(cell, device, make_layer, normal):
    frozen = make_layer(cell, I, sized(device, 40, 8), 2, device=device).freeze()
    inputs = [normal(sized(device, 30, 3), b, I) for b in (1, 2, 5, 9)]
    want = [frozen(x)[0] for x in inputs]
    got = [None] * len(inputs)

    def work(k):
        for _ in range(sized(device, 10, 2)):
            got[k] = frozen(inputs[k])[0]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


# --- Streams --------------------------------------------------------------------------------------


def test_steps_give_the_bits_of_one_call(cell, dtype, make_layer, normal):
    layer = make_layer(cell, I, H, 2, dtype=dtype)
    x = normal(T, B, I, dtype=dtype)
    y, final = layer(x)
    stream = layer.freeze().stream(B)
    assert stream.batch_size == B
    buffer = np.empty((B, H), dtype)
    for t in range(T):
        if t % 2:
            assert stream.step(x[t], out=buffer) is buffer
            np.testing.assert_array_equal(buffer, y[t])
        else:
            np.testing.assert_array_equal(stream.step(x[t]), y[t])
    np.testing.assert_array_equal(as_tuple(stream.state), as_tuple(final))


def test_a_stream_of_one_takes_vectors(make_layer, cell, normal):
    frozen, x = make_layer(cell, I, H).freeze(), normal(T, I)
    want, _ = frozen(x)
    vectors, rows = frozen.stream(), frozen.stream(1)
    for t in range(T):
        h = vectors.step(x[t])
        assert h.shape == (H,)
        np.testing.assert_array_equal(h, want[t])
        np.testing.assert_array_equal(rows.step(x[t : t + 1]), want[t : t + 1])


def test_the_state_of_a_stream_is_a_copy_and_can_be_set(cell, device, make_layer, normal):
    stream = make_layer(cell, I, H, 2, device=device).freeze().stream(B)
    x, zeros = normal(T, B, I), stream.state
    assert all(not s.any() and s.shape == (2, B, H) for s in map(host, as_tuple(zeros)))
    first = stream.step(x[0])
    middle = stream.state
    second = stream.step(x[1])
    stream.state = middle
    np.testing.assert_array_equal(stream.step(x[1]), second)
    for s in as_tuple(middle):
        s[...] = np.full(s.shape, np.nan, np.float32)
    assert not any(np.isnan(host(s)).any() for s in as_tuple(stream.state))
    for start_again in (
        stream.reset,
        lambda: setattr(stream, "state", None),
        lambda: setattr(stream, "state", zeros),
    ):
        start_again()
        for got, want in zip(as_tuple(stream.state), as_tuple(zeros), strict=True):
            np.testing.assert_array_equal(host(got), host(want))
        np.testing.assert_array_equal(stream.step(x[0]), first)


@every_device
def test_half_a_state_can_be_set(device, normal):
    stream = fr.LSTM(I, H, seed=0, device=device).freeze().stream(B)
    h = normal(1, B, H)
    stream.step(normal(B, I))
    stream.state = (h, None)
    np.testing.assert_array_equal(host(stream.state[0]), h)
    assert not host(stream.state[1]).any()


def test_streams_continue_where_their_copy_was_made(cell, device, copied, make_layer, normal):
    frozen = make_layer(cell, I, H, 2, device=device).freeze()
    stream, x = frozen.stream(B), normal(T, B, I)
    stream.step(x[0])
    other = copied(stream)
    assert other.batch_size == B and repr(other) == repr(stream)
    for got, want in zip(as_tuple(other.state), as_tuple(stream.state), strict=True):
        np.testing.assert_array_equal(host(got), host(want))
    want = stream.step(x[1])
    stream.reset()
    np.testing.assert_array_equal(other.step(x[1]), want)


@every_device
def test_streams_of_one_frozen_layer_pickle_it_once(device):
    frozen = fr.LSTM(64, 64, device=device).freeze()
    weights = sum(view.nbytes for view in frozen.params.values())
    assert len(pickle.dumps([frozen.stream() for _ in range(5)])) < weights + 20_000


@every_device
def test_a_stream_keeps_its_frozen_layer_alive(device, normal):
    x = normal(T, 1, I)
    layer = fr.GRU(I, H, seed=0, device=device)
    other = layer.freeze().stream()
    want = [other.step(x_t) for x_t in x]
    stream = layer.freeze().stream()
    step = stream.step
    del stream
    for t in range(T):
        np.testing.assert_array_equal(step(x[t]), want[t])


def test_a_second_concurrent_step_raises():
    stream = fr.RNN(256, 512, seed=0).freeze().stream(256)
    x = np.zeros((256, 256), np.float32)
    stop, refused = threading.Event(), []

    def work():
        while not stop.is_set():
            try:
                stream.step(x)
            except RuntimeError as error:
                refused.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(5000):
            try:
                stream.step(x)
            except RuntimeError as error:
                refused.append(error)
            if refused:
                break
    finally:
        stop.set()
        thread.join()
    assert refused and "step" in str(refused[0])
    assert stream.step(x).shape == (256, 512)
