"""Second moments of stacked layers, exact or as a factor, ready for products and eigenvectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

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


def gram(sums: Sums, part: Part, center: bool, omega: Tensor | None = None) -> Gram:
    """The second moments, or with `center` the scatter around the mean, of stacked sums.

    Args:
        sums: Stacked raw sums, tensors with leading (G, 2).
        part: One half of the data, or all of it.
        center: Subtract n m m^T, m the mean of the rows.
        omega: (D, C), the test matrix of a sketch.
    """
    core, linear, square, count = (_select(tensor, part, sums.method) for tensor in sums.tensors())
    rows = count.clamp(min=1)
    mean = linear / rows.sqrt()[:, None]  # sqrt(n) m, so that its square is n m m^T
    total = (square - mean.square().sum(-1) if center else square).clamp(min=0)
    if sums.method == "moments":
        dense = core - mean[:, :, None] * mean[:, None, :] if center else core
        return Gram(dense, True, total, count)
    if sums.method == "svd":
        return Gram(_downdate(core, mean) if center else core, False, total, count)
    if omega is None:
        raise AssertionError("a sketch is read with its omega")
    omega = omega.to(core)
    if center:
        core = core - mean[:, :, None] * (mean @ omega)[:, None, :]
    return Gram(_nystrom(core, omega), False, total, count)


def _select(tensor: Tensor, part: Part, method: str) -> Tensor:
    if part != "all":
        return tensor[:, 0 if part == "first" else 1]
    if method == "svd" and tensor.ndim == 4:
        return torch.cat([tensor[:, 0], tensor[:, 1]], dim=-1)
    return tensor.sum(1)


def _nystrom(product: Tensor, omega: Tensor) -> Tensor:
    """Factor F (G, D, C) with F F^T = Y (Omega^T Y)^+ Y^T, Y = S Omega.

    The Nystrom approximation of a positive semi-definite S (Halko, Martinsson and Tropp 2011, section 5.4; single pass
    as in Tropp et al. 2017, arXiv 1706.05736). The small shift keeps the inner matrix positive despite rounding.
    """
    shift = 1e-7 * torch.linalg.matrix_norm(product, dim=(-2, -1))[:, None, None]
    product = product + shift * omega
    inner = omega.mT @ product
    values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    usable = values > 1e-9 * values[:, -1:].clamp(min=torch.finfo(values.dtype).tiny)
    weights = torch.where(usable, values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
    return product @ (vectors * weights[:, None, :])


def _downdate(factor: Tensor, mean: Tensor) -> Tensor:
    """A factor of F F^T - mean mean^T, within the span of F and the mean."""
    basis, _ = torch.linalg.qr(torch.cat([factor, mean[:, :, None]], dim=-1))
    inside = basis.mT @ factor
    along = basis.mT @ mean[:, :, None]
    values, vectors = torch.linalg.eigh(inside @ inside.mT - along @ along.mT)
    return basis @ (vectors * values.clamp(min=0).sqrt()[:, None, :])
