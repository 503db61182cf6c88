"""Paired tests against enumeration, scipy and simulation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest, permutation_test
from statsmodels.stats.multitest import multipletests

from eva_rl.report import stats


def test_sign_flips_by_hand() -> None:
    """1, 2, 3: of the 8 signs two give a sum as far from 0 as 6."""
    assert stats.sign_flip_test([1.0, 2.0, 3.0]) == 2 / 8
    assert stats.sign_flip_test([1.0, 2.0, -3.0]) == 1.0
    assert stats.sign_flip_test([0.0, 0.0]) == 1.0
    assert stats.sign_flip_test([-0.2] * 5) == 2 / 32


def test_sign_flips_equal_enumeration_and_scipy() -> None:
    differences = np.random.default_rng(0).normal(0.4, 1, 9)
    sums = [abs(np.dot(signs, differences)) for signs in product([-1, 1], repeat=9)]
    found = stats.sign_flip_test(differences)
    assert found == np.mean([s >= abs(differences.sum()) - 1e-12 for s in sums])
    theirs = permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=10_000)
    assert found == pytest.approx(theirs.pvalue)


def test_many_pairs_are_sampled() -> None:
    differences = np.random.default_rng(1).normal(0.35, 1, 40)
    theirs = permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=20_000, rng=0)
    assert stats.sign_flip_test(differences) == pytest.approx(theirs.pvalue, abs=0.01)
    assert stats.sign_flip_test(differences, seed=4) == stats.sign_flip_test(differences, seed=4)
    assert stats.sign_flip_test(np.full(40, 0.1)) == 1 / 20_001  # never 0


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e5, 1e12])
def test_the_p_value_has_no_unit(scale: float, seed: int) -> None:
    """Rounding of large sums once lost the observed signs themselves: a p value of 0. Small ones were all alike: 1."""
    rng = np.random.default_rng(seed)
    differences = rng.normal(0.4, 1, 10)
    assert stats.sign_flip_test(scale * differences) == stats.sign_flip_test(differences)
    assert stats.sign_flip_test(scale * abs(differences)) == 2 / 2**10
    assert stats.sign_flip_test(scale * -differences) == stats.sign_flip_test(differences)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_difference_that_is_not_finite_is_no_finding(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        stats.sign_flip_test([1.0, bad, 2.0])


def test_tasks_weigh_the_same_whatever_their_number_of_seeds() -> None:
    """The statistic is the mean over tasks; a task with many seeds once decided alone."""
    many, few = np.array([0.2, 0.1, 0.3, 0.2]), np.array([-0.5, -0.3])
    means = [
        np.dot(signs[:4], many) / 4 + np.dot(signs[4:], few) / 2 for signs in product([-1, 1], repeat=6)
    ]  # of all 64 ways to swap
    observed = abs(many.mean() + few.mean())
    expected = np.mean([abs(m) >= observed - 1e-12 for m in means])
    assert stats.stratified_sign_flip_test([many, few]) == expected
    assert stats.sign_flip_test(np.concatenate([many, few])) != expected, "the pooled sum is another statistic"
    assert stats.stratified_sign_flip_test([many, few, np.array([])]) == expected
    balanced = [many[:2], few]
    assert stats.stratified_sign_flip_test(balanced) == stats.sign_flip_test(np.concatenate(balanced))


@pytest.mark.parametrize("seed", range(3))
def test_holm_is_a_step_down_of_statsmodels(seed: int) -> None:
    """With ties, zeros and ones."""
    rng = np.random.default_rng(seed)
    p = np.round(rng.uniform(0, 0.2, rng.integers(1, 9)), 2)
    p[rng.integers(len(p))] = rng.choice([0.0, 1.0])
    assert stats.holm(list(p)) == pytest.approx(list(multipletests(p, method="holm")[1]))


def test_mcnemar() -> None:
    first = [True] * 8 + [False] * 1 + [True] * 20
    second = [False] * 8 + [True] * 1 + [True] * 20
    assert stats.mcnemar_test(first, second) == pytest.approx(binomtest(1, 9).pvalue)
    assert stats.mcnemar_test(first, first) == 1.0
    with pytest.raises(ValueError, match="the same goals"):
        stats.mcnemar_test(first, second[:-1])


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []


def null_rejections(unit: str, repetitions: int = 300) -> float:
    """How often a difference is found between two equal methods: 2 tasks, 6 seeds whose trainings vary, 30 goals."""
    rng = np.random.default_rng(5)
    found = 0
    for _ in range(repetitions):
        skill = rng.normal(0, 1, (2, 2, 6, 1))  # method, task, seed, goal
        ease = rng.normal(0, 1, (1, 2, 1, 30))
        solved = rng.uniform(size=(2, 2, 6, 30)) < 1 / (1 + np.exp(-skill - ease))
        differences = solved[0].astype(float) - solved[1]  # (task, seed, goal)
        pairs = differences.mean(axis=-1) if unit == "run" else differences
        found += stats.sign_flip_test(pairs.ravel(), draws=500) < 0.05
    return found / repetitions


@pytest.mark.slow
def test_runs_are_the_unit() -> None:
    """Equal methods are told apart in 5% of all studies; counting episodes for themselves does so far more often."""
    assert null_rejections("run") < 0.08
    assert null_rejections("episode") > 0.2
