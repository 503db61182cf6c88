"""Fine-tune pretrained Decision Transformer policies with adapters initialised with Explained Variance Adaptation.

Its functions are imported when first used, so that ``import eva_rl`` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from eva_rl._version import __version__

if TYPE_CHECKING:
    from eva_rl.adapters import attach_adapter, attach_eva, load_policy
    from eva_rl.data import load_dataset
    from eva_rl.finetune.call import finetune_policy
    from eva_rl.rollouts.evaluation import evaluate_policy

_HOMES = {
    "attach_adapter": "eva_rl.adapters",
    "attach_eva": "eva_rl.adapters",
    "evaluate_policy": "eva_rl.rollouts.evaluation",
    "finetune_policy": "eva_rl.finetune.call",
    "load_dataset": "eva_rl.data",
    "load_policy": "eva_rl.adapters",
}

__all__ = [
    "__version__",
    "attach_adapter",
    "attach_eva",
    "evaluate_policy",
    "finetune_policy",
    "load_dataset",
    "load_policy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'eva_rl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
