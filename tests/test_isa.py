"""What is decided once per process: the ISA, the threads at its start and after a fork."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fusedrnn import _core

ISAS = _core.available_isas()
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and an affinity")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

# On one core threads yield to each other at once; on more, a long wait sends the next calls to one thread.
ONE_CORE = "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"


def start(code, **environment):
    """Run code in a fresh interpreter that finds bound.py; it must end by itself."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FUSEDRNN_")}
    # From Python 3.12 on, fork warns in a process with threads: it cannot know that ours survive it.
    warnings = "-W", "error", "-W", "ignore:This process (pid=:DeprecationWarning"
    return subprocess.run(
        [sys.executable, *warnings, "-c", textwrap.dedent(code)], cwd=Path(__file__).parent,
        env={**kept, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def succeeds(code, **environment):
    done = start(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- ISA ----------------------------------------------------------------------------------------------------

CHECK = """
    from itertools import product
    from bound import OFFERED, Case, assert_same_bits, assert_within_bound, draw, run, run_reference
    import fusedrnn as fr

    for cell, dtype in product(OFFERED, ("float32", "float64")):
        for sizes in ((5, 1, 7, 1), (3, 4, 1, 16), (6, 9, 17, 33), (9, 13, 20, 70, 2, 2), (2, 30, 5, 100)):
            for ragged in (False, True):
                case = Case(cell, dtype, *sizes, ragged=ragged)
                call = draw(case)
                with fr.num_threads(1):
                    got = run(call)
                assert_within_bound(got, run_reference(call), case)
                y, frozen = call.layer(call.x, call.state, call.lengths)[0], call.layer.freeze()
                assert_same_bits({"y": y}, {"y": got["y"]})
                if not ragged and case.D == 1:
                    stream = frozen.stream(case.B)
                    stream.state = call.state
                    for t, x_t in enumerate(call.x):
                        assert_same_bits({"y": stream.step(x_t)}, {"y": y[t]})
                with fr.num_threads(3):
                    assert_same_bits(run(call), got)
    print(fr.show_config(mode="dict")["isa"])
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_gives_the_reference_and_keeps_its_bits(isa):
    assert succeeds(CHECK, FUSEDRNN_ISA=isa) == isa


def test_the_best_isa_is_the_default():
    code = "from fusedrnn import _core; print(_core.isa(), *_core.available_isas())"
    isa, *available = succeeds(code).split()
    assert isa == available[0] and available == ISAS
    assert succeeds(code, FUSEDRNN_ISA="").split()[0] == isa


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx2 "])
def test_an_unknown_isa_is_an_error_that_names_the_known_ones(name):
    code = "import numpy, fusedrnn; fusedrnn.LSTM(2, 3)(numpy.zeros((1, 1, 2), numpy.float32))"
    done = start(code, FUSEDRNN_ISA=name)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0
    assert last == f"ValueError: FUSEDRNN_ISA must be one of {', '.join(ISAS)} on this CPU, got '{name}'"


# --- Threads ------------------------------------------------------------------------------------------------


def test_the_environment_sets_the_number_of_threads():
    code = "import fusedrnn as fr; print(fr.get_num_threads())"
    assert succeeds(code, FUSEDRNN_NUM_THREADS="3") == "3"
    assert succeeds(code, FUSEDRNN_NUM_THREADS="1") == "1"
    assert int(succeeds(code)) >= 1
    for wrong in ("abc", "0", "-1", "2 3"):
        env = {**os.environ, "FUSEDRNN_NUM_THREADS": wrong}
        failed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert failed.returncode == 1
        expected = f"FUSEDRNN_NUM_THREADS must be a number of threads from 1 to 1024, got '{wrong}'"
        assert f"ValueError: {expected}" in failed.stderr


@linux
def test_affinity_limits_the_number_of_threads():
    code = "import fusedrnn as fr; print(fr.get_num_threads())"
    assert succeeds(ONE_CORE + code) == "1"
    assert int(succeeds(code)) <= len(os.sched_getaffinity(0))


@linux
def test_no_thread_starts_before_a_call_that_wants_one():
    code = """
        import numpy as np
        count = lambda: len(os.listdir("/proc/self/task"))
        before = count()
        import fusedrnn as fr
        assert count() == before, "at import"
        layer, x = fr.LSTM(64, 128), np.zeros((4, 16, 64), np.float32)
        with fr.num_threads(1):
            y, _, tape = layer.forward(x)
            layer.backward(tape, y)
            layer.freeze().stream().step(x[0, :1])
        assert count() == before, "with one thread"
        with fr.num_threads(3):
            layer(x)
        assert before < count() <= before + 2, "with three threads"
    """
    succeeds(ONE_CORE + textwrap.dedent(code))


OVERSUBSCRIBED = """
    from bound import OFFERED, Case, assert_same_bits, draw, run
    import fusedrnn as fr

    for cell in OFFERED:
        call = draw(Case(cell, "float32", 6, 13, 33, 150, 2, 2, ragged=True))
        with fr.num_threads(1):
            want = run(call)
        with fr.num_threads(8):
            assert_same_bits(run(call), want)
"""


def test_more_threads_than_cores():
    succeeds(OVERSUBSCRIBED)


@linux
def test_many_threads_on_one_core():
    succeeds(ONE_CORE + textwrap.dedent(OVERSUBSCRIBED))


# --- Fork ---------------------------------------------------------------------------------------------------

FORKS = """
    import os, signal, threading
    import fusedrnn as fr
    from bound import OFFERED, Case, assert_same_bits, draw, run

    def in_child(work):
        pid = os.fork()
        if pid == 0:
            signal.alarm(120)
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0, "the child failed or hung"

    fr.set_num_threads(2)
    call = draw(Case("gru_reset_before", "float32", 9, 13, 33, 72, 2, 2, ragged=True))
"""


@forks
def test_a_forked_child_starts_its_own_threads():
    succeeds(
        textwrap.dedent(FORKS)
        + textwrap.dedent(
            """
            want = run(call)
            stream = draw(Case("lstm", H=192, I=64)).layer.freeze().stream(4)

            def child():
                assert_same_bits(run(call), want)
                stream.step(draw(Case("lstm", I=64)).x[0])
                in_child(lambda: assert_same_bits(run(call), want))

            stream.step(draw(Case("lstm", I=64)).x[0])
            in_child(child)
            in_child(child)
            assert_same_bits(run(call), want)
            """
        )
    )


@forks
def test_a_fork_while_another_thread_computes():
    succeeds(
        textwrap.dedent(FORKS)
        + textwrap.dedent(
            """
            want, done, rounds = run(call), threading.Event(), []

            def work():
                while not done.is_set():
                    assert_same_bits(run(call), want)
                    rounds.append(1)

            thread = threading.Thread(target=work)
            thread.start()
            for _ in range(10):
                in_child(lambda: assert_same_bits(run(call), want))
            done.set()
            thread.join()
            assert rounds
            assert_same_bits(run(call), want)
            """
        )
    )


@linux
@forks
def test_a_forked_child_has_no_threads_until_it_computes():
    succeeds(
        ONE_CORE
        + textwrap.dedent(FORKS)
        + textwrap.dedent(
            """
            count = lambda: len(os.listdir("/proc/self/task"))
            run(call)
            assert count() >= 2

            def child():
                assert count() == 1
                run(call)
                assert count() == 2

            in_child(child)
            """
        ),
        OPENBLAS_NUM_THREADS="1",
    )


def test_a_daemon_thread_inside_a_kernel_does_not_abort_the_interpreter_at_exit():
    code = """
        import threading, time
        import numpy as np
        import fusedrnn as fr
        layer, x = fr.LSTM(32, 64, seed=0), np.zeros((50, 8, 32), np.float32)
        def work():
            while True:
                layer(x)
        for _ in range(2):
            threading.Thread(target=work, daemon=True).start()
        time.sleep(0.2)
        print("end")
    """
    assert succeeds(textwrap.dedent(code)) == "end"
