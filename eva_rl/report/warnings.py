"""What a reader has to know before drawing conclusions from the tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from eva_rl.agents.policy import same_task
from eva_rl.errors import counted
from eva_rl.report.comparison import Analysis, overlapping
from eva_rl.report.methods import RANK, TaskGroup, differing_settings, paired_runs, plain_setting
from eva_rl.report.runs import Problem, decision
from eva_rl.report.settings import ADAPTER, Decision
from eva_rl.report.verdicts import BY_SCORE, ENDPOINTS, EQUIVALENT, FINAL, LEVEL, UNDECIDED, Verdict, verdicts

FEW_RUNS, FEW_EPISODES = 5, 50
CEILING, FLOOR = 0.95, 0.05


@dataclass(frozen=True)
class ReportWarning:
    """One warning.

    Attributes:
        text: What is wrong, and what to do about it.
        severe: Whether it rules out picking a winner from the tables.
    """

    text: str
    severe: bool = False


def warnings_of(analysis: Analysis, problems: Sequence[Problem], by: Decision = BY_SCORE) -> list[ReportWarning]:
    """All warnings about a group of tasks, the severe ones first.

    Args:
        analysis: The group.
        problems: Runs that do not count.
        by: What methods are compared by.
    """
    group = analysis.group
    found = [
        *_verdict(analysis, by),
        *_few(analysis),
        *_uninformative(analysis),
        *_unequal(group),
        *_shared_data(group),
        *_settings(group),
        *_studies(group),
        *_decided(group, by),
    ]
    found += _diverged(group, problems)
    lost = [problem for problem in problems if problem.kind in {"unfinished", "damaged"}]
    if lost:
        found.append(ReportWarning(f"{counted(len(lost), 'unfinished or damaged run')} left out; see the list below."))
    return sorted(found, key=lambda warning: not warning.severe)


def _diverged(group: TaskGroup, problems: Sequence[Problem]) -> Iterator[ReportWarning]:
    """Runs of the test phase that diverged, without which their method looks better than it is."""
    runs = [problem.run for problem in problems if problem.run is not None and problem.run.tuning is None]
    tasks = {*group.tasks, *group.partial}
    own = [run for run in runs if any(same_task(run.task, task) for task in tasks)]  # a config has it as it was typed
    if named := [f"{run.method} on {run.task}, seed {run.seed}" for run in own]:
        yield ReportWarning(f"Diverged, and left out of what is said of the method: {_listed(named)}.", severe=True)


def _decided(group: TaskGroup, by: Decision) -> Iterator[ReportWarning]:
    """Another endpoint, margin or reference than the study file fixed before its runs."""
    stated = decision(run for method in group.methods for own in method.runs.values() for run in own)
    if stated not in {None, by}:
        yield ReportWarning(
            f"The study decided on {stated} before its runs; this report compares by {by}. Leave all of these out for "
            "the study's own.",
            severe=True,
        )


def _verdict(analysis: Analysis, by: Decision) -> Iterator[ReportWarning]:
    group = analysis.group
    if len(group.methods) < 2:
        yield ReportWarning("There is only one method: nothing is compared.")
    elif not group.tasks:
        yield ReportWarning("The methods have no task in common: they cannot be compared.", severe=True)
    elif by.reference and not group.named(by.reference):
        yield ReportWarning(
            f"The study's reference, {by.reference}, has no run here: nothing is compared.", severe=True
        )
    else:
        yield from _reference(group, by.reference)
        yield from _undecided(analysis, verdicts(group, by), by.endpoint)
        yield from _overlap(analysis)


def _reference(group: TaskGroup, reference: str) -> Iterator[ReportWarning]:
    """A reference that is several rows."""
    rows = [method.label for method in group.named(reference)] if reference else []
    if len(rows) > 1:
        yield ReportWarning(
            f"The study's reference, {reference}, has several rows here: {_listed(rows)}. Each pair is compared. To "
            f"compare with one of them, type reference='{rows[0]}'.",
            severe=True,
        )


def _undecided(analysis: Analysis, found: Sequence[Verdict], endpoint: str) -> Iterator[ReportWarning]:
    """The pairs of which the endpoint says nothing; those that the verdicts call equivalent are not among them."""
    by = "" if endpoint == FINAL else f" by {ENDPOINTS[endpoint].title}"
    undecided = [v for v in found if v.text == UNDECIDED]
    if not found:
        yield ReportWarning(f"No two runs of one task and seed tell of the {ENDPOINTS[endpoint].title}.", severe=True)
    elif len(undecided) == len(found):
        text = f"No two methods differ significantly{by}. Do not pick a winner from the tables."
        yield ReportWarning(f"{text} {_reason(analysis, found)}", severe=True)
    elif undecided:
        others = _listed([f"{v.first} and {v.second}" for v in undecided])
        yield ReportWarning(f"No significant difference{by} between: {others}.", severe=True)
    if same := [f"{v.first} and {v.second}" for v in found if v.text == EQUIVALENT]:
        yield ReportWarning(f"Equivalent{by}, within the margin: {_listed(same)}.")


def _reason(analysis: Analysis, found: Sequence[Verdict]) -> str:
    """Why nothing is significant though intervals may lie apart."""
    best, pairs = min(found, key=lambda v: v.corrected[0]), max(v.pairs for v in found)
    least = min(1.0, len(found) * 2 / 2**pairs)
    if least >= LEVEL:
        return (
            f"The reason: with {pairs} pairs of runs a permutation test cannot give a corrected p value below "
            f"{least:.2g}, whatever the intervals look like. Add seeds or tasks."
        )
    apart = " Intervals of single methods ignore the pairs and the number of comparisons." if _apart(analysis) else ""
    return f"The smallest corrected p value is {best.corrected[0]:.2g} ({best.first} and {best.second}).{apart}"


def _apart(analysis: Analysis) -> bool:
    return len(overlapping(analysis)) < len(analysis.aggregates) - 1


def _overlap(analysis: Analysis) -> Iterator[ReportWarning]:
    pairs = overlapping(analysis)
    if pairs:
        names = _listed([f"{a} and {b}" for a, b in pairs])
        yield ReportWarning(f"Next to each other by IQM, with overlapping (or unknown) intervals: {names}.")


def _few(analysis: Analysis) -> Iterator[ReportWarning]:
    group = analysis.group
    fewest_runs = min(len(runs) for method in group.methods for runs in method.runs.values())
    if fewest_runs == 1:
        yield ReportWarning(
            f"Some method has one seed on some task: there is no interval. {_limit(analysis)}", severe=True
        )
    elif fewest_runs < FEW_RUNS:
        yield ReportWarning(f"Few seeds: {fewest_runs} for some method and task. {_limit(analysis)}")
    episodes = [len(run.goals) for method in group.methods for runs in method.runs.values() for run in runs]
    fewest = min((number for number in episodes if number), default=0)
    if group.bounded and 0 < fewest < FEW_EPISODES:
        spread = 100 * 0.5 / np.sqrt(fewest)
        yield ReportWarning(
            f"Few episodes: {fewest} in some evaluation, which alone gives a success rate near one half a standard "
            f"error of {spread:.0f} points. Evaluate with eval.episodes={FEW_EPISODES} or more."
        )


def _limit(analysis: Analysis) -> str:
    """How small a p value can be, by the two methods with the most pairs of runs."""
    pairs = max((comparison.pairs for comparison in analysis.comparisons), default=0)
    if not pairs:
        return "Add seeds."
    return (
        f"With {counted(pairs, 'pair')} of runs no p value over runs can be below {min(1.0, 2 / 2**pairs):.2g}, before "
        "it is corrected for the number of comparisons. Add seeds."
    )


def _uninformative(analysis: Analysis) -> Iterator[ReportWarning]:
    if not analysis.group.bounded:
        return
    for name, low, high in (("solved", CEILING, 1.0), ("failed", 0.0, FLOOR)):
        tasks = [
            task
            for task, means in analysis.tasks.items()
            if len(means) > 1 and all(low <= float(estimate.value) <= high for estimate in means.values())
        ]
        if tasks:
            yield ReportWarning(f"Almost always {name} by every method, hence uninformative: {_listed(tasks)}.")


def _unequal(group: TaskGroup) -> Iterator[ReportWarning]:
    if group.partial and len(group.methods) > 1:
        yield ReportWarning(f"Not in the aggregates, because some method lacks them: {_listed(group.partial)}.")
    for task in group.tasks:
        most = max(len(method.runs[task]) for method in group.methods)
        if any(len(paired_runs(a, b, task)) < most for a, b in combinations(group.methods, 2)):
            yield ReportWarning(f"Seeds differ between methods on {task}; paired tests take those that both have.")
            break
    pairs = [p for task in group.tasks for a, b in combinations(group.methods, 2) for p in paired_runs(a, b, task)]
    for what, differ in (
        ("held-out goals", any(a.goals and b.goals and a.goals.keys() != b.goals.keys() for a, b in pairs)),
        ("demonstrations", any(a.data_hash != b.data_hash for a, b in pairs)),
    ):
        if differ:
            yield ReportWarning(f"Runs of one task and seed have different {what}: pairs are not quite alike.")


def _shared_data(group: TaskGroup) -> Iterator[ReportWarning]:
    """Seeds that tell nothing of other demonstrations."""
    tasks = [
        task
        for task in group.tasks
        if any(_all_alike([run.data_hash for run in method.runs[task]]) for method in group.methods)
    ]
    if tasks:
        yield ReportWarning(
            f"All seeds of a method clone the same demonstrations: {_listed(tasks)}. Intervals and p values say "
            "nothing of other demonstrations, which decide more than the seed. Draw some for each: data.sample=N."
        )


def _all_alike(hashes: Sequence[str]) -> bool:
    return len(hashes) > 1 and bool(hashes[0]) and len(set(hashes)) == 1


def _studies(group: TaskGroup) -> Iterator[ReportWarning]:
    runs = [run for method in group.methods for own in method.runs.values() for run in own]
    if len({run.study for run in runs}) > 1:
        yield ReportWarning("The runs belong to different study files, or some to none.", severe=True)


def _settings(group: TaskGroup) -> Iterator[ReportWarning]:
    everything = [method.settings for method in group.methods]
    differing = [key for key in differing_settings(everything, everywhere=True) if key != ADAPTER]
    if differing:
        shown = _listed([f"{key}: {_values(key, everything)}" for key in differing], between="; ")
        yield ReportWarning(f"Methods differ in more than the adapter ({shown}). Each row is at its own settings.")
    ranks = [method.settings for method in group.methods if RANK in method.settings]
    if RANK not in differing and len({settings[RANK] for settings in ranks}) > 1:
        yield ReportWarning("Ranks differ between rows: compare methods at one rank.")


def _values(key: str, everything: Sequence[object]) -> str:
    return _listed(sorted({plain_setting(settings[key]) for settings in everything if isinstance(settings, dict)}))


def _listed(names: Sequence[str], most: int = 8, between: str = ", ") -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more
