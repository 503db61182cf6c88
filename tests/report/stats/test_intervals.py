"""Intervals: what is resampled, and how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest

from eva_rl.report import stats
from eva_rl.report.stats.aggregates import Floats, Strata
from eva_rl.report.stats.intervals import tail_probability


def columns(matrix: Floats) -> Strata:
    return list(matrix.T)


def test_equal_seeds_give_equal_intervals() -> None:
    scores = columns(np.random.default_rng(0).uniform(size=(5, 4)))
    first = stats.bootstrap(stats.interquartile_mean, scores, seed=1)
    again = stats.bootstrap(stats.interquartile_mean, scores, seed=1)
    other = stats.bootstrap(stats.interquartile_mean, scores, seed=2)
    assert (first.low, first.high) == (again.low, again.high)
    assert (first.low, first.high) != (other.low, other.high)
    assert first.value == other.value


def test_plain_percentiles_equal_a_loop() -> None:
    """The same draws, one resample at a time."""
    scores = [np.array([0.1, 0.5, 0.4]), np.array([0.9, 0.2, 0.3, 0.8])]
    found = stats.bootstrap(stats.mean, scores, seed=3, replicates=200, widened=False)
    rng = np.random.default_rng(3)
    rows = [[rng.integers(len(runs)) for _ in range(200 * len(runs))] for runs in scores]

    def resample(k: int) -> float:
        parts = [row[k * len(runs) : (k + 1) * len(runs)] for runs, row in zip(scores, rows, strict=True)]
        return float(np.mean([np.mean(runs[part]) for runs, part in zip(scores, parts, strict=True)]))

    drawn = [resample(k) for k in range(200)]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))


def test_tasks_are_never_resampled() -> None:
    """Tasks of different difficulty, every run alike: nothing varies, however much tasks do."""
    scores = [np.full(3, level) for level in (0.1, 0.5, 0.9)]
    found = stats.bootstrap(stats.mean, scores)
    assert found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(0.5)
    pooled = stats.bootstrap(stats.mean, [np.concatenate(scores)])  # the wrong variant
    assert pooled.high - pooled.low > 0.3


def test_one_run_has_no_interval() -> None:
    found = stats.bootstrap(stats.mean, [np.array([0.3]), np.array([0.1, 0.2])])
    assert found.value == pytest.approx(0.225)
    assert np.isnan([found.low, found.high]).all()
    with pytest.raises(ValueError, match="at least one run"):
        stats.bootstrap(stats.mean, [np.array([])])


def test_the_tail_by_hand() -> None:
    """10 runs: Student's t with 9 degrees of freedom, 2.262, times sqrt(10 / 9)."""
    from statistics import NormalDist

    assert tail_probability([10], 0.95) == pytest.approx(NormalDist().cdf(-2.26216 * (10 / 9) ** 0.5), rel=1e-4)
    assert tail_probability([10_000], 0.95) == pytest.approx(0.025, abs=1e-4)


def test_two_methods_are_resampled_each_on_their_own() -> None:
    rng = np.random.default_rng(0)
    better, worse = rng.normal(1, 0.5, (8, 2)), rng.normal(0, 0.5, (5, 2))
    found = stats.bootstrap(stats.probability_of_improvement, columns(better), columns(worse))
    assert 0.5 < found.low <= found.value <= found.high <= 1
    turned = stats.bootstrap(stats.probability_of_improvement, columns(worse), columns(better))
    assert turned.value == pytest.approx(1 - found.value)


def coverage(runs: int, tasks: int, repetitions: int = 400, **how: bool) -> float:
    """Share of intervals of the interquartile mean that hold its expectation, for success rates over 50 goals."""
    rng = np.random.default_rng(runs)
    levels = rng.uniform(0.3, 0.9, tasks)

    def draw(*shape: int) -> Floats:
        return rng.binomial(50, np.clip(rng.normal(levels, 0.08, (*shape, tasks)), 0, 1)) / 50

    truth = float(np.mean([stats.interquartile_mean(columns(draw(runs))) for _ in range(10_000)]))
    held = 0
    for repetition in range(repetitions):
        found = stats.bootstrap(stats.interquartile_mean, columns(draw(runs)), seed=repetition, replicates=800, **how)
        held += bool(found.low - 1e-12 <= truth <= found.high + 1e-12)
    return held / repetitions


@pytest.mark.slow
@pytest.mark.parametrize(("runs", "tasks"), [(5, 1), (5, 3), (3, 10), (5, 10), (10, 10)])
def test_intervals_hold_the_truth_as_often_as_they_say(runs: int, tasks: int) -> None:
    assert 0.9 <= coverage(runs, tasks) <= 0.99


@pytest.mark.slow
def test_plain_percentiles_hold_it_too_rarely() -> None:
    """What the widening is for: three seeds, ten tasks."""
    assert coverage(3, 10, widened=False) < 0.9
