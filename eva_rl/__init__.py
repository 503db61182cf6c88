"""Fine-tune pretrained Decision Transformer policies with adapters initialised with Explained Variance Adaptation.

Its functions and packages are imported when first used, so that ``import eva_rl`` stays quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eva_rl._version import __version__
from eva_rl.lazy import lazy_names

if TYPE_CHECKING:
    from eva_rl.adapters import attach_adapter, attach_eva, load_policy
    from eva_rl.data import load_dataset
    from eva_rl.finetune.call import finetune_policy
    from eva_rl.rollouts.evaluation import evaluate_policy

__all__ = [
    "__version__",
    "attach_adapter",
    "attach_eva",
    "evaluate_policy",
    "finetune_policy",
    "load_dataset",
    "load_policy",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "attach_adapter": "eva_rl.adapters",
        "attach_eva": "eva_rl.adapters",
        "evaluate_policy": "eva_rl.rollouts.evaluation",
        "finetune_policy": "eva_rl.finetune.call",
        "load_dataset": "eva_rl.data",
        "load_policy": "eva_rl.adapters",
    }
    | {name: f"{__name__}.{name}" for name in ("adapters", "agents", "data", "envs", "eva", "rollouts")},
)
