"""Policies: the Decision Transformer, its folders on disk and its memory while it acts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eva_rl.lazy import lazy_names

if TYPE_CHECKING:
    from eva_rl.agents.decision_transformer import SIZES, DecisionTransformer, DecisionTransformerConfig
    from eva_rl.agents.huggingface import export_huggingface
    from eva_rl.agents.huggingface.options import ImportOptions
    from eva_rl.agents.policy import Conditioning, DecisionTransformerPolicy, Policy
    from eva_rl.agents.policy_folder import load_base_policy, read_policy, save_policy, shipped_policies
    from eva_rl.agents.sb3 import PredictAdapter

__all__ = [
    "SIZES",
    "Conditioning",
    "DecisionTransformer",
    "DecisionTransformerConfig",
    "DecisionTransformerPolicy",
    "ImportOptions",
    "Policy",
    "PredictAdapter",
    "export_huggingface",
    "load_base_policy",
    "read_policy",
    "save_policy",
    "shipped_policies",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Conditioning": "eva_rl.agents.policy",
        "DecisionTransformer": "eva_rl.agents.decision_transformer",
        "DecisionTransformerConfig": "eva_rl.agents.decision_transformer",
        "DecisionTransformerPolicy": "eva_rl.agents.policy",
        "ImportOptions": "eva_rl.agents.huggingface.options",
        "Policy": "eva_rl.agents.policy",
        "PredictAdapter": "eva_rl.agents.sb3",
        "SIZES": "eva_rl.agents.decision_transformer",
        "export_huggingface": "eva_rl.agents.huggingface",
        "load_base_policy": "eva_rl.agents.policy_folder",
        "read_policy": "eva_rl.agents.policy_folder",
        "save_policy": "eva_rl.agents.policy_folder",
        "shipped_policies": "eva_rl.agents.policy_folder",
    },
)
