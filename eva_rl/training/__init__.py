"""Training loops."""

from eva_rl.training.bc import BCOptions, clone_loss, train_bc

__all__ = ["BCOptions", "clone_loss", "train_bc"]
