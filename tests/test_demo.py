"""The demo and the command line: what they write, print and refuse."""

import importlib.util
import io
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fusedrnn as fr
from fusedrnn import _charmodel, demo
from fusedrnn._charmodel import CharModel, softmax_cross_entropy
from fusedrnn._cli import main

SOURCES = Path(demo.__file__), Path(_charmodel.__file__)  # some 20 kB of text that is always at hand


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.py"
    path.write_text("".join(source.read_text(encoding="utf-8") for source in SOURCES), encoding="utf-8")
    return path


@pytest.fixture
def small(text, tmp_path) -> list[str]:
    """Arguments of a demo of a few seconds."""
    options = ["--hidden", "48", "--updates", "200", "--sample", "80", "--out", tmp_path / "out"]
    return ["demo", "--text", *map(str, (text, *options))]


@pytest.fixture
def interrupting(monkeypatch):
    """interrupting(n, times): the n-th update is hit by so many Ctrl-C."""

    def arrange(update: int, times: int) -> None:
        calls, clip = 0, fr.clip_grad_norm

        def clip_and_interrupt(grads, max_norm):
            nonlocal calls
            calls += 1
            for _ in range(times if calls == update else 0):
                signal.raise_signal(signal.SIGINT)
            return clip(grads, max_norm)

        monkeypatch.setattr(fr, "clip_grad_norm", clip_and_interrupt)

    return arrange


