"""Every example runs in its quick mode, and what it prints is what it promises."""

import copy
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from devices import EMULATED, PROBLEM

import fusedrnn as fr

EXAMPLES = Path(__file__).parents[1] / "examples"
README = EXAMPLES.parent / "README.md"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are not part of the package")


def run(name: str, *options: str, cwd: Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), "--quick", *options]
    done = subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8", timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown_by_readme(heading: str) -> dict:
    """Runs the first block of Python under a heading; gives the names that it leaves."""
    text = README.read_text(encoding="utf-8")
    code = re.search(rf"## {heading}\n+```python\n(.*?)```", text, re.DOTALL)[1]
    names: dict = {"fr": fr}
    exec(code, names)
    return names


def torch_on_our_gpu():
    torch = pytest.importorskip("torch")
    if PROBLEM or EMULATED or not torch.cuda.is_available():
        pytest.skip("PyTorch's tensors and ours must lie on one GPU")
    return torch


def test_what_readme_shows_on_cuda():
    torch = torch_on_our_gpu()
    names = shown_by_readme("On an NVIDIA GPU")
    assert names["y"].shape == (100, 16, 128) and names["y"].dtype == torch.bfloat16
    assert names["grads"].flat.is_cuda and names["frozen"].device == "cuda:0"


def test_what_readme_shows():
    names = shown_by_readme("Use")
    assert names["y"].shape == (100, 16, 2 * 128)
    assert names["grads"].flat.shape == names["lstm"].flat_params.shape
    assert names["h"].shape == (64,)


def test_every_example_is_tested():
    tested = {"forecast.py", "gradient_flow.py", "many_to_many.py", "many_to_one.py", "torch_autograd.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_gradient_flow(tmp_path):
    out = run("gradient_flow.py", cwd=tmp_path)
    table = re.findall(r"^(RNN|LSTM|GRU)(.*?)((?: +\d+e[+-]\d+)+)$", out, re.MULTILINE)
    norms = {cell + panel.rstrip(): [float(number) for number in row.split()] for cell, panel, row in table}
    assert len(norms) == 5
    # After 60 steps: the plain RNN vanishes at the smallest weights and explodes at the largest, half-open
    # gates vanish as well, open ones keep the gradient within a few powers of ten at every scale.
    assert norms["RNN (tanh)"][0] < 1e-8
    assert norms["RNN (tanh)"][-1] > 1e4
    assert norms["LSTM"][0] < 1e-8
    assert norms["GRU"][0] < 1e-8
    assert all(1e-3 < norm < 1e5 for norm in norms["LSTM, forget gate open"])
    assert all(1e-1 < norm < 1e2 for norm in norms["GRU, update gate open"])
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "gradient_flow.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert "matplotlib is not installed" in out


def test_many_to_one(tmp_path):
    out = run("many_to_one.py", cwd=tmp_path)
    right = re.search(r"([\d.]+)% of 2,000 new sequences classified right", out)
    assert float(right[1]) > 90  # guessing: 25


def test_many_to_many(tmp_path):
    out = run("many_to_many.py", cwd=tmp_path)
    right = re.search(r"([\d.]+)% of 50 sums of 500 bits right in every bit", out)
    assert float(right[1]) > 90  # one bit wrong in 500 makes a sum wrong
    a, b, total = (int(number.replace(",", "")) for number in re.findall(r"\d[\d,]{10,}", out))
    assert a + b == total


def test_forecast(tmp_path):
    out = run("forecast.py", cwd=tmp_path)
    errors = re.findall(r"^(.+?)  +([\d.]+)$", out, re.MULTILINE)
    by_name = {name: float(error) for name, error in errors}
    # The baselines are facts of the series, not of this package.
    assert by_name["same as this year"] == 30.4
    assert by_name["autoregression of order 2"] == 19.0
    assert by_name["order 2 and 2 GRUs"] < by_name["autoregression of order 2"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_torch_autograd(device, tmp_path):
    pytest.importorskip("torch")
    if device == "cuda":
        torch_on_our_gpu()
    out = run("torch_autograd.py", "--device", device, cwd=tmp_path)
    apart = re.search(r"gradients of 13,643 parameters differ by (\S+) of their norm", out)
    assert float(apart[1]) < 1e-5
    losses = [(float(a), float(b)) for a, b in re.findall(r"loss (\S+) torch.nn.LSTM, (\S+) fusedrnn", out)]
    assert len(losses) == 5
    assert all(a == pytest.approx(b, rel=0.02) for a, b in losses)
    assert losses[-1][1] < losses[0][1] / 2


def test_what_a_part_of_autograd_refuses(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from torch_autograd import Fused

    fused = Fused(fr.LSTM(3, 4, dropout=0.5, num_layers=2, seed=0))
    x = torch.ones(2, 1, 3, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(fused(x), torch.from_numpy(fused.layer(x.detach().numpy())[0]))
    (grad,) = torch.autograd.grad((fused(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    fused.flat.requires_grad_(False)
    fused(x).sum().backward()
    assert x.grad is not None and fused.flat.grad is None
    with pytest.raises(RuntimeError, match="its parameter is the layer's memory no longer"):
        copy.deepcopy(fused)(x)
