"""Runs, methods and groups of tasks made by hand, without files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eva_rl.report.comparison import Analysis, Resampling, analyse
from eva_rl.report.methods import TaskGroup, group_tasks
from eva_rl.report.reading import Row
from eva_rl.report.runs import Run

QUICK = Resampling(50)


def make_run(
    method: str,
    task: str,
    seed: int,
    score: float,
    *,
    key: str = "success_rate",
    settings: Mapping[str, Any] | None = None,
    goals: Sequence[bool] = (),
    rows: Sequence[Row] = (),
    summary: Mapping[str, Any] | None = None,
) -> Run:
    """A run with a score; ``goals`` says which held-out episodes were solved."""
    found = {"env": task, "method": method, "seed": seed, f"eval/{key}": score, **(summary or {})}
    pairs = tuple(sorted((name, json.dumps(value)) for name, value in (settings or {}).items()))
    episodes = {k: {"success": float(solved), "episode_return": 0.0} for k, solved in enumerate(goals)}
    return Run(Path(f"{method}/{task}/{seed}"), task, method, seed, pairs, found, episodes, rows)


def make_runs(scores: Mapping[str, Mapping[str, Sequence[float]]], key: str = "success_rate") -> list[Run]:
    """Runs from scores by method, task and seed."""
    return [
        make_run(method, task, seed, score, key=key)
        for method, tasks in scores.items()
        for task, own in tasks.items()
        for seed, score in enumerate(own)
    ]


def make_group(scores: Mapping[str, Mapping[str, Sequence[float]]], key: str = "success_rate") -> TaskGroup:
    """The only group of these runs."""
    (group,) = group_tasks(make_runs(scores, key))
    return group


def analysis_of(scores: Mapping[str, Mapping[str, Sequence[float]]], key: str = "success_rate") -> Analysis:
    """The analysis of the only group of these runs."""
    return analyse(make_group(scores, key), QUICK)
