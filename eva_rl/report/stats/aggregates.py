"""One number for many tasks and runs.

Scores are *strata*: one array a task, with the runs (seeds) of that task along its last axis. Leading axes, where there
are any, are resamples, and stay as they are.

Source of the choice: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice",
arXiv 2108.13264; the values equal those of its library, rliable.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Strata = Sequence[Floats]


def interquartile_mean(strata: Strata) -> Floats:
    """Mean of the middle half of all runs of all tasks: robust to a few runs gone wrong, and uses more than a median.

    Args:
        strata: For each task, (..., runs).

    Returns:
        (...).
    """
    scores = np.sort(np.concatenate(strata, axis=-1), axis=-1)
    total = scores.shape[-1]
    cut = total // 4
    middle: Floats = scores[..., cut : total - cut].mean(axis=-1)
    return middle


def mean(strata: Strata) -> Floats:
    """Mean over tasks of the mean over runs; strata as in :func:`interquartile_mean`."""
    return np.asarray(_task_means(strata).mean(axis=-1))


def median(strata: Strata) -> Floats:
    """Median over tasks of the mean over runs; strata as in :func:`interquartile_mean`."""
    return np.asarray(np.median(_task_means(strata), axis=-1))


def probability_of_improvement(first: Strata, second: Strata) -> Floats:
    """Chance that a run of the first method beats one of the second on the same task, averaged over tasks.

    Ties count one half (Mann and Whitney's U over the number of pairs).

    Args:
        first: For each task, (..., runs).
        second: The same tasks in the same order, (..., other runs).

    Returns:
        (...).
    """
    shares: Floats = np.mean([_share_won(a, b) for a, b in zip(first, second, strict=True)], axis=0)
    return shares


def _share_won(a: Floats, b: Floats) -> Floats:
    difference = a[..., :, None] - b[..., None, :]
    won: Floats = ((difference > 0) + 0.5 * (difference == 0)).mean(axis=(-1, -2))
    return won


def performance_profile(strata: Strata, thresholds: Floats) -> Floats:
    """Share of runs that score above each threshold, every task counting the same.

    Args:
        strata: For each task, (..., runs).
        thresholds: (K,).

    Returns:
        (..., K).
    """
    shares = [np.mean([(runs > threshold).mean(axis=-1) for runs in strata], axis=0) for threshold in thresholds]
    return np.stack(shares, axis=-1)


def _task_means(strata: Strata) -> Floats:
    return np.stack([runs.mean(axis=-1) for runs in strata], axis=-1)  # (..., tasks)
