"""Runs by method at fixed settings, and the tasks and scores by which methods can be compared."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import combinations, count
from typing import Any

import numpy as np

from eva_rl.report.reading import one_line
from eva_rl.report.runs import RETURN, SCORES, Run, score_keys
from eva_rl.report.settings import Settings
from eva_rl.report.stats.aggregates import Floats

EPISODE_KEYS = {"success_rate": "success", "normalized_score": "episode_return", "mean_reward": "episode_return"}
RANK = "adapter.rank"
ALGORITHM, ALGORITHMS = "algo.name", "algo."
OF_TASKS = ("data.", "env.", "policy")
"""How the settings begin that may go with the task."""

Named = tuple[str, Mapping[str, str]]
"""A method's name and settings."""


@dataclass(frozen=True)
class Method:
    """One row of every table: a method at one rank and one set of settings, never the best of several.

    Attributes:
        label: The method's name, with what tells it from other rows of the same name.
        name: As in ``adapter=``.
        settings: What decides its results.
        runs: By task, in order of their seeds, and of the hash of their data.
    """

    label: str
    name: str
    settings: Mapping[str, str]
    runs: Mapping[str, Sequence[Run]]

    @property
    def rank(self) -> str:
        """Its rank, or a dash."""
        return self.settings.get(RANK, "-")

    def scores(self, task: str, key: str) -> Floats:
        """Final scores of its runs of a task, (runs,)."""
        return np.array([run.summary[f"eval/{key}"] for run in self.runs[task]], dtype=np.float64)


@dataclass(frozen=True)
class TaskGroup:
    """Tasks that are judged by the same score.

    Attributes:
        title: The score, in words.
        key: The score's name in ``summary.json``, after ``eval/``.
        tasks: Those that every method has: what is aggregated.
        partial: Those that some method lacks.
        methods: Rows.
    """

    title: str
    key: str
    tasks: Sequence[str]
    partial: Sequence[str]
    methods: Sequence[Method]

    def strata(self, method: Method) -> list[Floats]:
        """Final scores of each common task."""
        return [method.scores(task, self.key) for task in self.tasks]

    @property
    def bounded(self) -> bool:
        """Whether scores lie between 0 and 1."""
        return self.key == "success_rate"

    def compared(self, reference: str = "") -> list[tuple[Method, Method]]:
        """Each pair of methods; with a reference, each other method with it, and none where it has no runs.

        Each pair, too, where the reference is the name of several rows.
        """
        own = self.called(reference)
        if own is not None:
            return [(method, own) for method in self.methods if method is not own]
        return list(combinations(self.methods, 2)) if not reference or self.named(reference) else []

    def called(self, name: str) -> Method | None:
        """The method of that label, or the only one of that name."""
        found = self.named(name)
        return found[0] if len(found) == 1 else None

    def named(self, name: str) -> list[Method]:
        """The method of that label, or all of that name."""
        return [m for m in self.methods if m.label == name] or [m for m in self.methods if m.name == name]


def group_tasks(runs: Sequence[Run]) -> list[TaskGroup]:
    """Group runs by how their tasks are judged, and then by method; returns of different tasks are never averaged."""
    grouped: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for task, key in sorted(score_keys(runs).items()):
        title = SCORES[key] if key != RETURN else f"{SCORES[key]} on {task}"
        grouped[title, key] += [run for run in runs if run.task == task]
    return [_task_group(title, key, own) for (title, key), own in grouped.items()]


def _task_group(title: str, key: str, runs: Sequence[Run]) -> TaskGroup:
    methods = make_methods(runs)
    tasks = sorted({run.task for run in runs})
    common = [task for task in tasks if all(task in method.runs for method in methods)]
    return TaskGroup(title, key, common, [task for task in tasks if task not in common], methods)


def make_methods(runs: Sequence[Run]) -> list[Method]:
    """One method for each name and set of settings."""
    grouped: dict[tuple[str, Settings], list[Run]] = defaultdict(list)
    by_task = settings_of_tasks(runs)
    for run in runs:
        grouped[run.method, tuple(pair for pair in run.settings if pair[0] not in by_task)].append(run)
    settings = {key: dict(key[1]) for key in grouped}
    keys = sorted(grouped)
    labels = _labels([(key[0], settings[key]) for key in keys])
    methods = []
    for key, label in zip(keys, labels, strict=True):
        own = sorted(grouped[key], key=lambda run: (run.seed, run.data_hash))
        tasks = {task: [run for run in own if run.task == task] for task in sorted({run.task for run in own})}
        methods.append(Method(label, key[0], settings[key], tasks))
    return methods


