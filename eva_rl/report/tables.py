"""Tables of a report: the same rows for Markdown, HTML, the terminal and CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eva_rl.errors import counted
from eva_rl.files import write_file
from eva_rl.report import stats
from eva_rl.report.comparison import Analysis, Comparison
from eva_rl.report.methods import Method, TaskGroup
from eva_rl.report.runs import Run
from eva_rl.report.settings import Decision
from eva_rl.report.stats.equivalence import PairedMean
from eva_rl.report.verdicts import ENDPOINTS, EndpointMean, Verdict, endpoint_means, verdicts

CSV_COLUMNS = ("score", "table", "method", "versus", "task", "statistic", "value", "low", "high", "runs")
COSTS = {
    "trainable_parameters": "trained parameters",
    "total_parameters": "all parameters",
    "adapter_bytes": "bytes a task adds",
    "peak_memory_bytes": "peak memory (MiB)",
    "seconds_per_update": "seconds a gradient step",
    "seconds.adapter": "seconds to attach",
    "seconds.train": "seconds to train",
    "env_steps": "env steps",
}
"""Keys of ``summary.json`` and what they are called; a row shows the median over runs."""
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: Above it.
        columns: Headings; all columns but the first are numbers.
        rows: Cells.
        note: Below it.
        words: Whether its cells are words, not numbers.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    words: bool = False


NARROW = 0.01
"""Intervals that are narrower get as many decimals as it takes to tell their ends apart."""


def number(value: float, digits: int = 3) -> str:
    """A score for reading."""
    if not np.isfinite(value):
        return "-"
    return f"{value:z.{digits}f}" if abs(value) < 10 else f"{value:z.1f}"


def heading(title: str) -> str:
    """The name of a score with a capital letter; the name of a task in it stays as it is."""
    return title[:1].upper() + title[1:]


def with_interval(estimate: stats.Estimate) -> str:
    """A value and its interval."""
    value, low, high = (float(v) for v in (estimate.value, estimate.low, estimate.high))
    if not np.isfinite(low):
        return number(value)
    digits = 3 if high - low >= NARROW or high == low else min(9, 1 - math.floor(math.log10(high - low)))
    return f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"


def aggregate_table(analysis: Analysis) -> Table:
    """Aggregates of each method over the common tasks, best IQM first."""
    group = analysis.group
    rows = []
    for method in sorted(group.methods, key=lambda m: -_iqm(analysis, m)):
        estimates = analysis.aggregates[method.label].values()
        runs = sum(len(method.runs[task]) for task in group.tasks)
        rows.append([method.label, method.rank, str(runs), *map(with_interval, estimates)])
    return Table(
        f"{heading(group.title)} over {counted(len(group.tasks), 'task')}",
        ["method", "rank", "runs", *next(iter(analysis.aggregates.values()))],
        rows,
        "IQM is the mean of the middle half of all runs. Intervals: bootstrap over the runs of each task.",
    )


def _iqm(analysis: Analysis, method: Method) -> float:
    return float(analysis.aggregates[method.label]["IQM"].value)


def comparison_table(analysis: Analysis) -> Table:
    """Each pair of methods."""
    columns = ["pair", "difference", "P(first better)", "pairs of runs", "p over runs", "corrected"]
    rows = [_comparison_row(comparison) for comparison in analysis.comparisons]
    return Table(
        "Which method is better?",
        [*columns, "goals", "p over goals", "significant"],
        rows,
        "By the score after the last update. p over runs: paired permutation test over seeds and tasks, about the "
        "methods; corrected by Holm's method for the number of pairs. p over goals: about these trained policies "
        "alone, on the same goals.",
    )


def _comparison_row(c: Comparison) -> list[str]:
    return [
        f"{c.first} - {c.second}",
        "-" if c.difference is None else with_interval(c.difference),
        with_interval(c.improvement),
        str(c.pairs),
        f"{c.p_runs:.3g}",
        f"{c.p_corrected:.3g}",
        str(c.goals),
        "-" if c.p_goals is None else f"{c.p_goals:.3g}",
        "yes" if c.significant else "no",
    ]


def endpoint_table(means: Sequence[EndpointMean], endpoint: str, confidence: float) -> Table:
    """Each method by an endpoint; ``confidence`` is that of the intervals."""
    rows = [
        [m.label, number(m.value) if m.spread is None else _mean_with_interval(m.spread, confidence)] for m in means
    ]
    title = ENDPOINTS[endpoint].title
    note = "Mean over tasks, Student's interval over seeds. Paired runs may tell methods apart whose intervals overlap."
    return Table(f"{title[0].upper()}{title[1:]}", ["method", "mean"], rows, note)


def verdict_table(found: Sequence[Verdict], decision: Decision, confidence: float, *, decided: bool) -> Table:
    """What is concluded about each pair by an endpoint; ``confidence`` is that of the intervals."""
    endpoint, margin = decision.endpoint, decision.margin
    columns = ["pair", "difference", "pairs of runs", "p of a difference", "corrected"]
    tested = margin is not None
    rows = [
        [
            f"{v.first} - {v.second}",
            number(float("nan")) if v.mean is None else _mean_with_interval(v.mean, confidence),
            str(v.pairs),
            f"{v.p_difference:.3g}",
            f"{v.corrected[0]:.3g}",
            *(
                [f"{v.p_equivalence:.3g}" if v.p_equivalence is not None else "-", f"{v.corrected[1]:.3g}"]
                if tested
                else []
            ),
            v.text,
        ]
        for v in found
    ]
    equivalence = (
        f" Equivalence: two one-sided t tests, margin {margin:g}." if tested else " No margin, no equivalence."
    )
    return Table(
        f"By {ENDPOINTS[endpoint].title}" + ("" if decided else " (a further endpoint, corrected for itself)"),
        [*columns, *(["p of equivalence", "corrected"] if tested else []), "verdict"],
        rows,
        "Difference: mean over tasks of pairs of one task and seed, Student's interval. Its p value: paired "
        f"permutation test.{equivalence} All p values of an endpoint are corrected together (Holm, Shaffer).",
    )


def _mean_with_interval(mean: PairedMean, confidence: float) -> str:
    low, high = mean.interval(confidence)
    return f"{number(mean.mean)} [{number(low)}, {number(high)}]"


def endpoint_records(group: TaskGroup, endpoint: str, confidence: float) -> Iterator[dict[str, Any]]:
    """Rows of ``report.csv`` on each method by an endpoint; ``confidence`` is that of the intervals."""
    for mean in endpoint_means(group, endpoint):
        named = {"score": group.title, "table": f"by {endpoint}", "method": mean.label, "statistic": "mean over tasks"}
        bounds = (
            {} if mean.spread is None else dict(zip(("low", "high"), mean.spread.interval(confidence), strict=True))
        )
        yield named | {"value": mean.value} | bounds


def verdict_records(group: TaskGroup, decision: Decision, confidence: float) -> Iterator[dict[str, Any]]:
    """Rows of ``report.csv`` on the verdicts by an endpoint; ``confidence`` is that of the intervals."""
    for v in verdicts(group, decision):
        named: dict[str, Any] = {"score": group.title, "table": f"verdict by {decision.endpoint}", "runs": v.pairs}
        named |= {"method": v.first, "versus": v.second}
        if v.mean is not None:
            low, high = v.mean.interval(confidence)
            yield named | {"statistic": "difference", "value": v.mean.mean, "low": low, "high": high}
        yield named | {"statistic": "p of a difference, corrected", "value": v.corrected[0]}
        if v.p_equivalence is not None:
            yield named | {"statistic": "p of equivalence, corrected", "value": v.corrected[1]}
        yield named | {"statistic": "verdict", "value": v.text}


def task_table(analysis: Analysis) -> Table:
    """The mean over runs of each task and method."""
    labels = [method.label for method in analysis.group.methods]
    rows = [
        [
            task,
            number(analysis.before[task]),
            *(with_interval(means[one]) if one in means else "-" for one in labels),
        ]
        for task, means in analysis.tasks.items()
    ]
    return Table("", ["task", "before", *labels], rows, "Mean over runs, with its interval.")


def cost_table(group: TaskGroup) -> Table:
    """What each method costs."""
    costs = {method.label: costs_of(method) for method in group.methods}
    keys = [key for key in COSTS if any(key in own for own in costs.values())]
    rows = [[label, *(_amount(key, own[key]) if key in own else "-" for key in keys)] for label, own in costs.items()]
    return Table("", ["method", *(COSTS[key] for key in keys)], rows, "Median over runs, on the machines they ran on.")


def costs_of(method: Method) -> dict[str, float]:
    """Medians of what the runs' summaries say of cost."""
    runs = [run for own in method.runs.values() for run in own]
    found: dict[str, float] = {}
    for key in COSTS:
        values = [value for run in runs if (value := _cost(run, key)) is not None]
        if values:
            found[key] = float(np.median(values))
    return found


