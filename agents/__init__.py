"""Policies: the Decision Transformer, its folders on disk and its memory while it acts."""

from eva_rl.agents.checkpoint import load_policy, read_policy, save_policy, shipped_policies
from eva_rl.agents.decision_transformer import DecisionTransformer, DecisionTransformerConfig
from eva_rl.agents.policy import Conditioning, DecisionTransformerPolicy, Policy

__all__ = [
    "Conditioning",
    "DecisionTransformer",
    "DecisionTransformerConfig",
    "DecisionTransformerPolicy",
    "Policy",
    "load_policy",
    "read_policy",
    "save_policy",
    "shipped_policies",
]
