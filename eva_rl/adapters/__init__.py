"""PEFT adapters on policies, initialised by the EVA engine."""

from eva_rl.adapters.attach import AttachedAdapter, attach_adapter, base_weights, count_parameters
from eva_rl.adapters.eva_init import SOURCES, Rollouts, compute_eva, second_moments
from eva_rl.adapters.extensions import ADAPTER_NAME, initial_rank
from eva_rl.adapters.folders import adapter_bytes, find_adapter, load_policy, save_adapted_policy
from eva_rl.adapters.layers import PROJECTIONS, rank_limits, target_layers
from eva_rl.adapters.methods import DIRECTIONS, GRADIENTS, METHODS, MOMENTS, Method, find_method
from eva_rl.adapters.refresh import Refresh, refresh_directions, subspace_overlap
from eva_rl.adapters.switching import AdaptedPolicy, Adapters

__all__ = [
    "ADAPTER_NAME",
    "DIRECTIONS",
    "GRADIENTS",
    "METHODS",
    "MOMENTS",
    "PROJECTIONS",
    "SOURCES",
    "AdaptedPolicy",
    "Adapters",
    "AttachedAdapter",
    "Method",
    "Refresh",
    "Rollouts",
    "adapter_bytes",
    "attach_adapter",
    "base_weights",
    "compute_eva",
    "count_parameters",
    "find_adapter",
    "find_method",
    "initial_rank",
    "load_policy",
    "rank_limits",
    "refresh_directions",
    "save_adapted_policy",
    "second_moments",
    "subspace_overlap",
    "target_layers",
]
