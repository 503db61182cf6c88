"""Learning curves: success on validation episodes against gradient steps, env steps and seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eva_rl.report import stats
from eva_rl.report.comparison import Resampling
from eva_rl.report.methods import Method, TaskGroup
from eva_rl.report.reading import UPDATES, Row
from eva_rl.report.runs import Run
from eva_rl.report.stats.aggregates import Floats
from eva_rl.tracking.tracker import CLONING

AXES = {"gradient_steps": "gradient steps", "env_steps": "env steps", "seconds": "seconds"}
BEFORE = "eval_before/"
"""How metrics begin of the evaluation before training."""
GRID = 25
REPLICATES = 400


@dataclass(frozen=True)
class Points:
    """Validation scores of a run.

    Attributes:
        values: (N,).
        places: By axis, (N,), increasing.
    """

    values: Floats
    places: Mapping[str, Floats]


@dataclass(frozen=True)
class Curve:
    """A method's interquartile mean over runs and tasks.

    Attributes:
        label: The method.
        places: Along the axis, (N,).
        estimate: (N,).
    """

    label: str
    places: Floats
    estimate: stats.Estimate


def points_of(run: Run, key: str) -> Points:
    """The held-out evaluations of a run that is evaluated while it learns (``eval.at``), else its validation points."""
    prefix = "eval" if run.evaluates else "validation"
    found = [place for row in _placed(run) if (place := _value(row, f"{prefix}/{key}")) is not None]
    if found:
        columns = np.array(sorted(found, key=lambda point: point[1:]), dtype=np.float64).T
        return Points(columns[0], dict(zip(AXES, columns[1:], strict=True)))
    return Points(np.empty(0), {axis: np.empty(0) for axis in AXES})


def _placed(run: Run) -> list[tuple[Row, float, float, float]]:
    """Rows with gradient steps, env steps and seconds since the first row."""
    online = run.counts_env_steps
    steps = [float(row["step"]) for row in run.rows if any(name.startswith(CLONING) for name in row)]
    cloned = max([0.0, *steps, float(run.summary.get(f"{CLONING}updates", 0))])  # records lack some of these rows
    updates, placed = 0.0, []
    for row in run.rows:
        step, seconds = float(row["step"]), row["wall_time"] - run.rows[0]["wall_time"]
        if not online or any(name.startswith((BEFORE, CLONING)) for name in row):
            placed.append((row, step, 0.0, seconds))
        else:
            updates = max([updates, *(float(row[name] or 0) for name in UPDATES if name in row)])
            placed.append((row, cloned + updates, step, seconds))
    return placed


def _value(placed: tuple[Row, float, float, float], key: str) -> tuple[float, ...] | None:
    row, *places = placed
    value = row.get(key, row.get(CLONING + key))
    return None if value is None else (float(value), *places)


def without_curve(group: TaskGroup, curves: Mapping[str, Sequence[Curve]]) -> list[str]:
    """Which methods have no learning curve, and why."""
    shown = {curve.label for several in curves.values() for curve in several}
    left_out = [method.label for method in group.methods if method.label not in shown]
    if not left_out or not group.tasks:
        return []
    return [
        f"No learning curve of {', '.join(left_out)}: some of their runs have fewer than two evaluations while "
        "learning (eval.every, or budgets of a study), or no steps in common."
    ]


def curves_of(group: TaskGroup, resampling: Resampling) -> dict[str, list[Curve]]:
    """By axis, the curves of all methods that have at least two points there."""
    short = Resampling(min(REPLICATES, resampling.replicates), resampling.confidence, resampling.seed)
    points = {
        method.label: [[points_of(run, group.key) for run in method.runs[task]] for task in group.tasks]
        for method in group.methods
    }
    found: dict[str, list[Curve]] = {axis: [] for axis in AXES}
    for axis, curves in found.items():
        for method in group.methods:
            curve = _curve(method, points[method.label], axis, short)
            if curve is not None:
                curves.append(curve)
    return {axis: curves for axis, curves in found.items() if curves}


def _curve(method: Method, points: Sequence[Sequence[Points]], axis: str, resampling: Resampling) -> Curve | None:
    known = [[run for run in task if len(run.values) > 1] for task in points]
    if not known or not all(known):
        return None
    places = _grid([run.places[axis] for task in known for run in task])
    if len(places) < 2:
        return None
    strata = [np.stack([np.interp(places, run.places[axis], run.values) for run in task]) for task in known]
    at_each = [resampling(stats.interquartile_mean, [runs[:, k] for runs in strata]) for k in range(len(places))]
    value, low, high = (np.array([float(getattr(e, name)) for e in at_each]) for name in ("value", "low", "high"))
    return Curve(method.label, places, stats.Estimate(value, low, high))


def _grid(places: Sequence[Floats]) -> Floats:
    """The places of all runs where these are the same, or some that all runs cover."""
    first = places[0]
    same = all(len(p) == len(first) and np.array_equal(p, first) for p in places)
    if same and len(first) <= 2 * GRID:
        return np.unique(first)
    begin, end = max(p.min() for p in places), min(p.max() for p in places)
    return np.linspace(begin, end, GRID) if end > begin else np.empty(0)
