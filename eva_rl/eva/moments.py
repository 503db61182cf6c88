"""What is remembered of a layer's inputs: sums over rows, in halves, that can be added across batches and processes.

Three ways to remember the second moment S = X^T X of the rows seen by one layer:

* `Moments` keeps S itself, (D, D). Exact.
* `Sketch` keeps S @ Omega for few directions Omega (D, C), from which Nystrom's formula gives the leading part of S.
  Costs 4 N D C operations instead of 2 N D^2.
* `StreamingSvd` keeps a truncated factor F with F F^T ~ S, updated batch by batch: the paper's way, and the slowest.

Each keeps two halves of the data apart, so that the halves can be compared. All of it is float64 outside of the
products themselves, which are float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eva_rl.eva.options import Method


@dataclass(frozen=True)
class Sums:
    """Raw sums over the rows x of one input, or of G stacked inputs of equal width (then with a leading G).

    Args:
        method: How `core` is to be read.
        core: (2, D, C): S itself (C = D) for moments, else a factor F with F F^T ~ S; one for each half of the data.
        linear: (2, D), sum of x.
        square: (2,), sum of |x|^2.
        count: (2,), number of rows.
    """

    method: Method
    core: Tensor
    linear: Tensor
    square: Tensor
    count: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four sums, in the order of the constructor."""
        return self.core, self.linear, self.square, self.count

    def __add__(self, other: Sums) -> Sums:
        """The sums of both data: factors are put side by side, everything else is added."""
        merge = self.core + other.core if self.method == "moments" else torch.cat([self.core, other.core], dim=-1)
        return Sums(
            self.method,
            merge,
            self.linear + other.linear,
            self.square + other.square,
            self.count + other.count,
        )

    @staticmethod
    def stack(many: list[Sums]) -> Sums:
        """Stack the sums of G inputs of equal width, on the first one's device: a model may be spread over several."""
        method, device = many[0].method, many[0].core.device
        parts = zip(*(sums.tensors() for sums in many), strict=True)
        return Sums(method, *(torch.stack([tensor.to(device) for tensor in part]) for part in parts))


class Accumulator(ABC):
    """Sums over the rows of one input, fed from forward hooks; `rows` are never kept."""

    method: Method

    def __init__(self, width: int, device: torch.device) -> None:
        self.width = width
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.linear = torch.zeros(2, width, device=device, dtype=self.dtype)
        self.square = torch.zeros(2, device=device, dtype=self.dtype)
        self.count = torch.zeros(2, device=device, dtype=self.dtype)

    @abstractmethod
    def update(self, half: int, rows: Tensor, keep: Tensor | None = None, *, owned: bool = False) -> None:
        """Add rows to one half.

        Args:
            half: 0 or 1.
            rows: (N, D), N may be 0.
            keep: (N,) bool, leaves out the others without looking at their values.
            owned: The rows may be overwritten.
        """

    @abstractmethod
    def sums(self) -> Sums:
        """The sums so far."""

    def probe(self) -> Tensor:
        """A number that is finite only if every row so far was, and its square as well."""
        return self.linear.sum() + self.square.sum()


class Shifted(Accumulator):
    """Accumulates around the mean of the first rows.

    Activations often have a mean far from zero. Products of shifted float32 rows keep the digits that products of raw
    ones would lose; the shift is undone in float64.
    """

    shift: Tensor | None = None

    def update(  # noqa: D102 - the base says it
        self, half: int, rows: Tensor, keep: Tensor | None = None, *, owned: bool = False
    ) -> None:
        if rows.shape[0] == 0:
            return
        x = rows.float()
        if keep is not None:
            x = torch.where(keep[:, None], x, 0.0)
        count = float(x.shape[0]) if keep is None else keep.sum()
        if self.shift is None:
            self.shift = x.sum(0) / torch.as_tensor(count, device=x.device).clamp(min=1)
        x = x.sub_(self.shift) if owned or x is not rows else x - self.shift
        if keep is not None:
            x = torch.where(keep[:, None], x, 0.0)
        self.linear[half] += x.sum(0)
        self.count[half] += count
        self._add_product(half, x)

    @abstractmethod
    def _add_product(self, half: int, x: Tensor) -> None: ...

    def center_of_shift(self) -> Tensor:
        """c, (D,)."""
        return torch.zeros_like(self.linear[0]) if self.shift is None else self.shift.to(self.linear)


class Moments(Shifted):
    """Exact second moments, (2, D, D)."""

    method: Method = "moments"

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self.core = torch.zeros(2, width, width, device=device, dtype=self.dtype)

    def _add_product(self, half: int, x: Tensor) -> None:
        # Only the upper block triangle is computed: measured 0.6-0.7 of the full product's time on CPU at every width
        # from 128 to 2048. On CUDA one large call is faster than four small ones.
        blocks = 4 if x.device.type == "cpu" and self.width >= 128 else 1
        step = -(-self.width // blocks)
        for start in range(0, self.width, step):
            stop = min(start + step, self.width)
            self.core[half, start:stop, start:] += full_product(x[:, start:stop].T, x[:, start:])

    def probe(self) -> Tensor:  # noqa: D102 - the base says it
        return super().probe() + self.core.diagonal(dim1=-2, dim2=-1).sum()

    def sums(self) -> Sums:  # noqa: D102 - the base says it
        core = self.core.triu() + self.core.triu(1).mT
        c, n = self.center_of_shift(), self.count[:, None]
        # sum x x^T = shifted + c s^T + s c^T + n c c^T, with s the sum of the shifted rows
        crossed = self.linear[:, :, None] * c + c[:, None] * (self.linear + n * c)[:, None, :]
        core = core + crossed
        return Sums("moments", core, self.linear + n * c, core.diagonal(dim1=-2, dim2=-1).sum(-1), self.count.clone())


def full_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply in true float32, whatever autocast or the TF32 setting says."""
    with _ieee_products() if _MATMULS else _highest_products(), torch.autocast(left.device.type, enabled=False):
        return left @ right


_CANDIDATES: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
_MATMULS = [matmul for matmul in _CANDIDATES if hasattr(matmul, "fp32_precision")]
"""Where PyTorch keeps the precision of products since 2.9; its older setting cannot be read once these are set."""


@contextmanager
def _ieee_products() -> Iterator[None]:
    before = [(matmul, matmul.fp32_precision) for matmul in _MATMULS]
    lowered = [(matmul, precision) for matmul, precision in before if precision not in {"none", "ieee"}]
    for matmul, _ in lowered:
        matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        for matmul, precision in lowered:
            matmul.fp32_precision = "none"  # inherits torch.backends.fp32_precision
            if matmul.fp32_precision != precision:
                matmul.fp32_precision = precision


@contextmanager
def _highest_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
