"""Policies: the Decision Transformer, its folders on disk and its memory while it acts."""

from eva_rl.agents.checkpoint import load_policy, read_policy, save_policy, shipped_policies
from eva_rl.agents.decision_transformer import DecisionTransformer, DecisionTransformerConfig
from eva_rl.agents.huggingface import export_huggingface
from eva_rl.agents.imports import ImportOptions
from eva_rl.agents.policy import Conditioning, DecisionTransformerPolicy, Policy
from eva_rl.agents.sb3 import PredictAdapter
from eva_rl.agents.sizes import SIZES

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
    "load_policy",
    "read_policy",
    "save_policy",
    "shipped_policies",
]
