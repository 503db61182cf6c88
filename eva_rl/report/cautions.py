"""Where the data cannot tell methods apart, and what else a reader has to know before believing a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from eva_rl.report.comparison import Analysis, overlapping
from eva_rl.report.methods import RANK, Family, differing_settings
from eva_rl.report.runs import Problem

FEW_RUNS, FEW_EPISODES = 5, 50
CEILING, FLOOR = 0.95, 0.05


@dataclass(frozen=True)
class Caution:
    """One thing to know.

    Attributes:
        text: What, and what to do.
        grave: Whether it forbids to read a winner out of the tables.
    """

    text: str
    grave: bool = False


def warnings_of(analysis: Analysis, problems: Sequence[Problem]) -> list[Caution]:
    """All warnings about a family of tasks, the gravest first."""
    family = analysis.family
    found = [
        *_verdict(analysis),
        *_few(family),
        *_uninformative(analysis),
        *_unequal(family),
        *_settings(family),
    ]
    lost = [problem for problem in problems if problem.kind in {"unfinished", "damaged"}]
    if lost:
        found.append(Caution(f"{len(lost)} runs are unfinished or damaged and do not count; they are listed below."))
    return sorted(found, key=lambda warning: not warning.grave)


def _verdict(analysis: Analysis) -> Iterator[Caution]:
    family, comparisons = analysis.family, analysis.comparisons
    if len(family.methods) < 2:
        yield Caution("There is one method only: nothing is compared.")
    elif not family.tasks:
        yield Caution("The methods have no task in common: they cannot be compared.", grave=True)
    else:
        apart = [c for c in comparisons if c.told_apart]
        if not apart:
            yield Caution("These data tell no two methods apart. Do not read a winner out of the tables.", grave=True)
        elif len(apart) < len(comparisons):
            others = [f"{c.first} and {c.second}" for c in comparisons if not c.told_apart]
            yield Caution(f"These data do not tell apart: {_listed(others)}.", grave=True)
        yield from _overlap(analysis)


def _overlap(analysis: Analysis) -> Iterator[Caution]:
    pairs = overlapping(analysis)
    if pairs:
        names = _listed([f"{a} and {b}" for a, b in pairs])
        yield Caution(f"Next to each other by IQM, with overlapping (or unknown) intervals: {names}.")


def _few(family: Family) -> Iterator[Caution]:
    counts = {len(runs) for method in family.methods for runs in method.runs.values()}
    if min(counts) == 1:
        yield Caution("Some method has one seed on some task: there is no interval, nor a test of methods.", grave=True)
    elif min(counts) < FEW_RUNS:
        tasks = len(family.tasks)
        least = 2 / 2 ** (min(counts) * max(1, tasks))
        yield Caution(
            f"Few seeds: {min(counts)} for some method and task. With {tasks} tasks no p value over runs can be below "
            f"{least:.2g}, before it is corrected for the number of comparisons. Add seeds."
        )
    episodes = [len(run.goals) for method in family.methods for runs in method.runs.values() for run in runs]
    fewest = min((number for number in episodes if number), default=0)
    if family.bounded and 0 < fewest < FEW_EPISODES:
        spread = 100 * 0.5 / np.sqrt(fewest)
        yield Caution(
            f"Few episodes: {fewest} in some evaluation, which alone gives a success rate near one half a standard "
            f"error of {spread:.0f} points. Evaluate with eval.episodes={FEW_EPISODES} or more."
        )


def _uninformative(analysis: Analysis) -> Iterator[Caution]:
    if not analysis.family.bounded:
        return
    for name, low, high in (("solved", CEILING, 1.0), ("failed", 0.0, FLOOR)):
        tasks = [
            task
            for task, means in analysis.tasks.items()
            if len(means) > 1 and all(low <= float(estimate.value) <= high for estimate in means.values())
        ]
        if tasks:
            yield Caution(f"By every method almost always {name}, so of no help in comparing: {_listed(tasks)}.")


def _unequal(family: Family) -> Iterator[Caution]:
    if family.partial and len(family.methods) > 1:
        yield Caution(f"Not in the aggregates, because some method lacks them: {_listed(family.partial)}.")
    for task in family.tasks:
        seeds = {tuple(run.seed for run in method.runs[task]) for method in family.methods}
        if len(seeds) > 1:
            yield Caution(f"Seeds differ between methods on {task}; paired tests take those that both have.")
            break
    pairs = [(run.task, run.seed, run) for m in family.methods for runs in m.runs.values() for run in runs]
    for what, values in (
        ("held-out goals", {(t, s, frozenset(run.goals)) for t, s, run in pairs if run.goals}),
        ("demonstrations", {(t, s, (run.summary.get("data") or {}).get("hash")) for t, s, run in pairs}),
    ):
        if len(values) > len({value[:2] for value in values}):
            yield Caution(f"Runs of one task and seed have different {what}: pairs are not quite alike.")


def _settings(family: Family) -> Iterator[Caution]:
    everything = [method.settings for method in family.methods]
    differing = differing_settings(everything, everywhere=True)
    if differing:
        shown = "; ".join(f"{key}: {_values(key, everything)}" for key in differing)
        yield Caution(f"Methods differ in more than the adapter ({shown}). Each row is at its own settings.")
    ranks = [method.settings for method in family.methods if RANK in method.settings]
    if RANK not in differing and len({settings[RANK] for settings in ranks}) > 1:
        yield Caution("Ranks differ between rows: compare methods at one rank.")


def _values(key: str, everything: Sequence[object]) -> str:
    values = sorted({str(json.loads(settings[key])) for settings in everything if isinstance(settings, dict)})
    return ", ".join(values)


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