def hide(monkeypatch, *packages: str) -> None:
    """Lets the demo find all packages but these."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else find(name))


def reported(out: str) -> tuple[float, float]:
    """Held-out bits per character and the order-0 entropy, as printed."""
    found = re.search(r"held-out +([\d.]+) bits per character .*order-0 entropy: ([\d.]+)\)", out)
    return float(found[1]), float(found[2])


@pytest.mark.parametrize(
    ("cell", "layers", "dtype"), [("lstm", 1, "float32"), ("gru", 2, "float64"), ("rnn", 1, "float32")]
)
def test_demo_learns_saves_reloads_and_samples(cell, layers, dtype, small, tmp_path, capsys):
    assert main([*small, "--cell", cell, "--layers", str(layers), "--dtype", dtype]) == 0
    out = capsys.readouterr().out
    loss, order0 = reported(out)
    assert loss < order0
    assert "reloaded, its held-out loss is identical" in out
    report, sample = out.split("one stream.step() a character\n\n")
    assert len(sample) == 80 + 1
    saved = CharModel.load(tmp_path / "out" / "model.npz")
    assert (saved.cell, saved.rnn.num_layers, saved.rnn.dtype) == (cell, layers, dtype)


def test_demo_repeats_exactly(small, tmp_path, capsys):
    models = []
    for _ in range(2):
        assert main([*small, "--updates", "20", "--seed", "5"]) == 0
        models.append(CharModel.load(tmp_path / "out" / "model.npz"))
    for first, second in zip(models[0].params, models[1].params, strict=True):
        np.testing.assert_array_equal(first, second)


def test_demo_in_a_process_of_its_own_on_the_standard_library(tmp_path):
    command = [sys.executable, "-m", "fusedrnn", "demo", "--seconds", "2", "--hidden", "32", "--sample", "40"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, encoding="utf-8", env=None, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "the standard library of Python" in done.stdout
    assert "Traceback" not in done.stderr
    assert "bits/char" in done.stderr
    assert (tmp_path / "fusedrnn-demo" / "model.npz").is_file()


def test_demo_draws_the_loss_curve(small, tmp_path):
    pytest.importorskip("matplotlib")
    assert main([*small, "--updates", "5"]) == 0
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_demo_needs_neither_tqdm_nor_matplotlib_nor_threadpoolctl(small, tmp_path, monkeypatch, capsys):
    hide(monkeypatch, "tqdm", "matplotlib", "threadpoolctl")
    assert main([*small, "--updates", "20"]) == 0
    captured = capsys.readouterr()
    assert "not drawn: matplotlib is not installed" in captured.out
    lines = captured.err.splitlines()
    assert [line[:4] for line in lines] == ["  5%", *(f"{tenth * 10:3}%" for tenth in range(1, 11))]
    assert all(re.search(r"[\d.]+ bits/char, [\d,]+ chars/s$", line) for line in lines)
    assert not (tmp_path / "out" / "loss.png").exists()


def test_demo_shows_a_bar_where_tqdm_is_installed(small, capsys):
    pytest.importorskip("tqdm")
    assert main([*small, "--updates", "3"]) == 0
    assert re.search(r"100%\|█+\|.* [\d.]+ bits/char, [\d,]+ chars/s", capsys.readouterr().err)


def test_ctrl_c_ends_training_and_the_demo_goes_on(small, tmp_path, capsys, interrupting):
    before = signal.getsignal(signal.SIGINT)
    interrupting(update=3, times=1)
    assert main([*small, "--batch", "4"]) == 0
    out = capsys.readouterr().out
    assert f"trained   {3 * 4 * demo.STEPS:,} characters" in out
    assert "reloaded, its held-out loss is identical" in out
    assert (tmp_path / "out" / "model.npz").is_file()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_the_demo(small, tmp_path, capsys, interrupting):
    interrupting(update=3, times=2)
    assert main(small) == 130
    assert capsys.readouterr().err.endswith("fusedrnn demo: interrupted\n")
    assert not (tmp_path / "out" / "model.npz").exists()


@pytest.mark.parametrize("updates", ["1", "30"], ids=["at the end", "on the way"])
def test_training_that_diverges_says_so_and_saves_nothing(updates, small, tmp_path, capsys):
    assert main([*small, "--updates", updates, "--learning-rate", "1e42"]) == 2
    message = "error: training diverged: the held-out loss is nan; try a lower --learning-rate, got 1e+42\n"
    err = capsys.readouterr().err
    assert err.endswith(f"fusedrnn demo: {message}")
    assert updates == "1" or "100%" not in err
    assert not (tmp_path / "out" / "model.npz").exists()


def test_a_model_that_reloads_differently_is_an_error(small, monkeypatch, capsys):
    load = CharModel.load

    def load_wrongly(path):
        model = load(path)
        model.bias[0] += 1
        return model

    monkeypatch.setattr(CharModel, "load", load_wrongly)
    assert main([*small, "--updates", "2"]) == 2
    assert "model.npz: the reloaded model's held-out loss is" in capsys.readouterr().err


def test_sample_takes_the_likeliest_character_at_temperature_0():
    model = CharModel("lstm", 16, 2, demo.UNKNOWN + "\nabc", np.dtype("float64"), seed=0)
    model.rnn.flat_params[:] *= 4  # weights that make it wander
    drawn = "".join(demo.sample(model, "ab\n", 12, 0.0, np.random.default_rng(0)))
    ids = model.encode("ab\n" + drawn)
    y, _ = model.rnn(model.one_hot[ids[:-1]][:, None])
    np.testing.assert_array_equal(model.logits(y)[2:].argmax(axis=1), ids[3:])
    assert len(set(drawn)) > 1


def test_sample_at_temperature_1_follows_the_models_odds():
    model = CharModel("rnn", 4, 1, demo.UNKNOWN + "\nab", np.dtype("float64"), seed=0)
    model.weight[:] = 0
    model.bias[:] = np.log([0.01, 0.19, 0.3, 0.5])
    drawn = "".join(demo.sample(model, "a", 4000, 1.0, np.random.default_rng(0)))
    # Five standard deviations of a count of n draws: 5 * sqrt(p (1 - p) / n) <= 0.04
    assert [drawn.count(c) / 4000 for c in "\nab"] == pytest.approx([0.19, 0.3, 0.5], abs=0.04)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_gradients_of_the_model_agree_with_finite_differences(cell, rng):
    model = CharModel(cell, 5, 2, demo.UNKNOWN + "abcdef", np.dtype("float64"), seed=1)
    ids = rng.integers(7, size=(6, 3))
    loss, _, grads = model.loss_and_gradients(ids, None)
    assert loss == pytest.approx(model.loss(ids, None)[0], rel=1e-12)
    for param, grad in zip(model.params, grads, strict=True):
        along = rng.standard_normal(param.shape)
        at, step, losses = param.copy(), 1e-5, []
        for sign in (1, -1):
            param[...] = at + sign * step * along
            losses.append(model.loss(ids, None)[0])
        param[...] = at
        # The central difference errs by step**2 times a third derivative and by eps / step.
        assert np.sum(grad * along) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-6, abs=1e-8)


def test_softmax_cross_entropy_of_large_logits_stays_finite():
    loss, dlogits = softmax_cross_entropy(np.array([[1e4, 0, -1e4]], np.float32), np.array([1]))
    assert loss == 1e4
    np.testing.assert_array_equal(dlogits, [[1, -1, 0]])


def test_adam_follows_its_paper(rng):
    param, betas, eps = rng.standard_normal(4), (0.8, 0.9), 1e-3
    expected, m, v = param.copy(), np.zeros(4), np.zeros(4)
    adam = demo.Adam([param], lr=0.1, betas=betas, eps=eps)
    for t in range(1, 5):
        g = rng.standard_normal(4)
        adam.step([g])
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        expected -= 0.1 * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
    np.testing.assert_allclose(param, expected, rtol=1e-12)


def test_windows_give_every_step_its_target_once():
    streams = demo.in_streams(np.arange(1000), 4)
    np.testing.assert_array_equal(streams.T.ravel(), np.arange(1000))
    seen = np.concatenate([ids[1:] for ids in demo.windows(streams)])
    np.testing.assert_array_equal(seen, streams[1:])
    assert all(ids.shape == (demo.STEPS + 1, 4) for ids in list(demo.windows(streams))[:-1])


def test_rare_characters_become_one_symbol(tmp_path):
    path = tmp_path / "text"
    common = "".join(map(chr, range(1000, 1000 + demo.VOCABULARY_LIMIT)))
    path.write_text(common * 20 + "é" + common * 3, encoding="utf-8")
    text = demo.read_text(path, seed=0)
    assert text.vocabulary == demo.UNKNOWN + common
    model = CharModel("rnn", 2, 1, text.vocabulary, np.dtype("float32"), seed=0)
    np.testing.assert_array_equal(model.encode(common[0] + "é" + common[-1]), [1, 0, demo.VOCABULARY_LIMIT])


WRONG_ARGUMENTS = [
    ([], "the following arguments are required: COMMAND"),
    (["dance"], "invalid choice: 'dance'"),
    (["demo", "--hidden", "0"], "argument --hidden: must be a positive integer, got '0'"),
    (["demo", "--layers", "1.5"], "argument --layers: must be a positive integer, got '1.5'"),
    (["demo", "--batch", "-3"], "argument --batch: must be a positive integer, got '-3'"),
    (["demo", "--seconds", "nan"], "argument --seconds: must be a positive number, got 'nan'"),
    (["demo", "--seconds", "inf"], "argument --seconds: must be a positive number, got 'inf'"),
    (["demo", "--seed", "-1"], "argument --seed: must be an integer of 0 or more, got '-1'"),
    (["demo", "--temperature", "-1"], "argument --temperature: must be a number of 0 or more, got '-1'"),
    (["demo", "--cell", "mlp"], "argument --cell: invalid choice: 'mlp'"),
    (["demo", "--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
]


@pytest.mark.parametrize(("argv", "message"), WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def bad_texts(folder: Path) -> dict[str, Path]:
    latin1, short = folder / "latin1.txt", folder / "short.txt"
    latin1.write_bytes("naïve ".encode("latin-1") * 500)
    short.write_text("too little")
    return {
        "not UTF-8 text (byte 2: invalid continuation byte)": latin1,
        "needs at least 1,000 characters, has 10": short,
        "No such file or directory": folder / "none.txt",
        "Is a directory": folder,
    }


@pytest.mark.skipif(sys.platform == "win32", reason="Windows words its errors otherwise")
def test_unusable_texts_are_one_line(tmp_path, capsys):
    for message, path in bad_texts(tmp_path).items():
        assert main(["demo", "--text", str(path), "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err == f"fusedrnn demo: error: --text {path}: {message}\n"


def test_an_output_folder_that_is_a_file_is_one_line(text, capsys):
    assert main(["demo", "--text", str(text), "--out", str(text)]) == 2
    assert capsys.readouterr().err == f"fusedrnn demo: error: --out {text}: File exists\n"


@pytest.mark.parametrize(
    ("hidden", "message"),
    [("1000000000", "more than can be addressed"), ("100000000", "out of memory: ")],
)
def test_a_model_too_large_is_one_line(hidden, message, small, capsys):
    assert main([*small, "--hidden", hidden]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_what_stdout_cannot_show_is_replaced(command, small, text, monkeypatch):
    bench = "bench --quick --cell rnn --what forward --shape 3,4,5,6 --peers none".split()
    text.write_text("äöü" * 1000, encoding="utf-8")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main([*small, "--updates", "1"] if command == "demo" else bench) == 0
    stdout.flush()
    assert b"?" in stdout.buffer.getvalue()


def test_info_prints_the_configuration(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    fr.show_config()
    assert printed == capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"fusedrnn {fr.__version__}\n"


def test_help_imports_no_command():
    code = "import sys; from fusedrnn._cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('fusedrnn.demo', 'fusedrnn.bench') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "train a character-level language model" in done.stdout
    assert done.stdout.endswith("[]\n")


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is another error there")
def test_a_reader_that_leaves_early_causes_no_traceback(small):
    process = subprocess.Popen(
        [sys.executable, "-m", "fusedrnn", *small, "--updates", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
    assert b"Traceback" not in err
    assert b"BrokenPipe" not in err
