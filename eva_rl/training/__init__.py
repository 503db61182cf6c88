"""Training loops."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eva_rl.lazy import lazy_names

if TYPE_CHECKING:
    from eva_rl.training.bc import train_bc
    from eva_rl.training.checkpoint import Checkpoints
    from eva_rl.training.losses import clone_loss
    from eva_rl.training.options import BCOptions

__all__ = [
    "BCOptions",
    "Checkpoints",
    "clone_loss",
    "train_bc",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BCOptions": "eva_rl.training.options",
        "Checkpoints": "eva_rl.training.checkpoint",
        "clone_loss": "eva_rl.training.losses",
        "train_bc": "eva_rl.training.bc",
    },
)
