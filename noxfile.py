"""One command for each job: `nox -s tests`, and so on. `.ci/run` is what a change must pass."""

import nox

nox.options.sessions = ["tests", "lint", "typing"]
nox.options.reuse_existing_virtualenvs = True

PRESETS = ("release", "debug", "asan", "tsan", "aarch64")


@nox.session
def tests(session: nox.Session) -> None:
    """The Python tests; arguments go to pytest."""
    session.install(".[test,demo]")
    session.run("pytest", *session.posargs)


@nox.session
@nox.parametrize("preset", PRESETS, ids=PRESETS)
def native(session: nox.Session, preset: str) -> None:
    """The core without Python, plain, under sanitizers and cross-compiled; arguments go to ctest."""
    session.install("cmake", "ninja")
    session.run("cmake", "--preset", preset)
    session.run("cmake", "--build", "--preset", preset)
    session.run("ctest", "--preset", preset, *session.posargs)


@nox.session
def counts(session: nox.Session) -> None:
    """Instruction counts against those kept, under valgrind; `-- --write` keeps this run's."""
    session.install("cmake", "ninja")
    session.run("cmake", "--preset", "release")
    session.run("cmake", "--build", "--preset", "release", "--target", "count_cases")
    session.run("python", "tests/native/count_instructions.py", "build/release/count_cases", *session.posargs)


@nox.session
def emulated(session: nox.Session) -> None:
    """The tests of the GPU's kernels and their API, run on the CPU; arguments go to pytest."""
    session.install("-C", "cmake.define.FUSEDRNN_CUDA=EMULATED", ".[test]")
    session.run("pytest", "-k", "cuda or test_device", *session.posargs)


@nox.session
def peers(session: nox.Session) -> None:
    """The tests with the live oracles installed."""
    session.install(".[test,peers]")
    session.run("pytest", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmark against the peers; arguments go to `fusedrnn bench`."""
    session.install(".[plot,peers]")
    session.run("fusedrnn", "bench", "--peers", "torch,onnxruntime,jax", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    session.install("ruff==0.17.6", "clang-format==23.1.5")
    session.run("ruff", "check", *session.posargs)
    sources = session.run("git", "ls-files", "*.h", "*.cpp", "*.cu", "*.cuh", external=True, silent=True)
    session.run("clang-format", "--dry-run", "--Werror", *sources.split())


@nox.session
def typing(session: nox.Session) -> None:
    session.install("mypy==2.4.1", "numpy", "matplotlib", "onnx")  # those that ship types
    session.run("mypy", "--strict", "python/fusedrnn", "bench")
