"""``plan=true``: what a study costs and what it can detect, before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from eva_rl.benchmark.study import Study
from eva_rl.envs import env_spec
from eva_rl.errors import UserError, counted
from eva_rl.report.methods import TaskGroup, group_tasks
from eva_rl.report.reading import find_runs
from eva_rl.report.runs import Run, read_runs
from eva_rl.report.stats.equivalence import equivalence_power, smallest_difference
from eva_rl.report.tables import Table, number
from eva_rl.report.verdicts import AREA, FINAL, paired_differences

ASSUMED_SPREAD = 0.2
"""Standard deviation of success over seeds after few updates on few demonstrations; of a difference, times root two."""
SEEDS = (3, 5, 10, 20, 40)


@dataclass(frozen=True)
class Pilot:
    """What finished runs say beforehand.

    Attributes:
        spread: Standard deviation of the paired difference between two runs of one task and seed; NaN where it is not
            known, or tasks have no unit in common.
        seconds: Of a run, tuning runs included, median; NaN where it is not known.
        source: Where that comes from.
    """

    spread: float
    seconds: float
    source: str


def read_pilot(place: str, study: Study) -> Pilot:
    """The spread and the duration of the runs of a pilot; of success rates, an assumption where none is named.

    Raises:
        UserError: No two methods of it share two seeds on a task.
    """
    if not place:
        return _assumed(study)
    runs, _ = read_runs(find_runs([place]))
    tested = [run for run in runs if run.tuning is None]
    variances = [found for group in group_tasks(tested) if (found := _variances(group, study.endpoint))]
    if not variances:
        raise UserError(
            f"pilot={place}: no two methods share two seeds on a task where the endpoint {study.endpoint} was "
            "measured, so that its spread is not known. Name other runs, or none."
        )
    source = f"from {counted(len(tested), 'run')} in {place}"
    if len(variances) > 1:
        return Pilot(float("nan"), _seconds(runs), f"{source}, whose tasks are judged by different scores")
    return Pilot(float(np.sqrt(np.mean(variances[0]))), _seconds(runs), source)


def _assumed(study: Study) -> Pilot:
    """What is assumed of success rates; other endpoints have units of their own."""
    if study.endpoint in {FINAL, AREA} and all(env_spec(task).reports_success for task in study.tasks):
        return Pilot(2**0.5 * ASSUMED_SPREAD, float("nan"), f"assuming a spread of {ASSUMED_SPREAD} over seeds")
    return Pilot(float("nan"), float("nan"), "nothing is assumed of what is no success rate")


def _variances(group: TaskGroup, endpoint: str) -> list[float]:
    """Of the paired differences of each two methods, by task, with two pairs or more."""
    return [
        float(np.var(task, ddof=1))
        for first, second in combinations(group.methods, 2)
        for task in paired_differences(group, endpoint, first, second)
        if len(task) > 1
    ]


def _seconds(runs: Sequence[Run]) -> float:
    totals = [
        sum(v for v in run.summary["seconds"].values() if isinstance(v, float))
        for run in runs
        if "seconds" in run.summary
    ]
    return float(np.median(totals)) if totals else float("nan")


def plan_table(study: Study, pilot: Pilot, tuning_runs: int, test_runs: int, threads: int) -> Table:
    """Runs, core-hours and what can be found out, for the study's seeds and for others."""
    tasks, methods = len(study.tasks), len(study.methods)
    comparisons = methods - 1 if study.reference else methods * (methods - 1) // 2
    margin = study.margin if comparisons else None
    rows = []
    for seeds in sorted({len(study.seeds), *SEEDS}):
        runs = tuning_runs + test_runs // len(study.seeds) * seeds
        hours = runs * pilot.seconds * threads / 3600
        found = smallest_difference(pilot.spread, tasks, seeds, comparisons) if comparisons else float("nan")
        mark = " (this study)" if seeds == len(study.seeds) else ""
        row = [f"{seeds}{mark}", str(runs), f"{hours:.1f}" if np.isfinite(hours) else "-", number(found)]
        if margin is not None:
            row.append(number(equivalence_power(pilot.spread, margin, tasks, seeds, comparisons), 2))
        rows.append(row)
    return Table(
        f"{counted(tasks, 'task')}, {counted(methods, 'method')}, {counted(tuning_runs, 'tuning run')}",
        ["seeds", "runs", "core-hours", "smallest difference", *([] if margin is None else ["equivalent"])],
        rows,
        _note(pilot, comparisons, margin),
    )


def _note(pilot: Pilot, comparisons: int, margin: float | None) -> str:
    """What the smallest difference is, and how it can be known better."""
    if not comparisons:
        return "There is one method, and nothing to compare it with."
    if not np.isfinite(pilot.spread):
        return (
            f"The smallest difference is not known ({pilot.source}). Name finished runs of tasks that are judged by "
            "one score, and measured by the study's endpoint: pilot=FOLDER."
        )
    equivalent = "" if margin is None else f"Equivalent: how likely two equal methods are found so, within {margin:g}. "
    return (
        f"Smallest difference: found with probability 0.8 by a paired test at level 0.05, corrected for {comparisons} "
        f"pairs of methods; spread of a paired difference {pilot.spread:.3f} ({pilot.source}); - where so few pairs "
        f"cannot reach the level at all. {equivalent}Name finished runs with pilot=FOLDER for a better estimate."
    )
