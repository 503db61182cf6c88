"""Aggregates against rliable's and against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from rliable import metrics as rliable

from eva_rl.report import stats
from eva_rl.report.stats.aggregates import Floats, Strata


def strata(matrix: Floats) -> Strata:
    """Columns of a (runs, tasks) matrix."""
    return list(matrix.T)


MATRICES = [np.random.default_rng(seed).normal(0.5, 0.4, shape) for seed, shape in enumerate([(5, 10), (3, 1), (7, 3)])]
MATRICES.append(np.random.default_rng(9).integers(0, 4, (6, 5)) / 3)  # with many ties


@pytest.mark.parametrize("matrix", MATRICES, ids=lambda m: str(m.shape))
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (stats.interquartile_mean, rliable.aggregate_iqm),
        (stats.mean, rliable.aggregate_mean),
        (stats.median, rliable.aggregate_median),
    ],
    ids=["iqm", "mean", "median"],
)
def test_aggregates_are_rliables(matrix: Floats, ours, theirs) -> None:  # type: ignore[no-untyped-def]
    assert float(ours(strata(matrix))) == pytest.approx(theirs(matrix), rel=1e-12)


def test_the_wrong_variants_are_others() -> None:
    """The interquartile mean of task means, and the median of all runs, are other numbers."""
    matrix = MATRICES[0]
    means = matrix.mean(axis=0)
    assert float(stats.interquartile_mean([means])) != pytest.approx(rliable.aggregate_iqm(matrix), rel=1e-3)
    assert float(np.median(matrix)) != pytest.approx(rliable.aggregate_median(matrix), rel=1e-3)


def test_interquartile_mean_by_hand() -> None:
    assert float(stats.interquartile_mean([np.array([0.0, 1, 2, 3]), np.array([4.0, 5, 6, 100])])) == 3.5
    unequal = [np.array([0.0, 1, 2]), np.array([9.0])]
    assert float(stats.interquartile_mean(unequal)) == 1.5


@pytest.mark.parametrize("matrix", MATRICES, ids=lambda m: str(m.shape))
def test_probability_of_improvement_is_rliables(matrix: Floats) -> None:
    other = np.roll(matrix[:-1], 1, axis=0) + 1 / 3
    expected = rliable.probability_of_improvement(matrix, other)
    assert float(stats.probability_of_improvement(strata(matrix), strata(other))) == pytest.approx(expected, rel=1e-12)
    assert float(stats.probability_of_improvement(strata(matrix), strata(matrix))) == pytest.approx(0.5)


def test_ties_count_one_half() -> None:
    first, second = [np.array([1.0, 1.0])], [np.array([1.0, 0.0])]
    assert float(stats.probability_of_improvement(first, second)) == 0.75
    assert np.mean(first[0][:, None] > second[0]) == 0.5  # without ties


def test_leading_axes_are_resamples() -> None:
    matrix = np.random.default_rng(0).normal(size=(4, 5, 3))  # resamples, runs, tasks
    resampled = [matrix[..., task] for task in range(3)]
    for statistic in (stats.interquartile_mean, stats.mean, stats.median):
        alone = [float(statistic(strata(one))) for one in matrix]
        assert statistic(resampled) == pytest.approx(alone)


def test_profile_by_hand() -> None:
    scores = [np.array([0.0, 0.5, 1.0, 1.0]), np.array([0.5, 1.0])]
    profile = stats.performance_profile(scores, np.array([-1, 0.25, 0.5, 1.0]))
    assert profile == pytest.approx([1, (0.75 + 1) / 2, (0.5 + 0.5) / 2, 0])


def test_the_area_under_a_profile_is_the_mean() -> None:
    """Agarwal et al., section 4.2: for scores within [0, 1]."""
    scores = strata(np.random.default_rng(3).uniform(size=(5, 4)))
    thresholds = np.linspace(0, 1, 20_001)
    profile = stats.performance_profile(scores, thresholds)
    assert np.trapezoid(profile, thresholds) == pytest.approx(float(stats.mean(scores)), abs=1e-4)
