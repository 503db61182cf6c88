"""Training loops."""

from eva_rl.training.bc import BCOptions, train_bc
from eva_rl.training.losses import clone_loss

__all__ = ["BCOptions", "clone_loss", "train_bc"]
