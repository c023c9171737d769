"""How `fusedrnn bench` measures: ratios of our own times, rounds, choice of settings. No time is judged."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from bench_runs import SHAPE, parse, run_quick, sequence

import fusedrnn as fr
from fusedrnn import bench
from fusedrnn.bench import goals, measure, page, ratios, report, shapes
from fusedrnn.bench.engines import Candidate, Ours

OF_CELL = ("threads", "backward", "lengths", "float64", "directions", "layers", "tape")
ALL_RATIOS = (*OF_CELL, "denormals", "import")


def test_quick_ratios_have_every_row(tmp_path, capsys):
    result = run_quick(tmp_path / "bench.json", "--cell", "lstm,rnn", "--what", "ratios")
    printed = capsys.readouterr().out
    assert (result["cases"], result["peers"]) == ([], {})
    assert "peers (" not in printed

    rows = result["ratios"]
    threads = max(result["settings"]["threads_tried"])
    once = [("rnn_relu", "denormals", "forward"), (None, "import", None)]
    assert [(row["cell"], row["name"], row["work"]) for row in rows] == [
        (cell, name, work)
        for cell in ("lstm", "rnn")
        for name in OF_CELL
        for work in (("train",) if name in ("backward", "tape") else ("forward", "train"))
    ] + once
    for row in rows:
        value, goal = row["value"], row["goal"]
        assert 0 < value["min"] <= value["q1"] <= value["median"] <= value["q3"] <= value["max"]
        at_least = row["name"] == "threads"
        assert goal["sense"] == (">=" if at_least else "<=")
        assert row["met"] == ((value["median"] - goal["limit"]) * (1 if at_least else -1) >= 0)
        assert [row[k] for k in "BTIH"] == [None] * 4 if row["name"] == "import" else list(SHAPE)
        assert row["title"] in printed
        if row["name"] not in ("tape", "import"):
            over, under = row["over"], row["under"]
            assert over["threads"] == (1 if row["name"] == "threads" else threads)
            assert (under["threads"], over["times"]) == (threads, 1)
            assert under["times"] == {"directions": 2, "layers": 4}.get(row["name"], 1)
            assert row["rounds"] == 3
            ratios_of_extremes = [
                over["seconds"][a] / (under["times"] * under["seconds"][b])
                for a, b in (("min", "max"), ("max", "min"))
            ]
            assert ratios_of_extremes[0] <= value["min"] * (1 + 1e-9)
            assert value["max"] <= ratios_of_extremes[1] * (1 + 1e-9)
    assert f"Ratios of our own times: {sum(row['met'] for row in rows)} of {len(rows)} goals met" in printed

    (tape,) = (row for row in rows if (row["name"], row["cell"]) == ("tape", "rnn"))
    B, T, I, H = SHAPE
    _, _, kept = fr.RNN(I, H).forward(np.zeros((T, B, I), np.float32))
    assert tape["bytes"] == kept.nbytes
    assert tape["value"]["median"] == pytest.approx(kept.nbytes / (4 * T * B * H * 4))


def test_ratios_are_read_back_and_shown(tmp_path, capsys):
    source, copy = tmp_path / "bench.json", tmp_path / "copy.json"
    result = run_quick(source, "--cell", "gru", "--what", "forward,ratios", "--peers", "none")
    measured = capsys.readouterr().out
    assert bench.run(parse("--from", source, "--json", copy)) == 0
    read = capsys.readouterr().out
    assert json.loads(copy.read_text(encoding="utf-8")) == result
    lines = [report.ratio_line(row) for row in result["ratios"]]
    assert len(lines) == 14
    for line in lines:
        assert line in measured
        assert line in read

    name = page.write(result, goals.rows(result["cases"], result["roofs"]), {}, tmp_path)
    written = (tmp_path / name).read_text(encoding="utf-8")
    section = written[written.index("## Ratios of our own times") :]
    for row in result["ratios"]:
        assert f"| {' | '.join(report.ratio_cells(row))} |" in section
    assert "How many times faster" not in written  # no peers
    assert "| gru | forward | 3,4,5,6 |" in written

    del result["ratios"]  # as in a result from before there were any
    source.write_text(json.dumps(result), encoding="utf-8")
    assert bench.run(parse("--from", source)) == 0
    assert "Ratios" not in capsys.readouterr().out


def test_ratios_are_taken_at_their_own_shapes_and_goals():
    rows = ratios.rows([shapes.CELLS["gru"]], None, np.dtype("f4"), 2, False, Ours())
    found = {name: [row for row in rows if row.name == name] for name in ALL_RATIOS}
    assert sum(map(len, found.values())) == len(rows)

    def shapes_of(name):
        return list(dict.fromkeys((c.B, c.T, c.I, c.H) for c in (row.case for row in found[name])))

    large = [(64, 100, 256, 256), (64, 50, 512, 512)]
    assert shapes_of("threads") == large
    assert shapes_of("backward") == [*large, (32, 100, 256, 256)]
    assert shapes_of("lengths") == [(32, 100, 256, 256)]
    assert shapes_of("float64") == shapes_of("tape") == [(64, 100, 256, 256)]
    assert shapes_of("directions") == [(16, 100, 128, 128), (1, 100, 256, 256)]
    assert shapes_of("layers") == [(1, 100, 64, 64), (1, 100, 128, 128)]
    assert {row.case.dtype.name for row in found["float64"]} == {"float64"}
    goals = {name: {(row.goal.sense, round(row.goal.limit, 3)) for row in own} for name, own in found.items()}
    assert goals == {
        "threads": {(">=", 1.85)},
        "backward": {("<=", 2.1)},
        "lengths": {("<=", 0.6)},
        "float64": {("<=", 2.222)},
        "directions": {("<=", 1.1)},
        "layers": {("<=", 0.8)},
        "tape": {("<=", 1.0)},
        "denormals": {("<=", 1.1)},
        "import": {("<=", 0.1)},
    }
    more = ratios.rows([shapes.CELLS["gru"]], None, np.dtype("f4"), 16, False, Ours())
    assert {row.goal.limit for row in more if row.name == "threads"} == {0.925 * 16}


@pytest.mark.parametrize(
    ("sense", "values", "met"),
    [
        (">=", [1.84, 1.85, 3.0], True),
        (">=", [1.0, 1.84, 3.0], False),
        ("<=", [0.1, 1.85, 9.0], True),
        ("<=", [0.1, 1.86, 1.9], False),
    ],
)
def test_median_meets_the_goal(sense, values, met):
    row = ratios.Row("a", "A", ratios.Goal(sense, 1.85), None, lambda peak, pace: (values, {"more": 1}))
    found = row.measure(lambda: 1.0, measure.Pace(1.0, 1, 1, 0.0))
    assert (found["met"], found["more"]) == (met, 1)
    assert found["value"]["median"] == values[1]
    assert found["goal"] == {"sense": sense, "limit": 1.85}
    assert report.ratio_cells(found)[-2:] == [f"{sense} 1.85", "yes" if met else "NO"]
    assert report.goals_met([found, found | {"met": True}]) == f"{1 + met} of 2 goals met"


def candidate(name: str, call=lambda: None) -> Candidate:
    return Candidate(name, 1, call, dict)


def made_up(monkeypatch, times: dict[str, list[float]]) -> list[str]:
    """Lets slots take the seconds listed, the last for ever; returns the settings in the order timed."""
    log: list[str] = []

    def timed(candidate, calls, quiet):
        own = times[candidate.setting]
        log.append(candidate.setting)
        return own[min(log.count(candidate.setting), len(own)) - 1]

    monkeypatch.setattr(measure, "timed", timed)
    monkeypatch.setattr(measure, "settle", lambda limit: None)
    return log


def test_ratio_is_taken_within_each_round(monkeypatch):
    # The first slot of each is its calibration. The machine slows down tenfold; the ratio does not move.
    made_up(monkeypatch, {"over": [9.0, 6.0, 12.0, 60.0], "under": [9.0, 1.5, 3.0, 15.0]})
    row = ratios.Row(
        "a",
        "A",
        ratios.Goal("<=", 2.0),
        sequence("lstm", "forward"),
        partial(ratios._ratio, partial(candidate, "over"), partial(candidate, "under"), 2),
    ).measure(lambda: 1.0, measure.Pace(1.0, 3, 3, 0.0))
    assert row["value"] == dict.fromkeys(("median", "q1", "q3", "min", "max"), 2.0)
    assert row["met"]
    assert (row["over"]["seconds"]["median"], row["under"]["seconds"]["median"]) == (12.0, 3.0)
    assert "2 × 3.00 s" in report.ratio_line(row)


def test_each_part_of_training_has_its_own_clock(monkeypatch):
    now, log = [0], []

    class Layer:
        def forward(self, x):
            log.append("forward")
            now[0] += 5
            return None, None, "tape"

        def backward(self, tape, dy, wrt):
            assert (tape, wrt) == ("tape", ("x", "params"))
            log.append("backward")
            now[0] += 11

    monkeypatch.setattr(ratios, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(Ours, "layer", staticmethod(lambda case: Layer()))
    for part, cost in (("forward", 5), ("backward", 11)):
        timed = ratios._part(Ours(), sequence("lstm", "train"), 1, part)
        assert measure.timed(timed, 3, 0) == pytest.approx(cost * 1e-9)
    assert log == ["forward", "backward"] * (len(log) // 2)


@pytest.mark.parametrize(("B", "T"), [(32, 100), (2, 7), (5, 8), (1, 6)])
def test_half_of_the_steps_are_valid(B, T):
    lengths = ratios.half_lengths(B, T)
    assert lengths.shape == (B,)
    assert lengths.sum() * 2 == B * T
    assert (lengths >= 0).all() and (lengths <= T).all()
    if B > 2:
        assert (np.diff(lengths) > 0).any() and (np.diff(lengths) < 0).any()


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_denormal_state_is_one(dtype):
    case = sequence("rnn_relu", "forward", (2, 5, 3, 4), dtype)
    powers = 0.5 ** np.arange(1, 6, dtype=dtype)[:, None, None]
    normal = ratios._decay(Ours(), case, 1, 1.0).outputs()["y"]
    np.testing.assert_array_equal(normal, np.broadcast_to(powers, normal.shape))
    tiny = np.finfo(dtype).tiny
    denormal = ratios._decay(Ours(), case, 1, tiny).outputs()["y"]
    assert (denormal < tiny).all()  # kept or flushed


def test_sides_of_a_ratio_differ_in_what_it_is_about():
    case, n = sequence("gru", "forward"), fr.get_num_threads()
    rows = {row.name: row for row in reversed(ratios.rows([case.cell], [SHAPE], case.dtype, n, True, Ours()))}

    def outputs(name):
        over, under, _ = rows[name].values.args
        return over().outputs()["y"], under().outputs()["y"]

    B, T, I, H = SHAPE
    one, all_threads = outputs("threads")
    np.testing.assert_array_equal(one, all_threads)
    half, whole = outputs("lengths")
    lengths = ratios.half_lengths(B, T)
    running = np.arange(T)[:, None] < lengths
    np.testing.assert_array_equal(half, np.where(running[..., None], whole, 0))
    assert [y.dtype.name for y in outputs("float64")] == ["float64", "float32"]
    assert [y.shape for y in outputs("directions")] == [(T, B, 2 * H), (T, B, H)]
    stack, layer = outputs("layers")
    np.testing.assert_array_equal(layer, whole)
    deep = fr.GRU(I, H, num_layers=4, seed=0)
    np.testing.assert_array_equal(stack, deep(ratios.Problem.draw(case).x)[0])


PACE = measure.Pace(slot=1.0, least=5, most=101, seconds=60.0)


def chosen(monkeypatch, times: dict[str, list[float]], pace: measure.Pace = PACE):
    log = made_up(monkeypatch, times)
    monkeypatch.setattr(measure, "calibrated", lambda candidate, pace: (7, times[candidate.setting][0]))
    choice, calls, tried = measure.choose([candidate(name) for name in times], pace)
    assert calls == 7
    assert [entry["setting"] for entry in tried] == list(times)
    return choice.setting, [log.count(name) for name in times]


def test_one_lucky_slot_chooses_no_setting(monkeypatch):
    lucky, steady = [1e-3, 3e-3], [2e-3]
    setting, slots = chosen(monkeypatch, {"lucky": lucky, "steady": steady})
    assert setting == "steady"
    assert slots[0] == slots[1] >= 5
    mixed = {"lucky": lucky, "steady": steady}
    assert chosen(monkeypatch, mixed, replace(PACE, seconds=0.0)) == ("steady", [5, 5])
    assert chosen(monkeypatch, {"slow": [3e-3], "steady": steady}) == ("steady", [5, 5])


def test_settings_within_each_others_spread_go_on(monkeypatch):
    wide = [1e-3, 1e-3, 5e-3] + [5e-3, 1e-3] * 3 + [1e-3] * 9
    apart, near = [9e-3], [2e-3]
    setting, slots = chosen(monkeypatch, {"wide": wide, "near": near, "apart": apart})
    assert setting == "wide"
    assert slots[0] == slots[1] > 5 == slots[2]

    equal = {"one": [1e-3, 2e-3] * 9, "two": [2e-3, 1e-3] * 9}
    assert chosen(monkeypatch, equal)[1] == [measure.CONTEST] * 2
    assert chosen(monkeypatch, equal, replace(PACE, seconds=0.0))[1] == [5, 5]


def test_slow_settings_far_apart_are_not_repeated(monkeypatch):
    assert chosen(monkeypatch, {"one": [0.9], "two": [0.4]}) == ("two", [0, 0])
    setting, slots = chosen(monkeypatch, {"one": [0.5, 0.3], "two": [0.4]})
    assert setting == "one"
    assert slots[0] == slots[1] >= 5


def test_slot_is_warmed_up(monkeypatch):
    calls = []
    measure.timed(candidate("a", lambda: calls.append(1)), 1, 0)
    assert len(calls) == 2 + 1
    monkeypatch.setattr(measure, "SLOW", 0.0)
    measure.timed(candidate("a", lambda: calls.append(1)), 1, 0)
    assert len(calls) == 3 + 1 + 1


class Clock:
    """A process whose threads spin for a while."""

    now = 0.0

    def __init__(self, spins: float) -> None:
        self.spins = spins

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return min(self.now, self.spins)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("spins", "limit", "waits"), [(0.3, 1.0, 0.3), (9.0, 1.0, 1.0), (9.0, 0.0, 0.0), (0.0, 1.0, 0.0)]
)
def test_slot_waits_until_no_thread_spins(monkeypatch, spins, limit, waits):
    clock = Clock(spins)
    monkeypatch.setattr(measure, "time", clock)
    measure.settle(limit)
    assert waits <= clock.now <= waits + 2 * measure.QUIET
