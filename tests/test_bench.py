"""`fusedrnn bench`: what it writes, what it refuses, that wrong answers are not timed. No time is judged."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from bench_runs import SHAPE, parse, run_quick

import fusedrnn as fr
from fusedrnn import bench
from fusedrnn._cli import CommandError, main
from fusedrnn.bench import gpu, measure, shapes
from fusedrnn.bench.peers import PEERS

INSTALLED = [name for name, peer in PEERS.items() if not peer.missing()]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", shapes.CELLS)
def test_result_holds_every_case(cell, dtype, tmp_path, capsys):
    result = run_quick(tmp_path / "bench.json", "--cell", cell, "--dtype", dtype, "--peers", "reference")
    printed = capsys.readouterr().out

    rows = result["cases"]
    assert [(row["work"], row["T"]) for row in rows] == [("forward", 4), ("train", 4), ("stream", 1)]
    gates = shapes.CELLS[cell].gates
    for row in rows:
        assert (row["cell"], row["dtype"], row["series"]) == (cell, dtype, "given")
        assert (row["B"], row["I"], row["H"]) == (3, 5, 6)
        assert row["flops"] == 2 * gates * 6 * (5 + 6) * 3 * row["T"] * (3 if row["work"] == "train" else 1)
        for entry in (row["ours"], row["peers"]["reference"]):
            seconds = entry["seconds"]
            assert 0 < seconds["min"] <= seconds["q1"] <= seconds["median"] <= seconds["q3"] <= seconds["max"]
            assert entry["gflops"] == pytest.approx(row["flops"] / seconds["median"] * 1e-9)
        assert row["peers"]["reference"]["ratio"]["median"] > 0
        assert row["peak_gflops"]["median"] > 0
        assert row["peak_share"]["median"] > 0
        assert row["best_peer"] is None  # the reference is no rival
        assert f"{row['B']},{row['T']},{row['I']},{row['H']}" in printed

    outputs = {
        name: set(row["difference"]["reference"]) for name, row in zip(("f", "t", "s"), rows, strict=True)
    }
    states = {"h_n", "c_n"} if cell == "lstm" else {"h_n"}
    assert outputs == {"f": {"y"} | states, "t": {"y", "dx", "dw_ih", "dw_hh", "db_ih", "db_hh"}, "s": {"h"}}


def test_machine_is_described_without_names_of_hosts_or_paths(tmp_path):
    result = run_quick(tmp_path / "bench.json", "--cell", "rnn", "--what", "forward", "--peers", "none")
    machine = result["machine"]
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert machine["isa"] == fr._core.isa()
    assert machine["versions"]["fusedrnn"] == fr.__version__
    assert machine["versions"]["numpy"] == np.__version__
    assert "/" not in json.dumps(machine)
    for cache in machine["caches"]:
        assert cache["level"] >= 1
        assert cache["bytes"] > 0
    assert [roof["gb_per_s"] > 0 for roof in result["roofs"]].count(False) == 0


@pytest.mark.parametrize("name", ["torch", "onnxruntime", "jax"])
@pytest.mark.parametrize("cell", shapes.CELLS)
def test_peer_agrees_or_says_what_it_lacks(name, cell, tmp_path, capsys):
    if name not in INSTALLED:
        pytest.skip(f"{name} is not installed")
    result = run_quick(tmp_path / "bench.json", "--cell", cell, "--peers", name)
    printed = capsys.readouterr().out
    for row in result["cases"]:
        lacks = (name, row["work"]) == ("onnxruntime", "train") or (name, cell) == (
            "torch",
            "gru_reset_before",
        )
        if lacks:
            assert row["absent"][name].startswith("has no ")
            assert f"-: {PEERS[name].label} {row['absent'][name]}" in printed
            assert row["best_peer"] is None
        else:
            assert row["best_peer"] == name
            assert row["peers"][name]["ratio"]["median"] > 0
            for output, difference in row["difference"][name].items():
                case = shapes.Case(
                    shapes.CELLS[cell], row["work"], *SHAPE[:1], row["T"], *SHAPE[2:], np.dtype("f4")
                )
                assert difference <= measure.bound(case, output)
    assert set(result["machine"]["versions"]) >= set(PEERS[name].needs)


def test_default_cases_are_the_standard_shapes():
    args = parse()
    todo = shapes.cases([shapes.CELLS["gru"]], args.what, args.shape, np.dtype("f4"), quick=False)
    assert [(c.B, c.T, c.I, c.H) for c in todo if c.work == "train"] == list(shapes.STANDARD)
    assert [c.H for c in todo if c.work == "stream"] == [16, 32, 64, 128, 256, 512, 1024]
    assert all(c.B == c.T == 1 and c.I == c.H for c in todo if c.work == "stream")
    both = [shapes.CELLS["gru"], shapes.CELLS["lstm"]]
    sweep = shapes.cases(both, ["sweep"], None, np.dtype("f4"), quick=False)
    assert {c.cell.name for c in sweep} == {"gru"}
    for letter in "TBH":
        varied = [c for c in sweep if c.series == letter]
        assert len({getattr(c, letter) for c in varied}) == len(varied) > 5
        for fixed in set("TBH") - {letter}:
            assert len({getattr(c, fixed) for c in varied}) == 1


def test_wrong_answer_is_an_error_and_nothing_is_timed(monkeypatch, capsys):
    peer = PEERS["reference"]
    right = peer.candidates

    def doubled(outputs):
        return outputs | {"y": outputs["y"] * 2}

    def wrong(problem, threads):
        for candidate in right(problem, threads):
            yield replace(candidate, outputs=partial(doubled, candidate.outputs()))

    monkeypatch.setattr(peer, "candidates", wrong)
    monkeypatch.setattr(measure, "timed", lambda candidate, *_: pytest.fail(f"timed {candidate.setting}"))
    for peers in ("reference", "none"):
        argv = parse("--quick", "--cell", "lstm", "--what", "forward", "--shape", "3,4,5,6", "--peers", peers)
        assert bench.run(argv) == 1
        message = capsys.readouterr().err
        assert message.startswith(
            "fusedrnn bench: lstm forward 3,4,5,6 float32: y differs from NumPy reference (float64)"
        )
        assert "norm-relative difference 5.00e-01, expected at most" in message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cell", "lstm,elman"], "must be among lstm,gru,gru_reset_before,rnn,rnn_relu, got 'elman'"),
        (["--shape", "1,2,3"], "must be B,T,I,H, four positive integers, got '1,2,3'"),
        (["--shape", "1,2,0,4"], "must be B,T,I,H, four positive integers, got '1,2,0,4'"),
        (["--shape", f"{10**9},{10**9},10,10"], f"whose arrays take at most {sys.maxsize} bytes each, got"),
        (["--shape", f"1,1,1,{10**9}"], f"got '1,1,1,{10**9}'"),
        (["--what", "backward"], "must be among forward,train,stream,sweep,ratios, got 'backward'"),
        (["--peers", "keras"], "must be among torch,onnxruntime,jax,reference,none, got 'keras'"),
        (["--threads", "-1"], "must be an integer of 0 or more, got '-1'"),
        (["--threads", "9999"], "must be at most 1024, got '9999'"),
        (["--seconds", "0"], "must be a positive number, got '0'"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
    ],
)
def test_wrong_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("work", ["forward", "train", "stream", "ratios"])
@pytest.mark.parametrize("shape", [f"{2**55},1,10,1", f"1,1,{2**22},{2**22}"], ids=["x", "weights"])
def test_a_shape_too_large_for_memory_is_one_line(shape, work, capsys):
    argv = ["bench", "--quick", "--cell", "lstm", "--what", work, "--shape", shape, "--peers", "none"]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("fusedrnn bench: error: out of memory: ")
    assert error.count("\n") == 1


def test_missing_peer_is_an_error_only_if_named(monkeypatch, tmp_path, capsys):
    peer = type(PEERS["jax"])
    monkeypatch.setattr(peer, "missing", lambda self: ["jax"])
    with pytest.raises(CommandError, match=r"--peers: jax needs jax: pip install 'fusedrnn\[peers\]'"):
        bench.run(parse("--quick", "--peers", "jax"))

    for name in ("torch", "onnxruntime"):
        monkeypatch.setattr(type(PEERS[name]), "missing", lambda self: list(self.needs))
    result = run_quick(tmp_path / "bench.json", "--cell", "rnn", "--what", "forward")
    printed = capsys.readouterr().out
    assert result["peers"] == {}
    assert "not installed: PyTorch, ONNX Runtime, JAX (pip install 'fusedrnn[peers]')" in printed
    assert "peers (" not in printed  # no summary of nothing


def test_none_goes_with_no_other_peer():
    with pytest.raises(CommandError, match="--peers: none goes with no other name, got none,reference"):
        bench.run(parse("--quick", "--peers", "none,reference"))


def test_folder_of_the_json_file_must_exist(tmp_path):
    with pytest.raises(CommandError, match="--json: there is no folder"):
        bench.run(parse("--quick", "--json", tmp_path / "none" / "bench.json"))


def refused_unmeasured(monkeypatch, message: str, *argv: object) -> None:
    monkeypatch.setattr(bench, "_measure", lambda args: pytest.fail("measured"))
    with pytest.raises(CommandError, match=message):
        bench.run(parse("--quick", *argv))


@pytest.mark.parametrize("name", [".", "x" * 300], ids=["a folder", "a name too long"])
def test_a_json_file_that_cannot_be_written_is_found_out_before_measuring(name, tmp_path, monkeypatch):
    refused_unmeasured(monkeypatch, "^--json .*: ", "--json", tmp_path / name)


def test_a_plot_folder_that_cannot_be_made_is_found_out_before_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_require_matplotlib", lambda: None)
    (tmp_path / "file").touch()
    refused_unmeasured(monkeypatch, "^--plot .*file: ", "--plot", tmp_path / "file")


def test_a_run_that_fails_leaves_the_json_file_as_it_was(tmp_path, monkeypatch):
    def fail(args):
        raise measure.BenchmarkError

    monkeypatch.setattr(bench, "_measure", fail)
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("old")
    for path in (old, new):
        assert bench.run(parse("--quick", "--json", path)) == 1
    assert old.read_text() == "old"
    assert not new.exists()


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 0}'])
def test_source_must_be_a_result(text, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CommandError, match=r"--from: .*other\.json is (no JSON|not a result)"):
        bench.run(parse("--from", path))


def test_runs_on_other_machines_are_an_error(tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    result = run_quick(paths[0], "--cell", "rnn", "--what", "forward", "--peers", "none")
    result["machine"]["cores"] += 1
    paths[1].write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(CommandError, match="--from: machine's cores differs"):
        bench.run(parse("--from", paths[0], "--from", paths[1]))


def test_figures_and_page(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    source = tmp_path / "bench.json"
    run_quick(source, "--cell", "lstm", "--what", "forward,sweep", "--peers", "reference")
    capsys.readouterr()
    assert bench.run(parse("--from", source, "--plot", tmp_path / "docs")) == 0

    page = (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    drawn = {path.name for path in (tmp_path / "docs").glob("*.svg")}
    assert drawn >= {"bars_forward.svg", "growth.svg"}  # the roofline needs known caches
    assert not drawn & {"bars_train.svg", "stream.svg"}
    for name in drawn:
        assert (tmp_path / "docs" / name).read_text(encoding="utf-8").rstrip().endswith("</svg>")
        assert f"]({name})" in page
    assert "| lstm | forward | 3,4,5,6 |" in page
    assert str(tmp_path) not in page


# --- On a GPU -----------------------------------------------------------------------------------------------


def test_gpu_cases_have_goals_and_names_of_their_own():
    cases = list(gpu.cases(quick=False))
    assert {case.group for case in cases} == set(gpu.GOALS)
    assert len({(case.group, str(case)) for case in cases}) == len(cases)
    assert {case.train for case in gpu.cases(quick=True)} == {False}


def test_gpu_says_that_it_needs_one(capsys, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_gpu_writes_each_row_at_once(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    path = tmp_path / "gpu.json"
    times = iter([{"fusedrnn": [1.0], "cuDNN": [2.0]}])  # of the first case; the next one fails
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu._cuda_module, "module", lambda: SimpleNamespace(EMULATED=False))
    monkeypatch.setattr(gpu, "machine", lambda torch: {})
    monkeypatch.setattr(gpu, "Pair", lambda case: SimpleNamespace(disagreement=lambda: 0.0))
    monkeypatch.setattr(gpu, "measured", lambda *args: next(times))
    monkeypatch.setattr(sys, "argv", ["gpu", "--json", str(path)])
    with pytest.raises(StopIteration):
        gpu.main()
    assert [row["ratio"] for row in json.loads(path.read_text())["rows"]] == [2.0]
