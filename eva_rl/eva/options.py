"""Options of the EVA computation and of how second moments are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

from eva_rl.errors import UserError
from eva_rl.eva.redistribution import Score
from eva_rl.options import one_of

Method = Literal["moments", "sketch", "svd"]
"""How second moments are kept, see :mod:`eva_rl.eva.moments`."""
Variant = Literal["whiten", "rotate", "permute", "minor"]
Criterion = Literal["capture", "directions"]
MAX_BATCHES = 16
"""Batches that EVA takes at most."""


@dataclass(frozen=True)
class EvaOptions:
    """How sums become components and ranks.

    Args:
        rank: Components per layer on average; the budget is rank times the number of layers.
        rho: Every layer may get up to rank * rho components; 1 keeps the ranks uniform.
        tau: How far the two halves of the data have to agree, between 0 and 1.
        center: Components of the covariance (True) or of the raw second moment (False).
        score: "ratio" or "paper", see `redistribution.scores`.
        variant: One of the paper's ablations, see `estimator.apply_variant`.
        alpha: LoRA's alpha of a layer that gets `rank` components; None takes the rank: the
            update is not scaled.
        keep_scale: Scale alpha with a layer's rank, so that alpha / rank is the same everywhere.
        criterion: "capture" or "directions", see `agreement`.
        seed: Of the variants' random matrices.

    Raises:
        UserError: A value is out of range.
    """

    rank: int = 8
    rho: float = 1.0
    tau: float = 0.99
    center: bool = False
    score: Score = "ratio"
    variant: Variant | None = None
    alpha: float | None = None
    keep_scale: bool = True
    criterion: Criterion = "capture"
    seed: int = 0

    def __post_init__(self) -> None:
        rank: Any = self.rank
        whole = isinstance(rank, Integral) and int(rank) >= 1
        _require(whole, f"rank={rank!r}: expected at least 1, and a whole number.")
        object.__setattr__(self, "rank", int(rank))  # as JSON takes it, which knows no integers of NumPy
        finite_rho = math.isfinite(self.rho) and self.rho >= 1
        _require(finite_rho, f"rho={self.rho}: expected a number of at least 1; 1 keeps the ranks uniform.")
        _require(0 < self.tau <= 1, f"tau={self.tau}: expected more than 0 and at most 1.")
        finite_alpha = self.alpha is None or (math.isfinite(self.alpha) and self.alpha > 0)
        _require(finite_alpha, f"alpha={self.alpha}: expected a number above 0, or None for that of the rank.")
        _require(self.seed >= 0, f"seed={self.seed}: expected at least 0.")
        one_of(get_args(Score), score=self.score)
        one_of(get_args(Criterion), criterion=self.criterion)
        if self.variant is not None:
            one_of(get_args(Variant), variant=self.variant)

    def components(self, width: int) -> int:
        """How many components are computed for a layer of this width, K."""
        return min(round(self.rank * self.rho), width)

    def lora_alpha(self, rank: int) -> float:
        """Alpha of a layer of this rank."""
        alpha = float(self.rank) if self.alpha is None else self.alpha
        return alpha * rank / self.rank if self.keep_scale else alpha


@dataclass(frozen=True)
class StorageOptions:
    """How the sums are kept.

    Args:
        method: "moments", "sketch" or "svd" for every layer, or "auto" to choose by width.
        components: The largest rank * rho that will be asked for; sizes the sketches.
        budget: Bytes for exact moments, all layers together; what does not fit is sketched.
        seed: Of the sketches' test matrices.
        exact: Let "auto" sketch only what the budget leaves no room for, also where exact moments cost more.
    """

    method: Method | Literal["auto"] = "auto"
    components: int = 64
    budget: int = 4 * 2**30
    seed: int = 0
    exact: bool = False

    def __post_init__(self) -> None:
        one_of(("auto", *get_args(Method)), method=self.method)
        _require(self.components >= 1, f"components={self.components}: expected at least 1.")

    @property
    def columns(self) -> int:
        """C, the columns of a sketch: the components and as many again to absorb what lies outside of them."""
        return 2 * self.components + 8

    def choose(self, width: int, used: int) -> Method:
        """The method for one more input of this width, with `used` bytes taken already."""
        if self.method != "auto":
            return self.method
        fits = used + moment_bytes(width) <= self.budget
        # below four times the columns, exact moments with a symmetric product cost no more than the sketch
        return "moments" if fits and (self.exact or width <= 4 * self.columns) else "sketch"


def moment_bytes(width: int) -> int:
    """Bytes of exact moments: two halves in float64."""
    return 2 * 8 * width * width


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
