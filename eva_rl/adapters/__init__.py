"""Adapters on policies: PEFT's, aimed by the EVA engine."""

from eva_rl.adapters.adalora import initial_rank
from eva_rl.adapters.attach import (
    PROJECTIONS,
    AttachedAdapter,
    attach_adapter,
    base_weights,
    count_parameters,
    find_method,
    target_layers,
)
from eva_rl.adapters.folders import load_policy, save_adapted_policy
from eva_rl.adapters.measuring import SOURCES, Rollouts, measure
from eva_rl.adapters.methods import METHODS, Method

__all__ = [
    "METHODS",
    "PROJECTIONS",
    "SOURCES",
    "AttachedAdapter",
    "Method",
    "Rollouts",
    "attach_adapter",
    "base_weights",
    "count_parameters",
    "find_method",
    "initial_rank",
    "load_policy",
    "measure",
    "save_adapted_policy",
    "target_layers",
]
