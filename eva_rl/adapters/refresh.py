"""EVA refresh: reinitialise the adapter directions that training does not use from the current activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eva_rl.adapters.extensions import low_rank_layers
from eva_rl.adapters.gain import gain_factor
from eva_rl.adapters.methods import OWN_GAIN
from eva_rl.eva import EvaResult

if TYPE_CHECKING:
    from peft import PeftModel

UNUSED = 1e-4
"""A direction counts as unused where its singular value of B A is at most this share of the largest one."""


@dataclass(frozen=True)
class Refresh:
    """Overlaps with the current activations, and what was reinitialised.

    Attributes:
        overlaps: By layer, see :func:`subspace_overlap`.
        reinitialised: By layer, number of reinitialised directions; layers without any are left out.
        changed: Parameters whose coordinates changed, whose optimiser state has to be reset.
    """

    overlaps: Mapping[str, float]
    reinitialised: Mapping[str, int]
    changed: tuple[nn.Parameter, ...]

    def metrics(self) -> dict[str, float]:
        """Scalars for the record."""
        values = list(self.overlaps.values())
        return {
            "eva/overlap_mean": sum(values) / len(values),
            "eva/overlap_min": min(values),
            "eva/directions_reinitialised": float(sum(self.reinitialised.values())),
        }


def subspace_overlap(directions: Tensor, others: Tensor) -> float:
    """Mean squared cosine between two subspaces: 1 where the smaller lies in the larger, 0 where they are orthogonal.

    An empty one, of a layer whose input does not vary, lies in every other.

    Args:
        directions: (R, D), rows of any length that span one.
        others: (K, D), rows that span the other.
    """
    if not (len(directions) and len(others)):
        return 1.0
    first, second = (torch.linalg.qr(x.double().T)[0] for x in (directions, others))
    shared: Tensor = (first.T @ second).square().sum() / min(first.shape[1], second.shape[1])
    return float(shared)


def refresh_directions(model: PeftModel, found: EvaResult, threshold: float, gain: str = OWN_GAIN) -> Refresh:
    """Compare the adapter's input directions with as many of the current principal directions.

    Where they overlap less than ``threshold``, B A is written in terms of its own singular vectors and the directions
    it does not use are reinitialised from the leading new ones, with zeros in B: the function stays the same.

    Args:
        model: With a LoRA adapter (DoRA and rsLoRA included); changed in place.
        found: EVA's result for the current model; with its ``moments`` unless ``gain`` is own.
        threshold: Overlap below which a layer is reinitialised.
        gain: What A is rescaled to in a reinitialised layer, and B against it, by the current inputs; see
            :func:`eva_rl.adapters.set_gain`. With ``own`` its rows have length 1.

    Raises:
        UserError: The inputs of a layer that is to be rescaled were not seen.
    """
    overlaps, reinitialised, changed = {}, {}, []
    for layer in low_rank_layers(model):
        components = found.layers[layer.name].components.to(layer.A.device)
        overlaps[layer.name] = subspace_overlap(layer.A.data, components[: len(layer.A)])
        if overlaps[layer.name] < threshold and (count := _reinitialise_unused(layer.A, layer.B, components)):
            reinitialised[layer.name] = count
            changed += [layer.A, layer.B]
            factor = gain_factor(layer, found.moments, gain)
            with torch.no_grad():
                layer.A.mul_(factor)
                layer.B.div_(factor)
    return Refresh(overlaps, reinitialised, tuple(changed))


def _reinitialise_unused(a: nn.Parameter, b: nn.Parameter, components: Tensor) -> int:
    """Returns the number of reinitialised directions."""
    left, values, right = _svd(b.data.double(), a.data.double())
    used = int((values > UNUSED * values[0]).sum()) if values[0] > 0 else 0
    fresh = _outside(right[:used], components.double())[: len(a) - used]
    if not len(fresh):
        return 0
    kept = left[:, :used] * values[:used]
    # where too few are new, the rows that are left keep to what A spanned before: a row of zeros would never train
    rows = _orthonormal(torch.cat([right[:used], fresh, right[used:]]))[used + len(fresh) : len(a)]
    with torch.no_grad():
        b.zero_()
        b[:, :used] = kept.to(b.dtype)
        a.copy_(torch.cat([right[:used], fresh, rows]))
    return len(fresh)


def _orthonormal(rows: Tensor) -> Tensor:
    """Each row less what those above it span, of length 1; any other direction where nothing is left."""
    orthonormal: Tensor = torch.linalg.qr(rows.T)[0].T
    return orthonormal


def _svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets of b a, (out, R), (R,) and (R, in), without making the product."""
    q_out, r_out = torch.linalg.qr(b)
    q_in, r_in = torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(r_out @ r_in.T)
    return q_out @ u, values, v @ q_in.T


def _outside(basis: Tensor, candidates: Tensor) -> Tensor:
    """Orthonormal directions of the candidates' span that the basis (orthonormal rows) lacks, in their order."""
    rows: list[Tensor] = []
    for candidate in candidates:
        known = torch.cat([basis, *[row[None] for row in rows]])
        rest = candidate - known.T @ (known @ candidate)
        if rest.norm() > 0.1:  # the rest of the candidate is known already
            rows.append(rest / rest.norm())
    return torch.stack(rows) if rows else candidates[:0]
