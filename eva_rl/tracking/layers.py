"""How large the trained matrices and their gradients are, layer by layer."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

PEFT_NAMES = re.compile(
    r"^base_model\.model\.|\.(default|weight)\b|\.modules_to_save\b|\blora_(?=[ABE]\b)|\bmiss_(?=block\b)"
)
"""What PEFT's and torch's names of parameters have besides the layer and A, B or E."""


def layer_norms(network: nn.Module) -> dict[str, float]:
    """Frobenius norms of the trained matrices, and of their gradients where they have one.

    Args:
        network: With its gradients, for instance after an optimiser's step.

    Returns:
        ``layers/weight_norm/LAYER`` and ``layers/gradient_norm/LAYER``; the layer of an adapter's matrix ends in ``.A``
        or ``.B``.
    """
    trained = {short_name(n): p for n, p in network.named_parameters() if p.requires_grad and p.ndim > 1}
    gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
    return _norms("layers/weight_norm/", trained) | _norms("layers/gradient_norm/", gradients)


def short_name(name: str) -> str:
    """``blocks.0.attention.q_proj.A`` for ``blocks.0.attention.q_proj.lora_A.default.weight``."""
    return PEFT_NAMES.sub("", name)


def _norms(prefix: str, tensors: dict[str, Tensor] | dict[str, nn.Parameter]) -> dict[str, float]:
    if not tensors:
        return {}
    with torch.no_grad():
        norms = torch.stack([tensor.float().norm() for tensor in tensors.values()]).tolist()
    return {prefix + name: norm for name, norm in zip(tensors, norms, strict=True)}
