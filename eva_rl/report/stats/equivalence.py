"""Means of paired differences over fixed tasks: intervals, equivalence, and the difference that a design can detect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import nct, t

from eva_rl.report.stats.aggregates import Floats

POWER = 0.8


@dataclass(frozen=True)
class PairedMean:
    """The mean over tasks of the mean paired difference.

    Attributes:
        mean: The estimate.
        error: Its standard error, from the spread of seeds within tasks.
        degrees: Degrees of freedom (Satterthwaite 1946).
    """

    mean: float
    error: float
    degrees: float

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Student's interval; with one task that of ``scipy.stats.ttest_rel``."""
        half = float(t.ppf((1 + confidence) / 2, self.degrees)) * self.error
        return self.mean - half, self.mean + half

    def equivalence_p(self, margin: float) -> float:
        """P value of two one-sided tests (Schuirmann 1987): is the mean within the margin of zero, on both sides?"""
        above = t.sf((self.mean + margin) / self.error, self.degrees)
        below = t.cdf((self.mean - margin) / self.error, self.degrees)
        return float(max(above, below))


def paired_mean(differences: Sequence[Floats], resolution: float = 0.0) -> PairedMean | None:
    """The mean over tasks, with equal weights; tasks are fixed, seeds are the sample.

    Args:
        differences: For each task, first minus second for each seed, (seeds,).
        resolution: Smallest standard deviation to assume, so that equal scores of few seeds do not pass for certainty;
            1 / episodes for a success rate.

    Returns:
        None where some task has fewer than two pairs, or nothing varies and there is no resolution.
    """
    if not differences or min(map(len, differences)) < 2:
        return None
    counts = np.array([len(task) for task in differences])
    variances = np.array([max(float(np.var(task, ddof=1)), resolution**2) for task in differences]) / counts
    total = float(variances.sum())
    if total == 0:
        return None
    degrees = total**2 / float((variances**2 / (counts - 1)).sum())
    mean = float(np.mean([task.mean() for task in differences]))
    return PairedMean(mean, float(np.sqrt(total)) / len(differences), degrees)


def smallest_difference(spread: float, tasks: int, seeds: int, comparisons: int = 1, level: float = 0.05) -> float:
    """The difference that a paired t test finds with probability 0.8.

    Args:
        spread: Standard deviation of the paired difference between two runs of one task and seed.
        tasks: Tasks.
        seeds: Seeds of each.
        comparisons: Pairs of methods that are tested; the level is divided by them, Holm's first step.
        level: Of the family of tests.

    Returns:
        In the unit of ``spread``; infinity where so few seeds can find nothing.
    """
    degrees = tasks * (seeds - 1)
    if degrees < 1 or 2 / 2 ** (tasks * seeds) > level / comparisons:
        return float("inf")  # no permutation of so few pairs is rare enough
    critical = float(t.isf(level / comparisons / 2, degrees))

    def lacking(effect: float) -> float:
        return float(nct.sf(critical, degrees, effect)) - POWER

    effect = brentq(lacking, 0.0, critical + 20.0)
    return float(effect) * spread / float(np.sqrt(tasks * seeds))


def equivalence_power(
    spread: float, margin: float, tasks: int, seeds: int, comparisons: int = 1, level: float = 0.05
) -> float:
    """The probability that two one-sided t tests find two equal methods equivalent.

    Args:
        spread: Standard deviation of the paired difference between two runs of one task and seed.
        margin: Of equivalence, in the unit of ``spread``.
        tasks: Tasks.
        seeds: Seeds of each.
        comparisons: Pairs of methods that are tested; the level is divided by them, Holm's first step.
        level: Of the family of tests.

    Returns:
        Between 0 and 1; the standard error counts as known (Chow, Shao and Wang 2008, chapter 3), which errs a little
        where seeds are few. NaN where the spread is not known, or one seed is all.
    """
    degrees = tasks * (seeds - 1)
    if degrees < 1 or not spread > 0:
        return float("nan")
    error = spread / float(np.sqrt(tasks * seeds))
    reach = margin / error - float(t.isf(level / comparisons, degrees))
    return max(0.0, 2 * float(t.cdf(reach, degrees)) - 1)
