"""What a study measures in each run, and what it concludes about each pair of methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from eva_rl.report import stats
from eva_rl.report.methods import Method, TaskGroup, paired_runs
from eva_rl.report.runs import Run
from eva_rl.report.settings import Decision
from eva_rl.report.stats.aggregates import Floats
from eva_rl.report.stats.equivalence import PairedMean, paired_mean
from eva_rl.tracking.tracker import by_training_step

LEVEL = 0.05
"""Two methods differ significantly if the corrected p value is below this."""
SOLVED = 0.9
FINAL, AREA, UPDATES_TO_90, CLONING_LOSS = "final", "area", "updates_to_90", "cloning_loss"

BY_SCORE = Decision(FINAL)
"""What methods are compared by where nothing else was decided."""

EQUIVALENT, UNDECIDED = "equivalent", "undecided"
"""Verdicts that name no better method."""


def held_out(run: Run, key: str) -> Floats:
    """Held-out evaluations of a run, (N, 2): steps of training and scores, one a step, in order.

    Env steps of validation and of EVA's rollouts are none of training: a method's endpoint depends on neither.
    """
    found = {step: row[f"eval/{key}"] for step, row in by_training_step(run.rows) if f"eval/{key}" in row}
    return np.array(sorted(found.items()), dtype=np.float64).reshape(-1, 2)


def has_curve(run: Run, points: Floats) -> bool:
    """Whether held-out evaluations are a learning curve; those before, between and after phases of training are none.

    A run of an online algorithm that was to be evaluated on the way may have reached its last env step in the first
    iteration: its curve is a line.
    """
    return run.evaluates and len(points) > 1


def final_score(run: Run, key: str) -> float:
    """The score after the last update."""
    return float(run.summary[f"eval/{key}"])


def area(run: Run, key: str) -> float:
    """Area under the score against steps, over their number: the mean score while learning. NaN without a curve."""
    points = held_out(run, key)
    if not has_curve(run, points):
        return float("nan")
    steps, scores = points.T
    return float(np.trapezoid(scores, steps) / (steps[-1] - steps[0]))


def updates_to_90(run: Run, key: str) -> float:
    """Steps to a success of 90 %, by linear interpolation; a run that never gets there counts with its last step.

    The mean of this is a restricted mean time (Royston and Parmar 2013). NaN without a curve, or without success.
    """
    points = held_out(run, key)
    if not has_curve(run, points) or key != "success_rate":
        return float("nan")
    steps, scores = points.T
    reached = np.flatnonzero(scores >= SOLVED)
    if not len(reached):
        return float(steps[-1])
    first = int(reached[0])
    if first == 0:
        return float(steps[0])
    share = (SOLVED - scores[first - 1]) / (scores[first] - scores[first - 1])
    return float(steps[first - 1] + share * (steps[first] - steps[first - 1]))


def cloning_loss(run: Run, key: str) -> float:
    """Loss on held-out demonstrations (``eval.demonstrations``) after the last update; NaN where it is not known."""
    del key
    return float(run.summary.get("eval/cloning_loss", np.nan))


@dataclass(frozen=True)
class Endpoint:
    """What is measured in each run.

    Attributes:
        title: In words.
        value: Of a run whose task is judged by a score.
        sign: 1 where more is better, -1 where less is.
    """

    title: str
    value: Callable[[Run, str], float]
    sign: int = 1


ENDPOINTS = {
    FINAL: Endpoint("score after the last update", final_score),
    AREA: Endpoint("area under the learning curve", area),
    UPDATES_TO_90: Endpoint("steps to 90 % success", updates_to_90, -1),
    CLONING_LOSS: Endpoint("cloning loss on held-out demonstrations", cloning_loss, -1),
}


@dataclass(frozen=True)
class Verdict:
    """What is concluded about two methods.

    Attributes:
        endpoint: What was measured.
        first: Label.
        second: Label.
        mean: Difference, first minus second, with its standard error; None with fewer than two pairs a task.
        pairs: Pairs of runs with one task and one seed.
        p_difference: Paired permutation test, two-sided.
        p_equivalence: Two one-sided t tests; None without a margin.
        corrected: Both p values corrected for all tests of the endpoint, in that order.
        text: In words.
    """

    endpoint: str
    first: str
    second: str
    mean: PairedMean | None
    pairs: int
    p_difference: float
    p_equivalence: float | None
    corrected: tuple[float, float]
    text: str


def endpoint_values(method: Method, task: str, endpoint: str, key: str) -> dict[tuple[int, str], float]:
    """By seed and hash of the data, what was measured in the runs of a task; without runs where it is not known."""
    values = {(run.seed, run.data_hash): ENDPOINTS[endpoint].value(run, key) for run in method.runs.get(task, ())}
    return {which: value for which, value in values.items() if np.isfinite(value)}


@dataclass(frozen=True)
class EndpointMean:
    """What was measured of a method.

    Attributes:
        label: Of the method.
        value: Mean over the common tasks of the means over seeds.
        spread: The same with its interval; None where no seeds vary, or a task has only one.
    """

    label: str
    value: float
    spread: PairedMean | None


def endpoint_means(group: TaskGroup, endpoint: str) -> list[EndpointMean]:
    """Of each method that was measured on all common tasks, the best first."""
    found = []
    for method in group.methods:
        by_task = [list(endpoint_values(method, task, endpoint, group.key).values()) for task in group.tasks]
        if by_task and all(by_task):
            arrays = [np.array(values) for values in by_task]
            value = float(np.mean([task.mean() for task in arrays]))
            found.append(EndpointMean(method.label, value, paired_mean(arrays, _resolution(group, endpoint))))
    return sorted(found, key=lambda mean: -ENDPOINTS[endpoint].sign * mean.value)


def paired_differences(group: TaskGroup, endpoint: str, first: Method, second: Method) -> list[Floats]:
    """First minus second for each pair of runs, for each common task with such pairs."""
    value = ENDPOINTS[endpoint].value
    found = []
    for task in group.tasks:
        pairs = paired_runs(first, second, task)
        differences = np.array([value(a, group.key) - value(b, group.key) for a, b in pairs])
        found.append(differences[np.isfinite(differences)])
    return [task for task in found if len(task)]


def verdicts(group: TaskGroup, decision: Decision = BY_SCORE) -> list[Verdict]:
    """Superiority and, with a margin, equivalence of each pair of methods; empty where the endpoint is not known.

    With a reference the pairs are those of each other method with it. Of a pair at most one of the two null hypotheses
    (equal; at least a margin apart) is true, so that Holm's method with Shaffer's count of the hypotheses that can
    still be true keeps the chance of any false verdict below 5 %.
    """
    endpoint, margin = decision.endpoint, decision.margin
    pairs = [(a, b, paired_differences(group, endpoint, a, b)) for a, b in group.compared(decision.reference)]
    known = [(a.label, b.label, d) for a, b, d in pairs if d]
    means = [paired_mean(d, _resolution(group, endpoint)) for _, _, d in known]
    different = [stats.stratified_sign_flip_test(d) for _, _, d in known]
    equivalent = [None if margin is None or m is None else m.equivalence_p(margin) for m in means]
    tests = [(i, p) for i, p in enumerate(different)] + [(i, p) for i, p in enumerate(equivalent) if p is not None]
    corrected = iter(stats.holm([p for _, p in tests], [i for i, _ in tests]))
    superior = [next(corrected) for _ in known]
    same = [1.0 if p is None else next(corrected) for p in equivalent]
    found = []
    for i, (a, b, d) in enumerate(known):
        better = ENDPOINTS[endpoint].sign * float(np.mean([task.mean() for task in d]))
        text = _in_words(a, b, better, superior[i], same[i])
        p_values = different[i], equivalent[i], (superior[i], same[i])
        found.append(Verdict(endpoint, a, b, means[i], sum(map(len, d)), *p_values, text))
    return found


def _resolution(group: TaskGroup, endpoint: str) -> float:
    """One episode of a success rate, over the number of episodes."""
    episodes = [
        len(run.goals) for method in group.methods for runs in method.runs.values() for run in runs if run.goals
    ]
    return 1 / min(episodes) if group.bounded and endpoint in {FINAL, AREA} and episodes else 0.0


def _in_words(first: str, second: str, better: float, superior: float, same: float) -> str:
    winner = f"{first if better > 0 else second} better"
    if superior < LEVEL:
        return f"{winner}, by less than the margin" if same < LEVEL else winner
    return EQUIVALENT if same < LEVEL else UNDECIDED
