"""Confidence intervals by a bootstrap that resamples the runs of each task, never the tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from eva_rl.report.stats.aggregates import Floats, Strata

REPLICATES = 2_000
CONFIDENCE = 0.95
LEAST_DEGREES = 2
"""Two runs of one task say nothing reliable of how runs vary: equal scores would give an interval of no width."""


@dataclass(frozen=True)
class Estimate:
    """A statistic with its confidence interval.

    Attributes:
        value: Of the scores as they are, a number or (K,).
        low: Lower end; NaN where some task has a single run, or one task two, which says too little of how runs vary.
        high: Upper end.
    """

    value: Any
    low: Any
    high: Any


def bootstrap(
    statistic: Callable[..., Floats],
    *groups: Strata,
    seed: int = 0,
    replicates: int = REPLICATES,
    confidence: float = CONFIDENCE,
    widened: bool = True,
) -> Estimate:
    """Stratified percentile bootstrap: equal seeds give equal intervals.

    Runs are drawn with replacement within each task and each group on its own. With n runs a task the bootstrap sees
    only (n - 1) / n of their variance, so that plain percentile intervals are too narrow for the few seeds that one
    has; ``widened`` moves the percentiles outwards by that factor and by Student's t (Hesterberg 2015, "What Teachers
    Should Know About the Bootstrap", arXiv 1411.5279, section 5.3).

    Args:
        statistic: Takes as many strata as there are groups, with a leading axis of resamples or none.
        groups: For each method, its strata: for each task, (runs,).
        seed: Of the resampling.
        replicates: Resamples.
        confidence: Share of intervals that should hold the truth.
        widened: False gives the plain percentiles.

    Raises:
        ValueError: Some task has no run, or there are no tasks.
    """
    sizes = [len(runs) for strata in groups for runs in strata]
    if not sizes or min(sizes) == 0:
        raise ValueError("Every group needs at least one task, and every task at least one run.")
    value = statistic(*groups)
    if min(sizes) == 1 or sum(sizes) - len(sizes) < LEAST_DEGREES * len(groups):
        unknown = np.full(np.shape(value), np.nan)
        return Estimate(value, unknown, unknown)
    rng = np.random.default_rng(seed)
    drawn = statistic(*[_resampled(strata, rng, replicates) for strata in groups])  # (replicates, ...)
    tail = tail_probability(sizes, confidence) if widened else (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    return Estimate(value, low, high)


def tail_probability(sizes: list[int], confidence: float) -> float:
    """Probability to leave out on each side, so that the interval holds the truth as often as it says.

    Args:
        sizes: Runs of each stratum, all above 1.
        confidence: Share of intervals that should hold the truth.
    """
    runs, degrees = np.mean(sizes), sum(sizes) - len(sizes)
    return float(norm.cdf(np.sqrt(runs / (runs - 1)) * t.ppf((1 - confidence) / 2, degrees)))


def _resampled(strata: Strata, rng: np.random.Generator, replicates: int) -> list[Floats]:
    return [runs[_indices(rng, len(runs), replicates)] for runs in map(np.asarray, strata)]


def _indices(rng: np.random.Generator, size: int, replicates: int) -> NDArray[np.int64]:
    return rng.integers(size, size=(replicates, size))
