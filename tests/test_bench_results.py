"""What `fusedrnn bench` makes of measured rows: summaries, goals, roofs, several runs as one. No timing."""

from __future__ import annotations

import math

import pytest

from fusedrnn import bench
from fusedrnn.bench import goals, merge, report

ROOFS = [
    {"level": "L1", "bytes": 1 << 14, "threads": 2, "gb_per_s": 400.0},
    {"level": "memory", "bytes": 1 << 26, "threads": 2, "gb_per_s": 10.0},
]


def case_row(cell, work, shape, ratios, share=0.5, series="standard"):
    """A measured case as goals.py and report.py read it; `ratios`: by peer. At the peak it would take 1 s."""
    return dict(zip("BTIH", shape, strict=True)) | {
        "dtype": "float32",
        "flops": 1e11,
        "intensity": 1.0,
        "peak_gflops": {"max": 100.0},
        "ours": {"seconds": {"median": 1 / share}},
        "cell": cell,
        "work": work,
        "series": series,
        "peers": {name: {"ratio": {"median": ratio}} for name, ratio in ratios.items()},
        "best_peer": min(ratios, key=ratios.get) if ratios else None,
        "peak_share": {"median": share},
    }


def test_summary_is_the_geometric_mean_and_the_worst():
    rows = [
        case_row("lstm", "forward", (1, 9, 8, 8), {"a": 4.0, "b": 2.0}),
        case_row("lstm", "forward", (16, 9, 256, 256), {"a": 1.0, "b": 8.0}, share=0.9),
        case_row("lstm", "forward", (16, 9, 8, 8), {"a": 0.1}, series="B"),
    ]
    (entry,) = report.summarise(rows)
    assert entry["cases"] == 2
    assert entry["against"]["a"]["geometric_mean"] == pytest.approx(2.0)
    assert entry["against"]["b"]["geometric_mean"] == pytest.approx(4.0)
    assert entry["against"]["best"]["geometric_mean"] == pytest.approx(math.sqrt(2.0))
    assert entry["against"]["best"]["worst"] == 1.0
    assert entry["against"]["best"]["worst_shape"] == [16, 9, 256, 256]
    assert entry["large_peak_share"] == 0.9

    text = report.summary_lines([entry], {"a": "A", "b": "B"})
    assert "16,9,256,256" in text[-1]
    assert text[-1].endswith("90 %")


def test_goals_judge_the_mean_the_worst_shape_and_the_least_share():
    cases = [
        case_row("lstm", "forward", (1, 100, 64, 64), {"torch": 4.0, "jax": 9.0}, share=0.1),
        case_row("lstm", "forward", (32, 100, 256, 256), {"torch": 1.0, "jax": 0.9}, share=0.91),
        case_row("lstm", "forward", (64, 50, 512, 512), {"torch": 1.1}, share=0.89),
        case_row("lstm", "forward", (64, 50, 512, 512), {"torch": 0.1}, share=0.1, series="H"),
    ]
    found = {row["title"]: row for row in goals.rows(cases, [])}
    mean, worst = found["best peer, geometric mean"], found["best peer, worst shape"]
    assert mean["value"] == pytest.approx((4.0 * 0.9 * 1.1) ** (1 / 3))
    assert mean["met"] == (mean["value"] >= goals.AGAINST_BEST["forward"]["lstm"][0])
    assert (worst["value"], worst["at"], worst["met"]) == (0.9, "32,100,256,256", False)
    assert (found["share of the peak"]["value"], found["share of the peak"]["met"]) == (0.89, False)
    assert found["share of the peak"]["roof"] == pytest.approx(1.0)
    assert worst["roof"] == pytest.approx(0.9 / 0.91)


@pytest.mark.parametrize("H, seconds", [(64, 1.0), (128, 10.0)])  # 32 KB of W_hh a thread, in L1; 128, not
def test_roof_is_the_peak_or_the_cache_that_holds_the_weights(H, seconds):
    case = case_row("lstm", "forward", (1, 100, H, H), {})
    assert goals.roof_seconds(case, ROOFS) == pytest.approx(seconds)
    assert goals.roof_seconds(case, []) == pytest.approx(1.0)


