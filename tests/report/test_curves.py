"""Points and curves of runs by hand: two axes, runs of different grids, runs without points."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import trim_mean

from eva_rl.report.curves import GRID, curves_of, points_of, without_curve
from eva_rl.report.methods import group_tasks
from eva_rl.report.reading import Row
from eva_rl.report.runs import Run
from tests.report.making_groups import QUICK, make_run

KEY = "success_rate"


def rows(points: dict[int, float], prefix: str = "validation", begin: float = 1e9) -> list[Row]:
    first: Row = {"step": 0.0, "wall_time": begin, "eva/rows": 5.0}
    return [first, *({"step": s, "wall_time": begin + s / 10, f"{prefix}/{KEY}": v} for s, v in points.items())]


def curved(method: str, seed: int, points: dict[int, float], task: str = "t", prefix: str = "validation") -> Run:
    return make_run(method, task, seed, 0.5, rows=rows(points, prefix))


@pytest.mark.parametrize("recorded", [[], rows({}), rows({50: 0.5}), rows({50: 0.5, 60: 0.6})])
def test_runs_without_points(recorded: list[Row]) -> None:
    run = make_run("a", "t", 0, 0.5, rows=recorded)
    assert len(points_of(run, KEY).values) == max(0, len(recorded) - 1)
    (group,) = group_tasks([run])
    found = curves_of(group, QUICK)
    assert set(found) == ({"gradient_steps", "seconds"} if len(recorded) > 2 else set())
    assert [text.startswith("No learning curve of a:") for text in without_curve(group, found)] == [True] * (not found)


def test_a_curve_is_the_interquartile_mean_at_each_place() -> None:
    scores = np.random.default_rng(0).uniform(size=(2, 4, 3))  # task, seed, place
    runs = [
        curved("a", seed, dict(zip((10, 20, 40), own, strict=True)), f"t{task}")
        for task, several in enumerate(scores)
        for seed, own in enumerate(several)
    ]
    (group,) = group_tasks(runs)
    found = curves_of(group, QUICK)
    (curve,) = found["gradient_steps"]
    assert curve.places.tolist() == [10, 20, 40]
    np.testing.assert_allclose(curve.estimate.value, trim_mean(scores.reshape(8, 3), 0.25))
    assert np.all(curve.estimate.low <= curve.estimate.value)
    assert np.all(curve.estimate.value <= curve.estimate.high)
    assert "env_steps" not in found, "cloning takes none"


def test_runs_of_different_grids_are_drawn_where_all_have_points() -> None:
    straight = [curved("a", k, {s: s / 100 for s in steps}) for k, steps in enumerate([(0, 30, 90), (10, 100)])]
    (group,) = group_tasks(straight)
    (curve,) = curves_of(group, QUICK)["gradient_steps"]
    assert (len(curve.places), curve.places[0], curve.places[-1]) == (GRID, 10, 90)
    np.testing.assert_allclose(curve.estimate.value, curve.places / 100)
    (apart,) = group_tasks([curved("a", 0, {0: 0.1, 10: 0.2}), curved("a", 1, {20: 0.1, 30: 0.2})])
    assert "gradient_steps" not in curves_of(apart, QUICK)


def test_one_run_without_points_hides_no_other() -> None:
    full = [curved("a", seed, {10: 0.2, 20: 0.4}) for seed in (0, 1)]
    bare = [replace(run, rows=(), method="b") for run in full]
    (group,) = group_tasks([*full, replace(full[0], seed=2, rows=()), *bare])
    found = curves_of(group, QUICK)
    assert [curve.label for curve in found["gradient_steps"]] == ["a"]
    (text,) = without_curve(group, found)
    assert text.startswith("No learning curve of b:")


def test_the_scores_before_and_after_alone_are_no_curve() -> None:
    """Nor is the score between cloning and learning online, which was taken for a curve of three points."""
    run = curved("a", 0, dict.fromkeys((0, 50, 100), 0.5), prefix="eval")
    assert len(points_of(run, KEY).values) == 0
    assert points_of(replace(run, evaluates=True), KEY).places["gradient_steps"].tolist() == [0, 50, 100]
