"""How many components each layer gets out of a common budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Score = Literal["ratio", "paper"]


def scores(eigenvalues: NDArray[np.float64], total: float, rows: float, score: Score) -> NDArray[np.float64]:
    """Rank the components of one layer on a scale that all layers share.

    Args:
        eigenvalues: (K,) squared singular values sigma^2 of the rows.
        total: Sum of all D of them.
        rows: M, number of rows.
        score: "ratio" is sigma^2 / total, which the authors' code and PEFT use; "paper" is
            sigma^2 / ((M - 1) ||sigma||_1) over the K computed components (arXiv 2410.07170, section 3.3).
    """
    if total <= 0:
        return np.zeros_like(eigenvalues)
    if score == "ratio":
        return eigenvalues / total
    return np.asarray(eigenvalues / (max(rows - 1, 1) * np.sqrt(eigenvalues).sum()))


def usable(eigenvalues: NDArray[np.float64], total: float, noise: float) -> int:
    """How many leading components the data supports at all: those above the variance of rounding noise."""
    return int((eigenvalues > noise).sum()) if total > 0 else 0


def distribute(candidates: Mapping[str, Sequence[float]], budget: int) -> dict[str, int]:
    """Give the `budget` best of all components to their layers.

    Each layer stands with its own candidates, also where layers share an input, as in the authors' code.
    With no more candidates than budget every layer keeps all of its own.

    Args:
        candidates: Per layer, scores in descending order.
        budget: Number of components to hand out.

    Returns:
        Per layer, how many of its leading components were chosen; 0 is possible.
    """
    names = [name for name, values in candidates.items() for _ in values]
    flat = np.array([value for values in candidates.values() for value in values])
    ranks = dict.fromkeys(candidates, 0)
    for index in np.argsort(-flat, kind="stable")[:budget]:
        ranks[names[index]] += 1
    return ranks