def _cost(run: Run, key: str) -> float | None:
    group, _, name = key.rpartition(".")
    place: Any = run.summary.get(group, {}) if group else run.summary
    value = place.get(name) if isinstance(place, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def _amount(key: str, value: float) -> str:
    if key == "peak_memory_bytes":
        return f"{value / MEBIBYTE:.0f}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def run_table(group: TaskGroup) -> Table:
    """Every run that counts."""
    runs = [(method, run) for method in group.methods for own in method.runs.values() for run in own]
    rows = [
        [method.label, run.task, str(run.seed), number(run.summary[f"eval/{group.key}"]), run.place]
        for method, run in runs
    ]
    return Table("Runs", ["method", "task", "seed", group.title, "folder"], rows, words=True)


def records(analysis: Analysis) -> Iterator[dict[str, Any]]:
    """Rows of ``report.csv``, under :data:`CSV_COLUMNS`; unrounded."""
    title = analysis.group.title
    runs = {m.label: {task: len(own) for task, own in m.runs.items()} for m in analysis.group.methods}
    for label, estimates in analysis.aggregates.items():
        total = sum(runs[label][task] for task in analysis.group.tasks)
        for name, estimate in estimates.items():
            yield _record(title, "aggregate", label, estimate, statistic=name, runs=total)
    for task, means in analysis.tasks.items():
        yield {"score": title, "table": "before", "task": task, "statistic": "mean", "value": analysis.before[task]}
        for label, estimate in means.items():
            yield _record(title, "task", label, estimate, task=task, statistic="mean", runs=runs[label][task])
    for c in analysis.comparisons:
        yield from _comparison_records(title, c)
    for method in analysis.group.methods:
        for key, value in costs_of(method).items():
            yield {"score": title, "table": "cost", "method": method.label, "statistic": key, "value": value}


def _comparison_records(title: str, c: Comparison) -> Iterator[dict[str, Any]]:
    pair = {"versus": c.second, "runs": c.pairs}
    yield _record(title, "comparison", c.first, c.improvement, statistic="probability of improvement", **pair)
    if c.difference is not None:
        yield _record(title, "comparison", c.first, c.difference, statistic="difference", **pair)
    p_values = {"p over runs": c.p_runs, "p over runs, corrected": c.p_corrected, "p over goals": c.p_goals}
    for name, p in p_values.items():
        if p is not None:
            row = {"score": title, "table": "comparison", "method": c.first, "statistic": name, "value": p}
            yield row | pair | ({"runs": c.goals} if name == "p over goals" else {})


def _record(title: str, table: str, method: str, estimate: stats.Estimate, **more: Any) -> dict[str, Any]:
    ends = {"value": float(estimate.value), "low": float(estimate.low), "high": float(estimate.high)}
    return {"score": title, "table": table, "method": method, **ends, **more}


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows under a heading; what a row lacks stays empty."""

    def write(aside: Path) -> None:
        with aside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({key: csv_cell(value) for key, value in row.items()} for row in rows)

    write_file(path, write)


def csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula (OWASP, "CSV Injection"): text gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(tuple("=+-@\t\r")) else value
