"""Second moments of wide inputs as factors of few columns: a self-refining sketch and a streaming SVD."""

from __future__ import annotations

import torch
from torch import Tensor

from eva_rl.eva.gram import downdate, nystrom
from eva_rl.eva.moments import Shifted, Sums, full_product

# The test matrix is refined whenever the rows have doubled, until there are this many rows per column.
ROWS_PER_COLUMN = 16


class Sketch(Shifted):
    """Y = S Omega for an orthonormal Omega (D, C) that spans the leading directions of the first rows.

    Refining the test matrix Omega is one block power iteration on the current rows; what was summed before is carried
    over through its own factor. Nystrom's formula then gives a factor of S: exact inside the span that
    matters, small outside of it.

    Args:
        width: D.
        device: Of the rows.
        start: (D, C), random directions to start from.
    """

    method = "sketch"

    def __init__(self, width: int, device: torch.device, start: Tensor) -> None:
        super().__init__(width, device)
        self.start = start.to(device=device, dtype=torch.float32)
        self.omega = torch.linalg.qr(self.start)[0]
        self.core = torch.zeros(2, *start.shape, device=device, dtype=self.dtype)
        self._seen = 0
        self._refined_at = 0

    def _add_product(self, half: int, x: Tensor) -> None:
        fresh = self._seen == 0
        if fresh or (self._refined_at < ROWS_PER_COLUMN * self.start.shape[1] and self._seen >= 2 * self._refined_at):
            self._refine_test_matrix(x, rounds=2 if fresh else 1)
        self._seen += x.shape[0]
        self.core[half] += full_product(x.T, full_product(x, self.omega))
        self.square[half] += torch.linalg.vector_norm(x).square()

    def _refine_test_matrix(self, x: Tensor, rounds: int) -> None:
        x = x.nan_to_num(0.0, 0.0, 0.0)  # values that are not finite are found in the sums
        factors = nystrom(self.core, self.omega.to(self.core)).nan_to_num(0.0, 0.0, 0.0)
        omega = self.omega
        for _ in range(rounds):
            image = full_product(x.T, full_product(x, omega)).to(self.core)
            image += (factors @ (factors.mT @ omega.to(factors))).sum(0)
            # with fewer rows than columns the rest of the span stays random
            image = image + 1e-6 * torch.linalg.matrix_norm(image, ord=1) * self.start
            omega = torch.linalg.qr(image)[0].float()
        self.core = factors @ (factors.mT @ omega.to(factors))
        self.omega = omega
        self._refined_at = self._seen + x.shape[0]

    def sums(self) -> Sums:  # noqa: D102 - the base says it
        return _unshifted(self, nystrom(self.core, self.omega.to(self.core)))


class StreamingSvd(Shifted):
    """A truncated factor F (D, C) of S for each half, merged with each batch by warm-started subspace iteration.

    The rows [F^T; X] are projected on C directions; what falls outside is forgotten, as in sequential
    Karhunen-Loeve (Ross et al. 2008, "Incremental Learning for Robust Visual Tracking", section 2).

    Args:
        width: D.
        device: Of the rows.
        start: (D, C), random directions to start from.
    """

    method = "svd"

    def __init__(self, width: int, device: torch.device, start: Tensor) -> None:
        super().__init__(width, device)
        basis = torch.linalg.qr(start.float())[0].to(device)
        self.basis = [basis, basis]
        self.factor = [torch.zeros_like(basis)] * 2
        self.seen = [False, False]

    def _add_product(self, half: int, x: Tensor) -> None:
        self.square[half] += torch.linalg.vector_norm(x).square()
        # values that are not finite are found in the sums; here they would only make the decomposition raise
        stacked = torch.cat([self.factor[half].mT, x.nan_to_num(0.0, 0.0, 0.0)])
        basis = self.basis[half]
        for _ in range(1 if self.seen[half] else 3):
            basis = torch.linalg.qr(full_product(stacked.mT, full_product(stacked, basis)))[0]
        _, triangle = torch.linalg.qr(full_product(stacked, basis))
        _, sigma, right = torch.linalg.svd(triangle.nan_to_num(0.0, 0.0, 0.0))
        self.basis[half] = full_product(basis, right.mT)
        self.factor[half] = self.basis[half] * sigma
        self.seen[half] = True

    def sums(self) -> Sums:  # noqa: D102 - the base says it
        return _unshifted(self, torch.stack(self.factor).to(self.dtype))


def _unshifted(sums: Shifted, factor: Tensor) -> Sums:
    """Raw sums from a factor F (2, D, C) around the shift c.

    Around the mean m the scatter is F F^T - n d d^T with d = m - c; around zero it is n m m^T more.
    """
    c, n = sums.center_of_shift(), sums.count[:, None]
    linear = sums.linear + n * c
    square = sums.square + 2 * (sums.linear @ c) + sums.count * (c @ c)
    root = n.clamp(min=1).sqrt()
    core = torch.cat([downdate(factor, sums.linear / root), (linear / root)[:, :, None]], dim=-1)
    return Sums(sums.method, core, linear, square, sums.count.clone())


def gaussian(width: int, columns: int, seed: int) -> Tensor:
    """Random directions (D, C), equal on every process for equal arguments."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + width)
    return torch.randn(width, min(columns, width), generator=generator)
