"""How far the two halves of the data agree on the leading directions.

Three measures, each averaged over "first half judged by the second" and the reverse:

* subspace agreement: mean squared cosine of the principal angles between the two R-dimensional subspaces. Reported as
  `split_half_agreement`. Honest, but blind to importance: a rotation among directions of equal variance counts in full.
* capture: variance of one half inside the other half's subspace, over the most that any R directions could capture.
  A rotation among tied directions costs nothing, since they capture the same. This is the held-out quality itself, and
  the default criterion for stopping.
* directions: the smallest agreement of any group of nearly tied directions, single vectors where they are separated.
  This is the strict reading of the paper's cossim >= tau, and the criterion "directions".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eva_rl.eva.gram import Gram

# Neighbouring eigenvalues closer than this, relative to the larger, are compared as one subspace.
TIE = 0.1


@dataclass(frozen=True)
class Half:
    """One half's matrices with their leading eigenpairs: values (G, K), vectors (G, D, K)."""

    matrices: Gram
    values: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class Agreement:
    """The three measures, (G,) each; nan where a half has no rows, one where nothing was asked for."""

    subspace: Tensor
    capture: Tensor
    directions: Tensor


def agree(first: Half, second: Half, ranks: Tensor) -> Agreement:
    """Compare two halves on the leading `ranks` (G,) directions of each matrix."""
    wanted = torch.arange(first.values.shape[1], device=ranks.device) < ranks[:, None]
    squared = (first.vectors.mT @ second.vectors).square()
    subspace = (squared * (wanted[:, :, None] & wanted[:, None, :])).sum((-2, -1)) / ranks.clamp(min=1)
    capture = (_capture(first, second, wanted) + _capture(second, first, wanted)) / 2
    directions = torch.stack(
        [
            _weakest(cosines, values, int(rank))
            for cosines, values, rank in zip(
                squared.cpu(), (first.values + second.values).cpu(), ranks.cpu(), strict=True
            )
        ]
    ).to(subspace)
    missing = (first.matrices.rows == 0) | (second.matrices.rows == 0)
    measures = (
        torch.where(ranks == 0, 1.0, torch.where(missing, torch.nan, measure))
        for measure in (subspace, capture, directions)
    )
    return Agreement(*measures)


def _capture(judged: Half, judge: Half, wanted: Tensor) -> Tensor:
    captured = (judge.matrices.captured(judged.vectors) * wanted).sum(-1)
    best = (judge.values * wanted).sum(-1)
    return torch.where(best > 0, captured / best.clamp(min=1e-300), 1.0)


def _weakest(squared: Tensor, values: Tensor, rank: int) -> Tensor:
    """The smallest agreement of a run of nearly tied directions, from (K, K) squared cosines and (K,) eigenvalues.

    A run may reach past `rank`.
    """
    weakest = torch.ones((), dtype=squared.dtype)
    start = 0
    while start < rank:
        stop = start + 1
        while stop < len(values) and values[stop - 1] - values[stop] < TIE * values[stop - 1]:
            stop += 1
        inside = squared[start:stop, start:stop]
        mine = min(stop, rank) - start
        both = torch.stack([inside[:mine].sum() / mine, inside[:, :mine].sum() / mine])
        weakest = torch.minimum(weakest, both.min())
        start = stop
    return weakest
