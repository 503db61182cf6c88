"""Leading eigenvectors of stacked symmetric matrices with few, large, batched operations."""

from __future__ import annotations

import torch
from torch import Tensor

from eva_rl.eva.gram import Gram

# Below this width a full eigendecomposition costs less than the iteration (measured on CPU: 4 ms at 256 in float64).
FULL_BELOW = 256
FULL_BELOW_ON_GPU = 2048  # there an iteration waits for many small factorisations (benchmarks/eva/decompositions.py)
_KRYLOV_STEPS = 3


def leading(
    matrices: Gram,
    count: int,
    *,
    tolerance: float = 1e-7,
    start: Tensor | None = None,
    max_iterations: int = 60,
) -> tuple[Tensor, Tensor]:
    """The `count` leading eigenpairs of each matrix.

    Args:
        matrices: G stacked matrices.
        count: K, at most D.
        tolerance: Largest residual |S v - lambda v| / lambda_1 of a wanted pair.
        start: (G, D, >= K) directions to start from, for instance those of an earlier call.
        max_iterations: Bound on the iterations; then a full decomposition settles what is left.

    Returns:
        Eigenvalues (G, K), descending and not negative, and orthonormal eigenvectors (G, D, K).
    """
    D = matrices.width
    if not matrices.dense:
        return _from_factor(matrices.matrix, count)
    block = min(D, count + max(8, count // 2))
    full_below = FULL_BELOW_ON_GPU if matrices.matrix.is_cuda else FULL_BELOW
    if full_below >= D or block * _KRYLOV_STEPS >= D:
        return _full(matrices.matrix, count)
    basis = _start(matrices.matrix, block, start)
    for _ in range(max_iterations):
        values, basis, residual = _improve(matrices, basis, block)
        if bool((residual[:, :count] <= tolerance * values[:, :1]).all()):
            return values[:, :count].clamp(min=0), basis[..., :count]
    return _full(matrices.matrix, count)


def orthonormalise(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns (G, D, K) by CholeskyQR, twice, or by QR where that breaks down.

    CholeskyQR is two matrix products and a (K, K) factorisation, which batches well; run twice it is as orthogonal as
    Householder's QR for condition numbers up to 1e7 (Yamamoto et al. 2015).
    """
    scaled = columns / torch.linalg.vector_norm(columns, dim=-2, keepdim=True).clamp(min=1e-300)
    failed = torch.zeros((), dtype=torch.int32, device=columns.device)
    for _ in range(2):
        triangle, info = torch.linalg.cholesky_ex(scaled.mT @ scaled)
        failed = failed + info.abs().sum() + (triangle.diagonal(dim1=-2, dim2=-1).amin() < 1e-6)
        scaled = torch.linalg.solve_triangular(triangle.mT, scaled, upper=True, left=False)
    basis: Tensor = torch.linalg.qr(columns)[0] if bool(failed) else scaled
    return basis


def minor(matrices: Gram, count: int) -> tuple[Tensor, Tensor]:
    """The `count` eigenpairs of least variance, ascending; for exact moments only."""
    values, vectors = torch.linalg.eigh(matrices.matrix)
    return values[:, :count].clamp(min=0), vectors[..., :count]


def _improve(matrices: Gram, basis: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """One restart of a block Krylov iteration: Rayleigh-Ritz on span(Q, S Q, S^2 Q), and the residuals (G, block)."""
    span = newest = basis
    for _ in range(_KRYLOV_STEPS - 1):
        newest = matrices.apply(newest)
        for _ in range(2):  # once is not enough where the new block is nearly inside the span
            newest = orthonormalise(newest - span @ (span.mT @ newest))
        span = torch.cat([span, newest], dim=-1)
    image = matrices.apply(span)
    small = span.mT @ image
    values, rotation = torch.linalg.eigh((small + small.mT) / 2)
    values, rotation = values.flip(-1)[:, :block], rotation.flip(-1)[..., :block]
    basis = span @ rotation
    residual = torch.linalg.vector_norm(image @ rotation - basis * values[:, None], dim=-2)
    return values, basis, residual


def _start(matrix: Tensor, block: int, start: Tensor | None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(matrix.shape[1], block, generator=generator, dtype=torch.float64).to(matrix)
    noise = noise.expand(matrix.shape[0], -1, -1)
    if start is None:
        return orthonormalise(noise)
    kept = start[..., :block].to(matrix)
    return orthonormalise(torch.cat([kept, noise[..., kept.shape[-1] :]], dim=-1))


def _full(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(-1)[:, :count].clamp(min=0), vectors.flip(-1)[..., :count]


def _from_factor(factor: Tensor, count: int) -> tuple[Tensor, Tensor]:
    basis, triangle = torch.linalg.qr(factor)
    left, sigma, _ = torch.linalg.svd(triangle)
    return sigma.square()[:, :count], basis @ left[..., :count]