def settings_of_tasks(runs: Sequence[Run]) -> set[str]:
    """Settings of policy, data and environment that go with the task: all runs of one task share them.

    They tell tasks apart, as ``data=minari:mujoco/hopper/medium-v0`` and ``data=minari:mujoco/walker2d/medium-v0`` do,
    and not methods.
    """
    found: dict[str, dict[str, set[str | None]]] = defaultdict(lambda: defaultdict(set))
    settings = [(run.task, dict(run.settings)) for run in runs]
    for key in {key for _, own in settings for key in own if key.startswith(OF_TASKS)}:
        for task, own in settings:
            found[key][task].add(own.get(key))
    return {key for key, tasks in found.items() if all(len(values) == 1 for values in tasks.values())}


def paired_runs(first: Method, second: Method, task: str) -> list[tuple[Run, Run]]:
    """Pairs of runs of a task and one seed, in order; where several of a method share a seed, of the same data, too."""
    ours, theirs = (_by_seed(method.runs.get(task, ())) for method in (first, second))
    return [pair for seed in sorted(ours.keys() & theirs.keys()) for pair in _pairs(ours[seed], theirs[seed])]


def _by_seed(runs: Sequence[Run]) -> dict[int, list[Run]]:
    found: dict[int, list[Run]] = defaultdict(list)
    for run in runs:
        found[run.seed].append(run)
    return found


def _pairs(ours: Sequence[Run], theirs: Sequence[Run]) -> list[tuple[Run, Run]]:
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])]
    others = {run.data_hash: run for run in theirs}
    return [(run, others[run.data_hash]) for run in ours if run.data_hash in others]


def _labels(methods: Sequence[Named]) -> list[str]:
    """What each method is called: its name, with the settings that tell it from the others of that name.

    Settings in which those that have them differ; where these do not suffice those, too, that some lack.
    """
    same_name = [[settings for other, settings in methods if other == name] for name, _ in methods]
    keys = [_differing(several) for several in same_name]
    labels = [_label(*one) for one in zip(methods, same_name, keys, strict=True)]
    for label in {one for one in labels if labels.count(one) > 1}:
        equal = [index for index, other in enumerate(labels) if other == label]
        further = set(differing_settings([methods[index][1] for index in equal]))
        for index in equal:
            labels[index] = _label(methods[index], same_name[index], keys[index] | further)
    return _unique(labels)


def _differing(several: Sequence[Mapping[str, str]]) -> set[str]:
    """Keys with more than one value among those that have them."""
    values = defaultdict(set)
    for key, value in (pair for settings in several for pair in settings.items()):
        values[key].add(value)
    return {key for key, found in values.items() if len(found) > 1}


def _label(method: Named, same_name: Sequence[Mapping[str, str]], differing: Set[str]) -> str:
    """The name, and those settings in which rows of this name differ; of an algorithm's own, rows of that algorithm."""
    name, own = method
    alike = [settings for settings in same_name if settings.get(ALGORITHM) == own.get(ALGORITHM)]
    of_algorithm = set(differing_settings(alike))
    shown = [k for k in sorted(differing) if k == ALGORITHM or not k.startswith(ALGORITHMS) or k in of_algorithm]
    short = {key: "algo" if key == ALGORITHM else key.rpartition(".")[2] for key in shown}
    taken = list(short.values())
    names = {key: key if taken.count(last) > 1 else last for key, last in short.items() if key in own}
    settings = [f"{typed}={plain_setting(own[key])}" for key, typed in names.items()]
    return f"{name} ({', '.join(settings)})" if settings else name


def _unique(labels: Sequence[str]) -> list[str]:
    """The labels, those that are not the first of their kind with a number."""
    found: list[str] = []
    for label in labels:
        others = (f"{label} #{number}" for number in count(2))
        found.append(label if label not in found else next(other for other in others if other not in found))
    return found


def plain_setting(value: str) -> str:
    """A setting's canonical JSON as one types it: ``true``, ``0.5``, ``q_proj+v_proj``, ``reach-v3``."""
    decoded: Any = json.loads(value)
    if isinstance(decoded, list):
        return one_line("+".join(map(str, decoded)))
    return one_line(decoded if isinstance(decoded, str) else value)


def differing_settings(several: Sequence[Mapping[str, str]], everywhere: bool = False) -> list[str]:
    """Keys with more than one value, sorted; with ``everywhere`` only those that all have."""
    keys = sorted({key for settings in several for key in settings})
    if everywhere:
        keys = [key for key in keys if all(key in settings for settings in several)]
    return [key for key in keys if len({settings.get(key) for settings in several}) > 1]
