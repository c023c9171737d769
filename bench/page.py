"""The page of a benchmark result: Markdown with the machine, the summary, the figures and every row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import report

NAME = "benchmarks.md"


def write(
    result: dict[str, Any], goals: list[dict[str, Any]], figures: dict[str, str], folder: Path
) -> str:
    """Writes the page beside `figures` (file name -> caption) and returns its name.

    `goals` are rows of goals.py.
    """
    beside = (folder.parent / "performance.md").exists()
    notebook = "[performance notebook](../performance.md)" if beside else "notebook, docs/performance.md"
    (folder / NAME).write_text("\n".join(_lines(result, goals, figures, notebook)) + "\n", encoding="utf-8")
    return NAME


def _lines(
    result: dict[str, Any], goals: list[dict[str, Any]], figures: dict[str, str], notebook: str
) -> list[str]:
    m, s = result["machine"], result["settings"]
    labels = {name: peer["label"] for name, peer in result["peers"].items()}
    caches = ", ".join(
        f"L{c['level']} {_size(c['bytes'])}" + (f" shared by {c['shared_by']}" if c["shared_by"] > 1 else "")
        for c in m["caches"]
    )
    tried = s["threads_tried"]
    method = [
        "All that is compared takes turns in one process, round after round; a ratio is taken within each "
        "round and its median reported, so that drift of the machine cancels."
    ]
    if result["cases"]:
        method += [
            f"Each engine is on the better of {tried[0]} and {tried[-1]} threads (JAX decides by itself)."
            if len(tried) > 1
            else f"Threads: {tried[0]}.",
            "Results agreed before they were timed.",
            "GFLOP/s counts the matrix products only, forward + backward as three forwards.",
        ]
    runs = [row.get("runs", 1) for row in [*result["cases"], *result.get("ratios", [])]]
    if max(runs, default=1) > 1:
        count = str(max(runs)) if min(runs) == max(runs) else f"{min(runs)} to {max(runs)}"
        method.append(
            f"Each was measured in {count} runs some time apart; shown is that whose ratio to the best peer "
            "is the median (of two, the worse)."
        )
    lines = [
        "# Benchmarks",
        "",
        f"{m['cpu']}, {m['cores']} cores, {m['isa']}"
        + (f", {caches}" if caches else "")
        + f". {s['dtype']}. {m['date']}.",
        ", ".join(f"{name} {v}" for name, v in m["versions"].items()) + ".",
        "",
        " ".join(method),
        "",
    ]
    if s["quick"]:
        lines += ["**Measured with `--quick`: too short to judge speed by.**", ""]
    if report.summarises(result["summary"], labels):
        lines += ["## How many times faster than the peers" if labels else "## Share of the peak", ""]
        lines += _table(
            ["cell", "work", *_summary_heads(labels), f"least share of peak, {report.LARGE}"],
            [_summary_row(entry, labels) for entry in result["summary"]],
        )
    if goals:
        lines += [
            "",
            "## Goals",
            "",
            f"{report.goals_met(goals)} against peers and the peak. At the roof: what the value would be if "
            "we took no longer than the products take at the peak, or their weights take from the cache that "
            f"holds them. What bounds us, and what was tried, is in the {notebook}.",
            "",
        ]
        lines += _table([name for name, _ in report.GOAL_COLUMNS], list(map(report.goal_cells, goals)))
    for name, caption in figures.items():
        lines += ["", f"![{caption}]({name})", "", caption]
    if result["cases"]:
        lines += [
            "",
            "## Every case",
            "",
            "Ours: median time, share of the FMA peak. Peers: median time, and how many times faster ours is "
            "(± half the interquartile range).",
            "",
        ]
        lines += _table(
            ["cell", "work", "B,T,I,H", "time", "threads", "GFLOP/s", "peak", *labels.values()],
            [_case_row(row, labels) for row in result["cases"]],
        )
    ratios = result.get("ratios", [])  # a result may be older than they are
    if ratios:
        lines += [
            "",
            "## Ratios of our own times",
            "",
            f"{report.goals_met(ratios)}: the median meets its goal or does not; ± is half the interquartile "
            "range. thr: threads, of both calls where they differ.",
            "",
        ]
        lines += _table([name for name, _ in report.RATIO_COLUMNS], list(map(report.ratio_cells, ratios)))
    return lines


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    align = ["---" if at < 2 else "--:" for at in range(len(heads))]
    return [f"| {' | '.join(cells)} |" for cells in (heads, align, *rows)]


def _summary_heads(labels: dict[str, str]) -> list[str]:
    return [f"{label}: mean / worst" for label in ("best of peers", *labels.values())] if labels else []


def _summary_row(entry: dict[str, Any], labels: dict[str, str]) -> list[str]:
    cells = [entry["cell"], report.WORK_LABELS[entry["work"]]]
    for name in ("best", *labels) if labels else ():
        found = entry["against"].get(name)
        text = f"{report.digits(found['geometric_mean'])} / {report.digits(found['worst'])}" if found else "-"
        if found and name == "best":
            text += f" at {','.join(map(str, found['worst_shape']))}"
        cells.append(text)
    share = entry["large_peak_share"]
    return [*cells, "-" if share is None else f"{100 * share:.0f} %"]


def _case_row(row: dict[str, Any], labels: dict[str, str]) -> list[str]:
    ours = row["ours"]
    cells = [
        row["cell"],
        report.WORK_LABELS[row["work"]],
        ",".join(str(row[k]) for k in "BTIH"),
        report.duration(ours["seconds"]["median"]),
        report.threads_label(ours),
        report.digits(ours["gflops"]),
        f"{100 * row['peak_share']['median']:.0f} %",
    ]
    for name in labels:
        entry = row["peers"].get(name)
        cells.append(
            f"{report.duration(entry['seconds']['median'])}, {report.digits(entry['ratio']['median'])} ± "
            f"{report.digits(report.half_range(entry['ratio']))}"
            if entry
            else "-"
        )
    return cells