@pytest.mark.parametrize("H, limit", [(16, 6.0), (64, 6.0), (128, 3.5), (256, 2.8), (1024, 1.1), (2048, 0)])
def test_goals_of_a_step_depend_on_its_size(H, limit):
    case = case_row("gru", "stream", (1, 1, H, H), {"onnxruntime": 3.0, "torch": 2.0})
    rows = goals.rows([case], ROOFS)
    assert [(row["value"], row["goal"]["limit"]) for row in rows] == ([(3.0, limit)] if limit else [])


def test_goals_need_peers():
    assert goals.rows([case_row("rnn", "train", (1, 100, 64, 64), {})], ROOFS) == []


def test_without_peers_the_summary_is_the_share_of_the_peak_or_nothing():
    small = {"cell": "lstm", "work": "forward", "cases": 2, "against": {}, "large_peak_share": None}
    large = small | {"large_peak_share": 0.91}
    assert report.summary_lines([small], {}) == report.summary_lines([], {"a": "A"}) == []
    heading, line = report.summary_lines([large], {})
    assert "peers" not in heading
    assert line.split() == ["lstm", "forward", "2", "|", "91", "%"]


def result_of(*cases, ratios=(), date="2026-01-01", machine=None, **roofs):
    """What --json would write of a run with these rows."""
    known = {"caches": [], "date": date, "versions": {"numpy": "2"}}
    settings = {"dtype": "float32", "threads_tried": [1], "seconds": 1.0}
    return {
        "schema": bench.SCHEMA,
        "machine": dict.fromkeys(merge.MACHINE, "same") | known | (machine or {}),
        "settings": dict.fromkeys(merge.SETTINGS, False) | settings,
        "peers": {name: {"label": name} for case in cases for name in case["peers"]},
        "roofs": [{"level": level, "gb_per_s": rate} for level, rate in roofs.items()],
        "cases": list(cases),
        "ratios": list(ratios),
        "summary": [],
    }


def test_of_several_runs_each_case_is_its_median_run():
    small, large = (1, 9, 8, 8), (16, 9, 256, 256)
    runs = [
        result_of(
            case_row("lstm", "forward", small, {"a": a, "b": 9.0}),
            case_row("lstm", "forward", large, {}, share=share),
            date=f"2026-01-0{day}",
            L1=rate,
        )
        for day, (a, share, rate) in enumerate([(3.0, 0.9, 5.0), (1.0, 0.5, 7.0), (2.0, 0.8, 6.0)], 1)
    ]
    runs.append(result_of(case_row("gru", "forward", small, {"b": 4.0}), ratios=[]))
    found = merge.merged(runs)
    assert [row["runs"] for row in found["cases"]] == [3, 3, 1]
    assert found["cases"][0] == runs[2]["cases"][0] | {"runs": 3}  # a whole row of one run
    assert found["cases"][1]["peak_share"]["median"] == 0.8
    assert found["machine"]["date"] == "2026-01-01 to 2026-01-03"
    assert found["roofs"] == [{"level": "L1", "gb_per_s": 7.0}]
    assert [entry["against"]["best"]["worst"] for entry in found["summary"]] == [2.0, 4.0]
    assert merge.merged(runs[:2])["cases"][0]["peers"]["a"]["ratio"]["median"] == 1.0  # of two, the worse
    assert merge.merged(runs[:1]) == runs[0]


@pytest.mark.parametrize(("sense", "middle"), [(">=", 1.0), ("<=", 2.0)])
def test_of_two_runs_the_worse_ratio_counts(sense, middle):
    row = dict.fromkeys(merge.RATIO) | {"goal": {"sense": sense, "limit": 1.5}}
    runs = [result_of(ratios=[row | {"value": {"median": value}}]) for value in (1.0, 2.0)]
    (found,) = merge.merged(runs)["ratios"]
    assert found["value"]["median"] == middle


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cpu": "other"}, "machine's cpu differs: 'same' and 'other'"),
        ({"versions": {"numpy": "3"}}, "numpy differs: 2 and 3"),
    ],
)
def test_runs_that_do_not_belong_together_are_an_error(change, message):
    with pytest.raises(merge.MergeError, match=message):
        merge.merged([result_of(), result_of(machine=change)])
