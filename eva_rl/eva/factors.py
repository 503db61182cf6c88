"""Thin factors F (D, C) of positive semi-definite matrices F F^T."""

from __future__ import annotations

import torch
from torch import Tensor


def nystrom(product: Tensor, omega: Tensor) -> Tensor:
    """F with F F^T = Y (Omega^T Y)^+ Y^T, from Y = S Omega (..., D, C) and Omega (D, C).

    The Nystrom approximation of a positive semi-definite S (Halko, Martinsson and Tropp 2011, section 5.4; in a single
    pass as in Tropp et al. 2017, arXiv 1706.05736). A small shift keeps the inner matrix positive despite rounding.
    """
    shift = 1e-7 * torch.linalg.matrix_norm(product)[..., None, None]
    product = product + shift * omega
    inner = omega.mT @ product
    values, vectors = torch.linalg.eigh(((inner + inner.mT) / 2).nan_to_num(0.0, 0.0, 0.0))
    tiny = torch.finfo(values.dtype).tiny
    usable = values > 1e-9 * values[..., -1:].clamp(min=tiny)
    weights = torch.where(usable, values.clamp(min=tiny).rsqrt(), 0.0)
    factor: Tensor = product @ (vectors * weights[..., None, :])
    return factor


def downdate(factor: Tensor, vector: Tensor) -> Tensor:
    """A factor of F F^T - v v^T for F (..., D, C) and v (..., D), within the span of both."""
    basis, _ = torch.linalg.qr(torch.cat([factor, vector[..., None]], dim=-1).nan_to_num(0.0, 0.0, 0.0))
    inside = basis.mT @ factor
    along = basis.mT @ vector[..., None]
    values, vectors = torch.linalg.eigh((inside @ inside.mT - along @ along.mT).nan_to_num(0.0, 0.0, 0.0))
    downdated: Tensor = basis @ (vectors * values.clamp(min=0).sqrt()[..., None, :])
    return downdated
