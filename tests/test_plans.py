"""Whatever a plan is overridden with, every result keeps its bits."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from itertools import product

import numpy as np
import pytest
from bound import OFFERED, Case, assert_same_bits, draw, run
from hypothesis import given, settings, strategies as st

import fusedrnn as fr
from fusedrnn import _core

every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


@pytest.fixture(autouse=True, scope="module")
def own_plans_again():
    yield
    _core.override_plan()


@contextmanager
def plan(row_threads=0, unit_threads=0, chunk_steps=0, chunk_rows=0, teams=0, ranges=0, fused=0, prefetch=0):
    _core.override_plan(row_threads, unit_threads, chunk_steps, chunk_rows, teams, ranges, fused, prefetch)
    try:
        yield
    finally:
        _core.override_plan()


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
@every_dtype
@pytest.mark.parametrize(
    "shape", [(7, 13, 9, 70, False), (11, 5, 30, 53, True), (5, 40, 3, 37, True)], ids=["full", "few", "many"]
)
def test_every_plan_of_a_grid(cell, dtype, shape):
    T, B, I, H, ragged = shape
    call = draw(Case(cell, dtype, T, B, I, H, ragged=ragged))
    with fr.num_threads(1):
        want = run(call)
    # chunk_steps acts on forward alone and chunk_rows on backward alone, so they need not be crossed.
    # Only chunks of one step can be fused (1), or not (2).
    chunks = [(1, B, 1), (1, 0, 2), (2, B + 1, 0), (3, 2 * B, 0), (T - 1, 3 * B + 1, 0), (T, T * B, 0)]
    chunks.append((0, 0, 0))
    # Panels are prefetched in every other plan: seven chunks are an odd number, so each of them and each cut
    # meets both.
    with fr.num_threads(9):
        for number, (row_threads, unit_threads, chunk) in enumerate(product((1, 2, 3), (1, 2, 3), chunks)):
            chunk_steps, chunk_rows, fused = chunk
            prefetch = 1 + number % 2
            with plan(row_threads, unit_threads, chunk_steps, chunk_rows, fused=fused, prefetch=prefetch):
                assert_same_bits(run(call), want)


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
@pytest.mark.parametrize(
    "threads, row_threads, unit_threads", [(16, 1, 16), (33, 1, 33), (64, 4, 16), (64, 7, 9), (64, 8, 8)]
)
def test_teams_larger_than_this_machine(cell, threads, row_threads, unit_threads):
    """More threads than cores, and barriers of several rounds."""
    call = draw(Case(cell, "float32", 4, 9, 5, 33 * 16, ragged=True))
    with fr.num_threads(1):
        want = run(call)
    with fr.num_threads(threads), plan(row_threads, unit_threads):
        assert_same_bits(run(call), want)


@pytest.mark.parametrize("cell", OFFERED)
@every_dtype
def test_drawn_plans(cell, dtype):
    sizes = st.builds(
        Case, st.just(cell), st.just(dtype), st.integers(1, 12), st.integers(1, 24), st.integers(1, 40),
        st.integers(1, 100), st.integers(1, 4), st.integers(1, 2), st.booleans(), st.booleans(),
        st.just("given"), st.just("both"), st.just(0.0), st.just(False), st.integers(0, 99), st.just("cpu"),
    )  # fmt: skip
    plans = st.tuples(
        st.integers(0, 4), st.integers(0, 4), st.integers(0, 13), st.integers(0, 300), st.integers(0, 4),
        st.integers(0, 7), st.integers(0, 2), st.integers(0, 2),
    )  # fmt: skip

    @settings(max_examples=20, derandomize=True, deadline=None, database=None)
    @given(sizes, plans, plans, st.integers(2, 6))
    def check(case, first, second, threads):
        call = draw(case)
        with fr.num_threads(1):
            want = run(call)
        with fr.num_threads(threads):
            for values in (first, second):
                with plan(*values):
                    assert_same_bits(run(call), want)

    check()


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_weights_beyond_the_second_cache_level_are_packed_by_rows(cell):
    """4.2 MB and more, for two threads; what packs them also takes the checksums of the next test."""
    call = draw(Case(cell, "float32", 2, 3, 400, 410, state="zeros", given="y"))
    with fr.num_threads(1):
        want = run(call)
    with fr.num_threads(2):
        assert_same_bits(run(call), want)


@pytest.mark.parametrize("sizes", [(9, 37), (400, 410)], ids=["by columns", "by rows"])
def test_change_of_any_weight_is_seen_by_any_number_of_threads(sizes):
    layer = fr.LSTM(*sizes, seed=0)
    with fr.num_threads(1):
        y, _, tape = layer.forward(np.ones((2, 3, sizes[0]), np.float32))
    for name, row, column in product(("weight_ih_l0", "weight_hh_l0"), (0, 70, -1), (0, 5, -1)):
        view = layer.params[name]
        was = view[row, column]
        view[row, column] = np.nextafter(was, np.float32(1))
        for threads in (1, 2, 3):
            with fr.num_threads(threads), pytest.raises(RuntimeError, match="changed"):
                layer.backward(tape, y)
        view[row, column] = was
    with fr.num_threads(3):
        layer.backward(tape, y)


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
@every_dtype
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_every_wavefront(cell, dtype, ragged, threads):
    """Three layers over teams and ranges of steps, down to ranges of two steps."""
    call = draw(Case(cell, dtype, 11, 7, 19, 70, 3, ragged=ragged))
    with fr.num_threads(1):
        want = run(call)
    with fr.num_threads(threads):
        for teams, ranges, row_threads in product((1, 2, 3), (2, 3, 5), (1, 2)):
            with plan(row_threads, teams=teams, ranges=ranges):
                assert_same_bits(run(call), want)


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
@every_dtype
def test_chunks_of_backward_and_the_blocks_of_its_reductions(cell, dtype):
    """Sums over more than 4096 rows, whose blocks a chunk may cut anywhere."""
    call = draw(Case(cell, dtype, 75, 130, 5, 33, ragged=True, state="zeros", given="y"))
    assert sum(call.lengths) > 4096
    with fr.num_threads(1):
        want = run(call)
    for threads, chunk_rows in ((1, 130), (2, 131), (1, 1000), (3, 4095), (1, 4096), (2, 4097), (1, 9750)):
        with fr.num_threads(threads), plan(chunk_rows=chunk_rows):
            assert_same_bits(run(call), want)


def traced(code):
    """A process that runs `code` and prints its plans."""
    env = {**os.environ, "FUSEDRNN_TRACE": "1"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)


def test_calls_that_try_one_thread_and_two():
    """Of a size for which the model sees little between them; with a second core 24 of 40 are a trial."""
    code = (
        "import numpy as np, fusedrnn as fr; fr.set_num_threads(2); f = fr.LSTM(64, 64, seed=0).freeze(); "
        "x = np.random.default_rng(0).standard_normal((100, 1, 64)).astype(np.float32); "
        "print(len({f(x)[0].tobytes() for _ in range(40)}))"
    )
    run = traced(code)
    assert run.stdout.strip() == "1"  # the same bits
    assert run.stderr.count("threads as measured") == 40


def test_trace_prints_the_plan_and_the_estimate_beside_the_time():
    code = (
        "import numpy as np, fusedrnn as fr; layer = fr.GRU(5, 7, num_layers=2, seed=0); "
        "x = np.ones((3, 2, 5), np.float32); y, _, tape = layer.forward(x); layer.backward(tape, y)"
    )
    lines = traced(code).stderr.splitlines()
    order = (("forward", 0), ("forward", 1), ("backward", 1), ("backward", 0))
    titles = [line.split(":")[1].strip() for line in lines]
    assert titles == [f"{which} gru layer {layer}" for which, layer in order]
    for line in lines:
        assert re.search(r"T=3 B=2 I=\d H=7 float32, \S+: \d+ row x \d+ unit threads", line)
        assert re.search(r"expected \d+ us, took \d+$", line)


def test_trace_prints_a_streams_plan_where_it_changes():
    code = (
        "import numpy as np, fusedrnn as fr; fr.set_num_threads(2); "
        "stream = fr.LSTM(256, 256, seed=0).freeze().stream(); x = np.ones((1, 256), np.float32)\n"
        "for _ in range(4000): stream.step(x)"
    )
    lines = traced(code).stderr.splitlines()
    plan = (
        r"fusedrnn: stream lstm layer 0: T=1 B=1 I=256 H=256 float32, \S+: 1 row x (\d) unit threads, "
        r"1 steps or \d+ rows a chunk[^;]*; expected \d+\.\d us a step(?:, being measured)?"
    )
    threads = [re.fullmatch(plan, line).group(1) for line in lines]
    assert threads[0] == "1"
    assert all(a != b for a, b in zip(threads, threads[1:], strict=False))


def test_trace_prints_a_wavefront():
    code = (
        "import time, numpy as np, fusedrnn as fr; from fusedrnn import _core; fr.set_num_threads(2); "
        "_core.override_plan(teams=2, ranges=3); layer = fr.RNN(5, 7, num_layers=2, seed=0); "
        "x = np.ones((9, 2, 5), np.float32)\n"
        "for _ in range(40): y, _, tape = layer.forward(x); layer.backward(tape, y); time.sleep(0.01)"
    )
    lines = traced(code).stderr.splitlines()
    for which in ("forward", "backward"):  # a call beside busy processes may run on one thread
        at = next(i for i, line in enumerate(lines) if line.startswith(f"fusedrnn: {which} rnn_tanh: "))
        assert re.fullmatch(
            rf"fusedrnn: {which} rnn_tanh: 2 layers as a wavefront of 2 teams over 3 ranges of steps; "
            r"expected \d+ us, took \d+",
            lines[at],
        )
        for layer in (0, 1):
            assert f"fusedrnn: {which} rnn_tanh layer {layer}: T=9" in lines[at - 2 + layer]
            assert " in a wavefront, " in lines[at - 2 + layer]
