"""Second moments of stacked layers, exact or as a factor, ready for products and eigenvectors; and of a single layer.

With B = 0 the first steps of a low-rank adapter depend on A through M = A S A^T alone, S = E[x x^T] the uncentred
second moment of the layer's input x: the gain tr M = E|A x|^2 sets their size, the effective rank
(tr M)^2 / ||M||_F^2 how evenly they spread over the adapter's R dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from eva_rl.distributed import ProcessGroup
from eva_rl.errors import UserError
from eva_rl.eva.hooks import InputGroup
from eva_rl.eva.moments import Sums
from eva_rl.eva.options import Method

NOISE_FLOOR = 1e-7
"""Directions with less of the variance than this are rounding noise of float32 products around the shift, not data."""
SKETCH_FLOOR = 1e-6
"""The same for a sketch, where the shift of :func:`nystrom` adds up over its refinements."""
ROUNDING_FLOOR = 1e-12
"""The same as a share of the uncentred second moment: float32 rounds x itself by up to 6e-8 x."""
Part = Literal["first", "second", "all"]


@dataclass(frozen=True)
class Gram:
    """Positive semi-definite matrices (G, D, D), dense or as F F^T.

    Args:
        matrix: S itself (G, D, D), or the factor F (G, D, C).
        dense: Which of the two.
        total: (G,) trace of the full matrix, also of what a factor leaves out.
        rows: (G,) rows behind it.
        noise: (G,) variance below which a direction is rounding noise of float32 products.
    """

    matrix: Tensor
    dense: bool
    total: Tensor
    rows: Tensor
    noise: Tensor

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
    mean = linear / count.clamp(min=1).sqrt()[:, None]  # sqrt(n) m, so that its square is n m m^T
    spread = (square - mean.square().sum(-1)).clamp(min=0)
    floor = SKETCH_FLOOR if sums.method == "sketch" else NOISE_FLOOR
    noise = torch.maximum(floor * spread, ROUNDING_FLOOR * square)
    if not center:
        return Gram(core, dense, square, count, noise)
    core = core - mean[:, :, None] * mean[:, None, :] if dense else downdate(core, mean)
    # an input that is constant but for rounding has no variance to share out
    return Gram(core, dense, torch.where(spread > noise, spread, 0.0), count, noise)


def _select(tensor: Tensor, part: Part) -> Tensor:
    return tensor.sum(1) if part == "all" else tensor[:, 0 if part == "first" else 1]


@dataclass(frozen=True)
class Stack:
    """Inputs of equal width, kept by the same method.

    Args:
        members: Per input, the layers that receive it.
        width: D.
        sums: Over all processes, with a leading dimension of inputs.
    """

    members: list[tuple[str, ...]]
    width: int
    sums: Sums


@dataclass(frozen=True)
class Structure:
    """What all processes have to share to add their sums: the layers of an input, its width, method and columns."""

    members: tuple[str, ...]
    width: int
    method: Method
    columns: int


def stacks(groups: Sequence[InputGroup], group_of: dict[str, InputGroup], process_group: ProcessGroup) -> list[Stack]:
    """Stack equal widths and add up all processes.

    Raises:
        UserError: The processes found different layers sharing inputs.
    """
    sums = {_members(group, group_of): group.sums() for group in groups}
    structure = _common([_structure(names, one) for names, one in sums.items()], process_group)
    stacked = []
    for key in sorted({(s.width, s.method, s.columns) for s in structure}):
        members = [s.members for s in structure if (s.width, s.method, s.columns) == key]
        width, method, columns = key
        nothing = partial(_nothing, method, width, columns, process_group.device)
        local = [sums.pop(names) if names in sums else nothing() for names in members]
        stack = Sums.stack(local)
        del local  # one copy is enough
        stacked.append(Stack(members, width, _reduce(stack, process_group)))
    return stacked


def _members(group: InputGroup, group_of: dict[str, InputGroup]) -> tuple[str, ...]:
    return tuple(name for name, other in group_of.items() if other is group)


def _structure(names: tuple[str, ...], sums: Sums) -> Structure:
    return Structure(names, sums.linear.shape[-1], sums.method, sums.core.shape[-1])


def _common(mine: list[Structure], process_group: ProcessGroup) -> list[Structure]:
    heard = [structure for structure in process_group.all_gather_object(mine) if structure]
    if not heard:
        return []
    if any(set(other) != set(heard[0]) for other in heard):
        raise UserError(
            "The processes saw different layers being called or sharing their inputs, so their sums cannot be added. "
            "Give each process batches of the same kind, or targets= that every batch reaches."
        )
    return heard[0]


def _nothing(method: Method, width: int, columns: int, device: torch.device) -> Sums:
    """The sums of a process that has seen no row."""
    zeros = torch.zeros(2, width, columns, dtype=torch.float64, device=device)
    return Sums(method, zeros, zeros[..., 0].clone(), zeros[:, 0, 0].clone(), zeros[:, 0, 0].clone())


def _reduce(sums: Sums, process_group: ProcessGroup) -> Sums:
    if sums.method == "moments":
        core = process_group.all_reduce_sum(sums.core)
    else:
        core = process_group.all_gather_cat(sums.core).to(sums.core.device)
    return Sums(sums.method, core, *(process_group.all_reduce_sum(part) for part in sums.tensors()[1:]))


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

    def eigenvalues(self) -> Tensor:
        """The eigenvalues of S, largest first, (D,) float64."""
        if self.dense is not None:
            exact: Tensor = torch.linalg.eigvalsh(self.dense).flip(0).clamp(min=0)
            return exact
        flat = self.values.new_full((self.width - len(self.values),), self.tail)
        return torch.cat([self.values, flat])


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
