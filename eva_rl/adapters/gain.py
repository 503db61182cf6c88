"""How strongly an adapter's start lets the first steps act, and how to put different starts on one scale.

With B = 0 the first steps depend on A through M = A S A^T alone, S the second moment of the layer's inputs
(:class:`eva_rl.eva.SecondMoment`). EVA's rows are orthonormal and lie where the inputs vary most, so that its gain
tr M is tens to hundreds of times that of LoRA's random rows: at one learning rate the two differ by their scale before
they differ by their directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from eva_rl.adapters.extensions import LowRankLayer, low_rank_layers
from eva_rl.adapters.methods import EVA_GAIN, LORA_GAIN, OWN_GAIN
from eva_rl.errors import UserError
from eva_rl.eva import SecondMoment, effective_rank, gain
from eva_rl.seeding import MAX_SEED

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class LayerStart:
    """What a layer's A makes of the layer's inputs before training.

    Attributes:
        gain: tr M = E|A x|^2.
        effective_rank: (tr M)^2 / ||M||_F^2, from 1 to the layer's rank.
    """

    gain: float
    effective_rank: float


def measure_start(model: PeftModel, moments: Mapping[str, SecondMoment]) -> dict[str, LayerStart]:
    """Gain and effective rank of every low-rank layer whose inputs were seen, by layer name.

    Args:
        model: With an adapter, not trained yet.
        moments: Second moments of the layers' inputs; see :func:`eva_rl.adapters.compute_eva`'s ``keep_moments``.
    """
    return {
        layer.name: LayerStart(gain(layer.A, moments[layer.name]), effective_rank(layer.A, moments[layer.name]))
        for layer in low_rank_layers(model)
        if layer.name in moments
    }


def reference_gain(reference: str, moment: SecondMoment, rank: int) -> float:
    """The gain tr(A S A^T) that a layer of this rank is to have.

    Args:
        reference: ``lora``: the mean over LoRA's random starts (PEFT's entries are uniform in +-1 / sqrt(in), of
            variance 1 / (3 in)), rank tr(S) / (3 in). ``eva``: that of orthonormal rows along the leading directions,
            the sum of the ``rank`` largest eigenvalues of S. Or a number, the gain itself.
        moment: S.
        rank: R.
    """
    if reference == LORA_GAIN:
        return rank * moment.trace / (3 * moment.width)
    if reference == EVA_GAIN:
        return float(moment.eigenvalues()[:rank].sum())
    return float(reference)


def gain_factor(layer: LowRankLayer, moments: Mapping[str, SecondMoment], reference: str) -> float:
    """What a layer's A has to be multiplied by to have a reference gain; 1 where A x vanishes.

    Args:
        layer: Low-rank layer.
        moments: Second moments of the layers' inputs.
        reference: See :func:`reference_gain`; ``own`` gives 1.

    Raises:
        UserError: The layer's inputs were not seen.
    """
    if reference == OWN_GAIN:
        return 1.0
    if layer.name not in moments:
        raise UserError(f"adapter.gain={reference}: the inputs of {layer.name} were not seen. Use adapter.gain=own.")
    moment = moments[layer.name]
    own, wanted = gain(layer.A, moment), reference_gain(reference, moment, layer.A.shape[0])
    return float((wanted / own) ** 0.5) if own > 0 else 1.0  # the gain grows with the square of A


def set_gain(model: PeftModel, moments: Mapping[str, SecondMoment], reference: str) -> None:
    """Rescale each layer's A to a reference gain; where B is zero the function stays what it was.

    Args:
        model: With an adapter whose B is zero; changed in place.
        moments: Second moments of the layers' inputs.
        reference: See :func:`reference_gain`; ``own`` changes nothing.

    Raises:
        UserError: A layer's inputs were not seen.
    """
    for layer in low_rank_layers(model):
        factor = gain_factor(layer, moments, reference)
        with torch.no_grad():
            layer.A.mul_(factor)


def rotate(model: PeftModel, seed: int) -> None:
    """Multiply each layer's A by a random orthogonal matrix from the left: a null that changes nothing of substance.

    Gain, effective rank and the space of directions stay; under plain gradient descent training would be the same.

    Args:
        model: With an adapter whose B is zero; changed in place.
        seed: Of the matrices.
    """
    for index, a in enumerate(layer.A for layer in low_rank_layers(model)):
        rng = np.random.default_rng([seed % MAX_SEED, index])
        q, r = np.linalg.qr(rng.standard_normal((a.shape[0], a.shape[0])))
        orthogonal: Tensor = torch.from_numpy(q * np.sign(np.diag(r))).to(a)  # uniform (Mezzadri 2007)
        with torch.no_grad():
            a.copy_(orthogonal @ a)
