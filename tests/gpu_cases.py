"""Small layers on a GPU, and what they give: what the tests of devices share."""

import os
import subprocess
import sys

import pytest
from bound import OFFERED, Case, named

T, B, I, H = 5, 3, 4, 6
every_cell = pytest.mark.parametrize("cell", OFFERED)
every_gpu_dtype = pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])


def gpu_case(cell="lstm", dtype="float32", **options):
    return Case(cell, dtype, T, B, I, H, device="cuda", **options)


def results(call, given):
    y, final, tape = call.layer.forward(given.x, given.state, given.lengths)
    grads = call.layer.backward(tape, given.dy, given.dstate)
    return named(y, final, grads.x, grads.state, dict(grads.params))


def python(code, **env):
    """What a fresh interpreter prints that runs `code`."""
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
