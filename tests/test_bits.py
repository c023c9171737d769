"""Promises of equal bits: ways through a layer, thread counts, batches, repetition."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from bound import (
    OFFERED,
    Case,
    as_tuple,
    assert_same_bits,
    at_host,
    draw,
    make_layer,
    run,
    run_function,
    there,
)
from devices import every_device, every_place, host, numpy_dtype, put, sized
from hypothesis import given, settings, strategies as st

import fusedrnn as fr

every_cell = pytest.mark.parametrize("cell", OFFERED)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])
every_lengths = pytest.mark.parametrize("ragged", [False, True], ids=["full", "lengths"])
THREADS = (1, 2, 3, 5)


def outputs(y, final):
    return {"y": y, **dict(zip(("h_n", "c_n"), as_tuple(final), strict=False))}


def in_chunks(step, x, cuts, state):
    """y and the final state of step(part, state) -> (y, state) over the parts of x between the cuts."""
    parts = []
    for start, end in pairwise([0, *cuts, len(x)]):
        y, state = step(x[start:end], state)
        parts.append(y)
    return outputs(np.concatenate(parts), state)


# --- Ways through a layer -----------------------------------------------------------------------------------


@every_cell
@every_dtype
def test_calls_steps_and_chunks(cell, dtype):
    sizes = st.sampled_from(
        [(40, 1, 5, 33), (24, 3, 17, 16), (30, 8, 1, 70), (9, 13, 40, 7), (20, 2, 64, 96)]
    )

    @settings(max_examples=12, derandomize=True, deadline=None, database=None)
    @given(sizes, st.integers(1, 3), st.booleans(), st.integers(1, 3), st.lists(st.floats(0, 1), max_size=6))
    def check(sizes, L, bias, threads, cuts):
        T, B, I, H = sizes
        call = draw(Case(cell, dtype, T, B, I, H, L, bias=bias))
        layer, x, state = call.layer, call.x, call.state
        cuts = sorted(int(cut * T) for cut in cuts)  # equal cuts give parts of no steps
        want = outputs(*layer(x, state))
        with fr.num_threads(threads):
            frozen = layer.freeze()
            stream, other = frozen.stream(B), frozen.stream(B)
            stream.state = other.state = state
            steps = np.stack([stream.step(x_t) for x_t in x])
            filled = np.empty_like(steps)
            for x_t, row in zip(x, filled, strict=True):
                assert other.step(x_t, row) is row
            assert_same_bits(outputs(*layer.forward(x, state)[:2]), want)
            assert_same_bits(outputs(*frozen(x, state)), want)
            assert_same_bits(outputs(steps, stream.state), want)
            assert_same_bits(outputs(filled, other.state), want)
            assert_same_bits(in_chunks(layer, x, cuts, state), want)
            assert_same_bits(in_chunks(frozen, x, cuts, state), want)
            assert_same_bits(in_chunks(lambda x, s: layer.forward(x, s)[:2], x, cuts, state), want)

    check()


@every_cell
@every_place
@every_lengths
@pytest.mark.parametrize("L, D", [(1, 1), (1, 2), (2, 2), (3, 1)])
def test_calls_out_and_batch_first(cell, device, dtype, ragged, L, D):
    T, B, I, H = sized(device, (11, 6, 7, 35), (4, 5, 3, 20))
    case = Case(cell, dtype, T, B, I, H, L, D, ragged=ragged, device=device)
    call = there(draw(case))
    layer, args = call.layer, (call.x, call.state, call.lengths)

    def result(y, final):
        return at_host(outputs(y, final))

    want = result(*layer(*args))
    first = make_layer(case._replace(batch_first=True))
    for way in (layer, layer.freeze(), lambda *a, **k: layer.forward(*a, **k)[:2]):
        assert_same_bits(result(*way(*args)), want)
        frame = put(device, np.full((T + 1, B + 1, D * H + 3), np.nan, numpy_dtype(dtype)))
        out = frame[1:, 1:, 2:-1]
        assert_same_bits(result(*way(*args, out=out)), want)
        assert_same_bits({"y": host(out)}, {"y": want["y"]})
    for way in (first, first.freeze(), lambda *a, **k: first.forward(*a, **k)[:2]):
        y, final = way(call.x.swapaxes(0, 1), *args[1:])
        assert_same_bits(result(y.swapaxes(0, 1), final), want)


@every_cell
def test_streams_with_threads_and_the_state_set_between_steps(cell):
    """Large enough for a step to use several threads, whose number changes from step to step."""
    call = draw(Case(cell, "float32", 24, 4, 64, 192, L=2))
    want = outputs(*call.layer(call.x, call.state))
    stream = call.layer.freeze().stream(4)
    stream.state = call.state
    y = np.empty_like(want["y"])
    for t, x_t in enumerate(call.x):
        with fr.num_threads(THREADS[t % 4]):
            stream.step(x_t, y[t])
        stream.state = stream.state
    assert_same_bits(outputs(y, stream.state), want)


# --- Threads ------------------------------------------------------------------------------------------------


@every_cell
@every_dtype
@every_lengths
@pytest.mark.parametrize("L, D, B, H", [(1, 1, 1, 200), (2, 1, 13, 72), (2, 2, 13, 72), (1, 2, 37, 45)])
def test_thread_counts(cell, dtype, ragged, L, D, B, H):
    call = draw(Case(cell, dtype, 9, B, 33, H, L, D, ragged=ragged))
    results = []
    for threads in THREADS:
        with fr.num_threads(threads):
            results.append({**run(call), "call": call.layer(call.x, call.state, call.lengths)[0]})
    for other in results[1:]:
        assert_same_bits(other, results[0])


@every_cell
@every_lengths
def test_thread_counts_when_many_rows_are_reduced_and_accumulated(cell, ragged):
    call = draw(Case(cell, "float32", 70, 130, 9, 40, ragged=ragged, state="zeros", given="y"))
    results = []
    for threads in THREADS:
        with fr.num_threads(threads):
            _, _, tape = call.layer.forward(call.x, lengths=call.lengths)
            grads = call.layer.backward(tape, call.dy, retain=True)
            once = grads.flat.copy()
            call.layer.backward(tape, call.dy, accumulate_into=grads)
            results.append({"once": once, "twice": grads.flat, "x": grads.x})
    for other in results[1:]:
        assert_same_bits(other, results[0])


@every_cell
@every_lengths
def test_thread_counts_in_reverse(cell, ragged):
    case = Case(cell, "float32", 9, 13, 33, 72, ragged=ragged)
    call = draw(case)
    results = []
    for threads in THREADS:
        with fr.num_threads(threads):
            results.append(run_function(fr, case, call, reverse=True))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@every_cell
def test_the_default_number_of_threads(cell):
    call = draw(Case(cell, "float32", 6, 13, 33, 72, 2, 2))
    before, results = fr.get_num_threads(), []
    try:
        for threads in THREADS:
            fr.set_num_threads(threads)
            results.append(run(call))
    finally:
        fr.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(other, results[0])


@every_cell
def test_repetition(cell):
    call = draw(Case(cell, "float32", 9, 13, 33, 72, 2, 2, ragged=True))
    with fr.num_threads(2):
        want = run(call)
        for _ in range(8):
            assert_same_bits(run(call), want)


@every_cell
@every_device
def test_python_threads_share_a_frozen_layer_and_a_layer(cell, device):
    T, I, H = sized(device, (12, 24, 72), (3, 2, 5))
    batches = sized(device, (1, 3, 5, 16, 20, 2), (1, 3, 5))
    calls = [
        draw(Case(cell, "float32", T, B, I, H, 2, 2, ragged=B > 3, seed=B, device=device)) for B in batches
    ]
    shared = calls[0].layer
    frozen = shared.freeze()
    calls = [call._replace(layer=shared) for call in calls]
    with fr.num_threads(1):
        want = [run(call) for call in calls]

    def work(k):
        with fr.num_threads(1 + k % 3):
            for n in range(sized(device, 10, 2)):
                i = (k + n) % len(calls)
                call = calls[i]
                final = {name: want[i][name] for name in ("y", "h_n", "c_n") if name in want[i]}
                assert_same_bits(outputs(*frozen(call.x, call.state, call.lengths)), final)
                assert_same_bits(run(call), want[i])
        return k

    tasks = range(sized(device, 8, 4))
    with ThreadPoolExecutor(4) as executor:
        assert list(executor.map(work, tasks)) == list(tasks)


# --- Batches ------------------------------------------------------------------------------------------------


@every_cell
@every_dtype
@every_lengths
@pytest.mark.parametrize("L, D", [(1, 1), (2, 2)])
def test_a_sequence_alone_and_in_a_batch_of_37(cell, dtype, ragged, L, D):
    case = Case(cell, dtype, 9, 37, 21, 45, L, D, ragged=ragged)
    call = draw(case)
    layer = call.layer
    want = outputs(*layer(call.x, call.state, call.lengths))

    def rows(state, chosen):
        return tuple(s[:, chosen] for s in state) if isinstance(state, tuple) else state[:, chosen]

    for b in range(37):
        n = call.lengths[b] if ragged else 9
        y, final = layer(call.x[:n, b : b + 1], rows(call.state, slice(b, b + 1)))
        in_batch = {k: a[:n, b : b + 1] if k == "y" else a[:, b : b + 1] for k, a in want.items()}
        assert_same_bits(outputs(y, final), in_batch)
        assert not want["y"][n:, b].any()
    chosen = np.random.default_rng(3).permutation(37)[:10]
    lengths = [call.lengths[b] for b in chosen] if ragged else None
    some = outputs(*layer(call.x[:, chosen], rows(call.state, chosen), lengths))
    assert_same_bits(some, {k: a[:, chosen] for k, a in want.items()})


@every_cell
@every_lengths
def test_a_reversed_sequence_alone_and_in_a_batch_of_37(cell, ragged):
    case = Case(cell, "float32", 9, 37, 21, 45, ragged=ragged)
    call = draw(case)
    _, options, name = OFFERED[cell]
    form = getattr(fr, name)
    weights, states = call.layer.params.values(), [s[0] for s in as_tuple(call.state)]
    y, *final = form(call.x, *weights, *states, lengths=call.lengths, reverse=True, **options)
    for b in range(37):
        n = call.lengths[b] if ragged else 9
        alone, *ends = form(call.x[:n, b], *weights, *(s[b] for s in states), reverse=True, **options)
        assert_same_bits(outputs(alone, tuple(ends)), outputs(y[:n, b], tuple(s[b] for s in final)))
