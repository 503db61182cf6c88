"""Fine-tune pretrained Decision Transformer policies with adapters aimed by Explained Variance Adaptation."""

from eva_rl._version import __version__

__all__ = ["__version__"]
