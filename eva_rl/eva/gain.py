"""Second moments of layer inputs as operators, and what an adapter's A does to them: gain and effective rank.

With B = 0 the first steps of a low-rank adapter depend on A through M = A S A^T alone, S = E[x x^T] the uncentred
second moment of the layer's input x: the gain tr M = E|A x|^2 sets their size, the effective rank
(tr M)^2 / ||M||_F^2 how evenly they spread over the adapter's R dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eva_rl.errors import UserError
from eva_rl.eva.gram import Gram, Stack, gram


@dataclass(frozen=True)
class SecondMoment:
    """S = E[x x^T] over the rows x of a layer's input, uncentred, in float64.

    Exact where the engine kept exact moments. From a sketch it is the leading part, U diag(values) U^T, and a flat tail
    in all other directions, such that the trace is exact.

    Attributes:
        dense: (D, D), or None for a sketch.
        directions: U (D, C), orthonormal, of a sketch.
        values: (C,), variance along each.
        tail: Variance of each direction outside of U.
        trace: E|x|^2.
        rows: Number of rows, of all processes.
    """

    dense: Tensor | None
    directions: Tensor
    values: Tensor
    tail: float
    trace: float
    rows: int

    @property
    def width(self) -> int:
        """D."""
        return self.directions.shape[0]

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """S @ vectors (D, K), as (D, K) float64."""
        v = vectors.detach().to(self.directions)
        if v.shape[0] != self.width:
            raise UserError(
                f"The second moment is ({self.width}, {self.width}); it was multiplied by {tuple(v.shape)}."
            )
        if self.dense is not None:
            return self.dense @ v
        inside = self.directions.mT @ v
        return self.directions @ (self.values[:, None] * inside) + self.tail * (v - self.directions @ inside)

    def projected(self, a: Tensor) -> Tensor:
        """M = A S A^T (R, R), the second moment of A x, for A (R, D)."""
        rows = a.detach().to(self.directions)
        m = rows @ (self @ rows.mT)
        return (m + m.mT) / 2


def gain(a: Tensor, moment: SecondMoment) -> float:
    """tr(A S A^T) = E|A x|^2 for A (R, D): the mean squared length of what A makes of the layer's input.

    It grows with the square of A: multiply A by the square root of the ratio to reach another gain.
    """
    return float(moment.projected(a).diagonal().sum())


def effective_rank(a: Tensor, moment: SecondMoment) -> float:
    """(tr M)^2 / ||M||_F^2 with M = A S A^T, between 1 and R; 0 where A x vanishes.

    R if all entries of A x are uncorrelated with equal variance, near 1 if one direction carries it all.
    """
    m = moment.projected(a)
    norm = float(m.square().sum())
    return float(m.diagonal().sum()) ** 2 / norm if norm > 0 else 0.0


def second_moments(stacked: Sequence[Stack]) -> dict[str, SecondMoment]:
    """The second moment of every layer; layers that share an input share it."""
    found: dict[str, SecondMoment] = {}
    for stack in stacked:
        matrices = gram(stack.sums, "all", center=False)
        for index, names in enumerate(stack.members):
            moment = _second_moment(matrices, index)
            found |= dict.fromkeys(names, moment)
    return found


def _second_moment(matrices: Gram, index: int) -> SecondMoment:
    rows = float(matrices.rows[index])
    trace, matrix = float(matrices.total[index]) / max(rows, 1), matrices.matrix[index] / max(rows, 1) ** 0.5
    if matrices.dense:
        dense = matrix / max(rows, 1) ** 0.5
        return SecondMoment(dense, dense[:, :0], dense[0, :0], 0.0, trace, int(rows))
    directions, sigma, _ = torch.linalg.svd(matrix, full_matrices=False)
    tail, kept = _flat_tail(sigma.square(), directions.shape[0], trace)
    return SecondMoment(None, directions[:, :kept], sigma.square()[:kept], tail, trace, int(rows))


def _flat_tail(values: Tensor, width: int, trace: float) -> tuple[float, int]:
    """The level to which the smallest of `width` values, descending and then 0, are raised to sum up to the trace.

    Returns:
        The level, and how many values stand above it.
    """
    known = values.cumsum(0)
    for kept in range(len(values), 0, -1):
        level = max(trace - float(known[kept - 1]), 0.0) / max(width - kept, 1)
        if float(values[kept - 1]) >= level:
            return level, kept
    return trace / width, 0
