"""Layers, frozen layers, tapes and streams in the hands of several threads.

A free-threaded Python runs them at once.
"""

import copy
import pickle
import threading

import numpy as np
import pytest

import fusedrnn as fr

THREADS, T, B, I, H = 6, 20, 4, 9, 33


def together(work):
    """work(i) in THREADS threads that start at the same time: their results, or what they raised."""
    barrier, results = threading.Barrier(THREADS), [None] * THREADS

    def run(i):
        barrier.wait()
        try:
            results[i] = work(i)
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def layer(cell, make_layer):
    return make_layer(cell, I, H, num_layers=2)


@pytest.fixture
def x(normal):
    return normal(T, B, I)


def test_all_forms_of_a_layer(layer, x):
    want, frozen = layer(x)[0], layer.freeze()

    def work(i):
        with fr.num_threads(1 + i % 3):
            assert fr.get_num_threads() == 1 + i % 3
            return (layer(x), frozen(x), layer.forward(x))[i % 3][0]

    for y in together(work):
        np.testing.assert_array_equal(y, want)


def test_copies_are_made_while_others_compute(layer, x):
    want, frozen = layer(x)[0], layer.freeze()

    def work(i):
        source = (layer, frozen)[i % 2]
        return (pickle.loads(pickle.dumps(source)) if i < 3 else copy.deepcopy(source))(x)[0]

    for y in together(work):
        np.testing.assert_array_equal(y, want)


def test_each_backward_of_a_retained_tape(layer, x):
    y, _, tape = layer.forward(x)
    dy = np.ones_like(y)
    want = layer.backward(tape, dy, retain=True).flat
    for grads in together(lambda i: layer.backward(tape, dy, retain=True)):
        np.testing.assert_array_equal(grads.flat, want)


def test_a_stream_takes_one_step_at_a_time(layer, x):
    stream = layer.freeze().stream(B)
    uses = (
        lambda x_t: stream.step(x_t),
        lambda x_t: stream.state,
        lambda x_t: pickle.dumps(stream),
        lambda x_t: stream.reset(),
    )

    def work(i):
        done = 0
        for x_t in x:
            try:
                uses[max(0, i - 2)](x_t)
                done += 1
            except RuntimeError as error:
                assert "stream" in str(error)
        return done

    assert sum(together(work)) > 0
    stream.reset()
    np.testing.assert_array_equal([stream.step(x_t) for x_t in x], layer(x)[0])


def test_layers_come_and_go(layer, x):
    want = type(layer)(I, 8, seed=0)(x)[0]
    for y in together(lambda i: [type(layer)(I, 8, seed=0)(x)[0] for _ in range(4)][-1]):
        np.testing.assert_array_equal(y, want)
