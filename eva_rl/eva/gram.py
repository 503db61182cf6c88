"""Second moments of stacked layers, exact or as a factor, ready for products and eigenvectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eva_rl.eva.factors import downdate
from eva_rl.eva.sums import Sums

Part = Literal["first", "second", "all"]


@dataclass(frozen=True)
class Gram:
    """Positive semi-definite matrices (G, D, D), dense or as F F^T.

    Args:
        matrix: S itself (G, D, D), or the factor F (G, D, C).
        dense: Which of the two.
        total: (G,) trace of the full matrix, also of what a factor leaves out.
        rows: (G,) rows behind it.
    """

    matrix: Tensor
    dense: bool
    total: Tensor
    rows: Tensor

    @property
    def width(self) -> int:
        """D."""
        return self.matrix.shape[1]

    def apply(self, vectors: Tensor) -> Tensor:
        """S @ vectors, (G, D, K)."""
        return self.matrix @ vectors if self.dense else self.matrix @ (self.matrix.mT @ vectors)

    def captured(self, vectors: Tensor) -> Tensor:
        """v^T S v of each column of vectors (G, D, K), as (G, K)."""
        if self.dense:
            return (vectors * (self.matrix @ vectors)).sum(-2)
        return (self.matrix.mT @ vectors).square().sum(-2)


def gram(sums: Sums, part: Part, center: bool) -> Gram:
    """The second moments, or with `center` the scatter around the mean, of stacked sums.

    Args:
        sums: Stacked raw sums, tensors with leading (G, 2).
        part: One half of the data, or all of it.
        center: Subtract n m m^T, m the mean of the rows.
    """
    dense = sums.method == "moments"
    linear, square, count = (_select(tensor, part) for tensor in (sums.linear, sums.square, sums.count))
    core = _select(sums.core, part) if dense or part != "all" else torch.cat(sums.core.unbind(1), dim=-1)
    if not center:
        return Gram(core, dense, square, count)
    mean = linear / count.clamp(min=1).sqrt()[:, None]  # sqrt(n) m, so that its square is n m m^T
    core = core - mean[:, :, None] * mean[:, None, :] if dense else downdate(core, mean)
    return Gram(core, dense, (square - mean.square().sum(-1)).clamp(min=0), count)


def _select(tensor: Tensor, part: Part) -> Tensor:
    return tensor.sum(1) if part == "all" else tensor[:, 0 if part == "first" else 1]
