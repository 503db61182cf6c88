"""What a report says of one group of tasks: aggregates, comparisons, profiles, curves, costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from eva_rl.report import stats
from eva_rl.report.methods import EPISODE_KEYS, Method, TaskGroup, paired_runs
from eva_rl.report.stats.aggregates import Floats
from eva_rl.report.verdicts import LEVEL

STATISTICS = {"IQM": stats.interquartile_mean, "mean": stats.mean, "median": stats.median}
THRESHOLDS = 101


@dataclass(frozen=True)
class Resampling:
    """How intervals are made.

    Attributes:
        replicates: Bootstrap resamples.
        confidence: Of the intervals.
        seed: Of the resampling.
    """

    replicates: int = 2_000
    confidence: float = 0.95
    seed: int = 0

    def __call__(self, statistic: Any, *groups: stats.Strata) -> stats.Estimate:
        """A statistic with its interval."""
        return stats.bootstrap(
            statistic, *groups, seed=self.seed, replicates=self.replicates, confidence=self.confidence
        )


@dataclass(frozen=True)
class Comparison:
    """Two methods on the tasks that all have.

    Attributes:
        first: Label.
        second: Label.
        improvement: Probability that a run of the first beats one of the second.
        difference: First minus second, mean over tasks of pairs of runs with one seed.
        pairs: Such pairs.
        p_runs: Paired permutation test over those pairs: do the methods differ?
        p_corrected: The same, corrected by Holm's method for the number of comparisons.
        goals: Held-out goals that both met.
        p_goals: Paired test over goals: do these trained policies differ?
    """

    first: str
    second: str
    improvement: stats.Estimate
    difference: stats.Estimate | None
    pairs: int
    p_runs: float
    p_corrected: float
    goals: int
    p_goals: float | None

    @property
    def significant(self) -> bool:
        """Whether the methods differ significantly."""
        return self.p_corrected < LEVEL


@dataclass(frozen=True)
class Analysis:
    """Everything about a group of tasks.

    Attributes:
        group: The tasks and methods.
        aggregates: By label, then by statistic.
        comparisons: Of each pair of methods.
        thresholds: Of the profiles, (K,).
        profiles: By label: share of runs above each threshold, (K,).
        tasks: By task, then label: the mean over runs.
        before: By task: the mean score before fine-tuning, NaN where it is not known.
    """

    group: TaskGroup
    aggregates: Mapping[str, Mapping[str, stats.Estimate]]
    comparisons: Sequence[Comparison]
    thresholds: Floats
    profiles: Mapping[str, stats.Estimate]
    tasks: Mapping[str, Mapping[str, stats.Estimate]]
    before: Mapping[str, float]


def analyse(group: TaskGroup, resampling: Resampling, reference: str = "") -> Analysis:
    """Compute it all; with a reference, methods are compared with it alone."""
    strata = {method.label: group.strata(method) for method in group.methods} if group.tasks else {}
    thresholds = _thresholds(group, strata)
    profile = partial(stats.performance_profile, thresholds=thresholds)
    return Analysis(
        group,
        {label: {name: resampling(s, own) for name, s in STATISTICS.items()} for label, own in strata.items()},
        compare_all(group, resampling, reference) if strata else [],
        thresholds,
        {label: resampling(profile, own) for label, own in strata.items()},
        {task: _task_means(group, task, resampling) for task in [*group.tasks, *group.partial]},
        {task: _before(group, task) for task in [*group.tasks, *group.partial]},
    )


def _thresholds(group: TaskGroup, strata: Mapping[str, stats.Strata]) -> Floats:
    if group.bounded or not strata:
        return np.linspace(0, 1, THRESHOLDS)
    scores = np.concatenate([runs for own in strata.values() for runs in own])
    return np.linspace(scores.min(), scores.max(), THRESHOLDS)


def _task_means(group: TaskGroup, task: str, resampling: Resampling) -> dict[str, stats.Estimate]:
    present = [method for method in group.methods if task in method.runs]
    return {method.label: resampling(stats.mean, [method.scores(task, group.key)]) for method in present}


def _before(group: TaskGroup, task: str) -> float:
    runs = [run for method in group.methods for run in method.runs.get(task, ())]
    known = [run.summary[key] for run in runs if (key := f"eval_before/{group.key}") in run.summary]
    return float(np.mean(known)) if known else float("nan")


def compare_all(group: TaskGroup, resampling: Resampling, reference: str = "") -> list[Comparison]:
    """Compare the pairs of methods, the better IQM first; p values are corrected for the number of pairs."""
    ordered = sorted(group.methods, key=lambda method: -float(stats.interquartile_mean(group.strata(method))))
    pairs = replace(group, methods=ordered).compared(reference)
    found = [_compare(group, first, second, resampling) for first, second in pairs]
    corrected = stats.holm([parts["p_runs"] for parts in found])
    return [Comparison(**parts, p_corrected=p) for parts, p in zip(found, corrected, strict=True)]


def _compare(group: TaskGroup, first: Method, second: Method, resampling: Resampling) -> dict[str, Any]:
    differences = [d for task in group.tasks if len(d := run_differences(group.key, task, first, second))]
    goals = goal_differences(group, first, second)
    return {
        "first": first.label,
        "second": second.label,
        "improvement": resampling(stats.probability_of_improvement, group.strata(first), group.strata(second)),
        "difference": resampling(stats.mean, differences) if differences else None,
        "pairs": sum(map(len, differences)),
        "p_runs": stats.stratified_sign_flip_test(differences) if differences else 1.0,
        "goals": len(goals),
        "p_goals": _test_goals(goals),
    }


def run_differences(key: str, task: str, first: Method, second: Method) -> Floats:
    """First minus second, for each pair of runs of a task."""
    pairs = paired_runs(first, second, task)
    return np.array([float(a.summary[f"eval/{key}"]) - float(b.summary[f"eval/{key}"]) for a, b in pairs])


def goal_differences(group: TaskGroup, first: Method, second: Method) -> list[Floats]:
    """First minus second on each goal of each task, for each pair of runs, [(pairs,)]."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    key = EPISODE_KEYS[group.key]
    for task in group.tasks:
        for ours, theirs in paired_runs(first, second, task):
            a, b = ours.goals, theirs.goals
            for goal in [g for g in a.keys() & b.keys() if key in a[g] and key in b[g]]:
                found[task, goal].append(float(a[goal][key]) - float(b[goal][key]))
    return [np.array(found[goal]) for goal in sorted(found)]


def _test_goals(goals: Sequence[Floats]) -> float | None:
    """One number a goal, so that seeds which share a goal count once; McNemar's exact test for a single seed."""
    if not goals:
        return None
    if all(len(seeds) == 1 for seeds in goals) and {float(d[0]) for d in goals} <= {-1.0, 0.0, 1.0}:
        only = np.array([d[0] for d in goals])
        return stats.mcnemar_test(only > 0, only < 0)
    return stats.sign_flip_test([seeds.mean() for seeds in goals])


def overlapping(analysis: Analysis, statistic: str = "IQM") -> list[tuple[str, str]]:
    """Methods that follow each other by a statistic and whose intervals overlap, or are not known."""
    ordered = sorted(analysis.aggregates.items(), key=lambda item: -float(item[1][statistic].value))
    estimates = [(label, own[statistic]) for label, own in ordered]
    return [(a, b) for (a, better), (b, worse) in pairwise(estimates) if not better.low > worse.high]
