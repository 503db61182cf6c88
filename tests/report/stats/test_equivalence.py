"""Paired means and equivalence against scipy and statsmodels; the detectable difference by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from eva_rl.report.stats import holm, sign_flip_test
from eva_rl.report.stats.equivalence import equivalence_power, paired_mean, smallest_difference

RNG = np.random.default_rng


def test_one_task_is_scipys_paired_t_test() -> None:
    a, b = RNG(0).normal(0.5, 0.1, (2, 7))
    found = paired_mean([a - b])
    assert found is not None
    expected = scipy.ttest_rel(a, b)
    assert found.mean / found.error == pytest.approx(expected.statistic)
    assert found.degrees == pytest.approx(6)
    assert found.interval() == pytest.approx(tuple(expected.confidence_interval()))
    for margin in (0.02, 0.1, 0.3):
        assert found.equivalence_p(margin) == pytest.approx(ttost_paired(a, b, -margin, margin)[0])


def test_several_tasks_weigh_equally_and_only_seeds_vary() -> None:
    """Two tasks with opposite effects: the difference between tasks is no uncertainty about these tasks."""
    first, second = RNG(1).normal(0.3, 0.05, 6), RNG(2).normal(-0.3, 0.1, 4)
    found = paired_mean([first, second])
    assert found is not None
    parts = np.array([first.var(ddof=1) / 6, second.var(ddof=1) / 4])
    assert found.mean == pytest.approx((first.mean() + second.mean()) / 2)
    assert found.error == pytest.approx(np.sqrt(parts.sum()) / 2)
    welch = scipy.ttest_ind(first, -second, equal_var=False)  # the same variance and degrees of freedom
    assert found.degrees == pytest.approx(welch.df)
    pooled = scipy.sem(np.concatenate([first, second]))
    assert found.error < pooled / 2


def test_equal_scores_are_no_certainty() -> None:
    assert paired_mean([np.zeros(3)]) is None
    assert paired_mean([np.zeros(1)], 0.02) is None
    found = paired_mean([np.zeros(3)], 0.02)
    assert found is not None
    assert found.interval()[1] > 0.02
    assert found.equivalence_p(0.05) < 0.05 < found.equivalence_p(0.02)


def test_holm_is_that_of_statsmodels_and_groups_are_less_strict() -> None:
    p = RNG(3).uniform(0, 0.1, 8)
    assert holm(list(p)) == pytest.approx(list(multipletests(p, method="holm")[1]))
    assert holm(list(p), list(range(8))) == holm(list(p))
    grouped = holm(list(p), [0, 0, 1, 1, 2, 2, 3, 3])
    assert max(np.array(grouped) - np.array(holm(list(p)))) <= 0
    assert min(grouped) == pytest.approx(4 * p.min())  # four groups, at most one true hypothesis in each


def test_sign_flips_are_scipys_permutations() -> None:
    d = RNG(4).normal(0.3, 0.5, 9)
    expected = scipy.permutation_test((d,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_test(d) == pytest.approx(expected.pvalue)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng, held = RNG(5), 0
    for _ in range(1500):
        found = paired_mean([rng.normal(0.1, 0.1, 4), rng.normal(-0.2, 0.3, 5), rng.normal(0.4, 0.2, 3)])
        assert found is not None
        low, high = found.interval()
        held += low <= 0.1 <= high
    assert 0.93 <= held / 1500 <= 0.975


@pytest.mark.slow
@pytest.mark.parametrize(("tasks", "seeds"), [(1, 10), (2, 6), (4, 3)])
def test_the_smallest_difference_is_found_in_four_of_five_studies(tasks: int, seeds: int) -> None:
    spread, rng = 0.25, RNG(6)
    effect = smallest_difference(spread, tasks, seeds)
    found = [
        scipy.ttest_1samp(rng.normal(effect, spread, tasks * seeds), 0).pvalue < 0.05 for _ in range(1000)
    ]  # as if all pairs were of one task: about the same power
    assert 0.75 <= np.mean(found) <= 0.87


def test_few_pairs_can_find_nothing() -> None:
    assert smallest_difference(0.2, 1, 5) == np.inf
    assert smallest_difference(0.2, 1, 6) < np.inf
    assert smallest_difference(0.2, 1, 6, comparisons=3) == np.inf
    assert smallest_difference(0.2, 1, 20) < smallest_difference(0.2, 1, 10)


@pytest.mark.slow
@pytest.mark.parametrize(("tasks", "seeds", "margin"), [(1, 10, 0.25), (2, 8, 0.2), (4, 10, 0.1), (4, 3, 0.1)])
def test_equal_methods_are_found_equivalent_as_often_as_is_said(tasks: int, seeds: int, margin: float) -> None:
    spread, rng, found = 0.25, RNG(7), 0
    for _ in range(2000):
        mean = paired_mean([rng.normal(0, spread, seeds) for _ in range(tasks)])
        assert mean is not None
        found += mean.equivalence_p(margin) < 0.05
    assert equivalence_power(spread, margin, tasks, seeds) == pytest.approx(found / 2000, abs=0.06)


def test_equivalence_takes_seeds_and_a_margin() -> None:
    assert equivalence_power(0.2, 0.03, 4, 5) == 0
    assert equivalence_power(0.2, 0.03, 4, 400) > 0.99
    assert equivalence_power(0.1, 0.1, 4, 10, comparisons=6) < equivalence_power(0.1, 0.1, 4, 10)
    assert np.isnan(equivalence_power(0.2, 0.1, 1, 1))
    assert np.isnan(equivalence_power(np.nan, 0.1, 4, 10))
