"""AdaLoRA's part in the training loop: its budget, its regulariser, and what a resumed run needs of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

ADAPTER_NAME = "default"
ORTHOGONALITY = 0.1
"""Weight of AdaLoRA's regulariser, gamma in the paper's equation 4 (arXiv 2303.10512)."""
_STATISTICS = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def initial_rank(rank: int) -> int:
    """Rank that each layer begins with, for AdaLoRA to prune to ``rank`` on average: half as much again."""
    return rank + (rank + 1) // 2


def schedule(total_updates: int) -> dict[str, int]:
    """AdaLoRA's phases: a tenth to warm up, pruning, and the last half with fixed ranks.

    Args:
        total_updates: Gradient steps of the whole training.
    """
    total = max(total_updates, 3)
    return {"total_step": total, "tinit": total // 10, "tfinal": total // 2, "deltaT": max(1, total // 100)}


class AdaLoraExtension:
    """Prunes after each gradient step, and keeps its directions orthogonal.

    PEFT adds the regulariser only to models that compute their own loss; ours do not, so it is added here.

    Args:
        model: PEFT's model with an AdaLoRA adapter.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = model

    def penalty(self) -> Tensor:
        """ORTHOGONALITY times the mean squared distance of A A^T and B^T B from the identity, over all layers."""
        distances = []
        for name, parameter in self._model.named_parameters():
            if f"lora_A.{ADAPTER_NAME}" in name or f"lora_B.{ADAPTER_NAME}" in name:
                gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
                distances.append((gram - torch.eye(len(gram), device=gram.device)).norm())
        return ORTHOGONALITY * torch.stack(distances).mean()

    def after_step(self, update: int) -> None:
        """Prune according to AdaLoRA's schedule; the gradients of gradient step ``update`` are still there."""
        self._model.base_model.update_and_allocate(update)

    def tensors(self) -> dict[str, Tensor]:
        """Importance statistics, and which ranks are kept, for a checkpoint."""
        allocator = self._model.base_model.rankallocator
        state = {f"{kind}/{name}": value for kind in _STATISTICS for name, value in getattr(allocator, kind).items()}
        kept: Mapping[str, Any] = self._config.rank_pattern or {}
        return state | {f"kept/{name}": torch.tensor(value) for name, value in kept.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`tensors` gave."""
        allocator = self._model.base_model.rankallocator
        groups: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*_STATISTICS, "kept")}
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            groups[kind][name] = value
        for kind in _STATISTICS:
            setattr(allocator, kind, groups[kind])
        self._config.rank_pattern = {name: value.tolist() for name, value in groups["kept"].items()} or None

    @property
    def _config(self) -> Any:
        return self._model.peft_config[ADAPTER_NAME]
