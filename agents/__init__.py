"""Policies: the Decision Transformer, its folders on disk and its memory while it acts."""

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
