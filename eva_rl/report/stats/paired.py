"""Tests of a difference between two methods that met the same seeds and the same goals.

Episodes are no independent observations: all those of a run share its training, and all runs meet the same goals. A
test that counts each episode for itself finds differences where there are none. Here the unit is a run, or a goal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

EXACT_PAIRS = 14
"""Up to so many pairs all 2^n signs are tried; beyond, some are drawn."""
DRAWS = 20_000
TOLERANCE = 1e-12
"""Of the largest difference: sums that should be equal differ by rounding, more so where returns are large."""


def sign_flip_test(differences: ArrayLike, seed: int = 0, draws: int = DRAWS) -> float:
    """Paired permutation test: how often would swapping methods within pairs, by chance, give such a mean?

    Exact for up to 14 pairs that differ; beyond, ``draws`` random swaps, the observed one counted among them.

    Args:
        differences: First minus second, one a pair, (n,). Pairs have to be independent of each other.
        seed: Of the random swaps.
        draws: Random swaps.

    Returns:
        Two-sided p value; 1 where nothing differs. With n pairs it is never below 2 / 2^n.

    Raises:
        ValueError: A difference is not finite.
    """
    pairs = np.asarray(differences, np.float64)
    if not np.isfinite(pairs).all():
        raise ValueError("A difference is not finite: every pair needs two finite scores.")
    pairs = pairs[pairs != 0]  # swapping these changes nothing
    if pairs.size == 0:
        return 1.0
    pairs = pairs / abs(pairs).max()
    observed = abs(pairs.sum()) - TOLERANCE
    if pairs.size <= EXACT_PAIRS:
        return float(np.mean(abs(_all_signs(pairs.size) @ pairs) >= observed))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, pairs.size))
    return float((1 + np.sum(abs(signs @ pairs) >= observed)) / (draws + 1))


def stratified_sign_flip_test(differences: Sequence[NDArray[np.float64]]) -> float:
    """:func:`sign_flip_test` of the mean over tasks of the mean difference, whatever the number of pairs of each task.

    Args:
        differences: For each task, first minus second, (pairs,).
    """
    return sign_flip_test(np.concatenate([task / max(1, len(task)) for task in differences]))


def _all_signs(size: int) -> NDArray[np.float64]:
    flipped = (np.arange(2**size)[:, None] >> np.arange(size)) & 1
    return 1.0 - 2.0 * flipped.astype(np.float64)


def mcnemar_test(first: ArrayLike, second: ArrayLike) -> float:
    """Exact McNemar test of two policies on the same goals.

    Args:
        first: Whether the first solved each goal, (n,).
        second: The same goals in the same order, (n,).

    Returns:
        Two-sided p value; it counts the goals that one alone solved, and is 1 where there are none.

    Raises:
        ValueError: The lengths differ.
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    if a.shape != b.shape:
        raise ValueError(f"{a.shape} and {b.shape}: expected the same goals.")
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    fewer, differing = min(only_first, only_second), only_first + only_second
    return min(1.0, 2 * float(binom.cdf(fewer, differing, 0.5))) if differing else 1.0


def holm(p_values: Sequence[float], groups: Sequence[int] | None = None) -> list[float]:
    """P values corrected for their number (Holm 1979): the chance of any false finding stays below the level.

    Args:
        p_values: One for each hypothesis.
        groups: Hypotheses of one group exclude each other, so that at most one of each group is true: then each p value
            is multiplied by the number of groups with hypotheses left, not of hypotheses (Shaffer 1986, procedure S2).
            None takes each hypothesis for a group.
    """
    order = np.argsort(p_values, kind="stable")
    own = np.arange(len(order)) if groups is None else np.asarray(groups)
    weights = np.array([len(set(own[order[rank:]])) for rank in range(len(order))])
    corrected = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values, np.float64)[order] * weights))
    result = np.empty(len(order))
    result[order] = corrected
    return [float(p) for p in result]
