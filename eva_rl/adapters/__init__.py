"""PEFT adapters on policies, initialised by the EVA engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eva_rl.lazy import lazy_names

if TYPE_CHECKING:
    from eva_rl.adapters.anywhere import attach_eva, targeted_layers
    from eva_rl.adapters.attach import AttachedAdapter, attach_adapter, base_weights, count_parameters
    from eva_rl.adapters.eva_init import Rollouts, compute_eva, input_moments, second_moments
    from eva_rl.adapters.extensions import ADAPTER_NAME, initial_rank
    from eva_rl.adapters.folders import adapter_bytes, load_policy, save_adapted_policy
    from eva_rl.adapters.gain import LayerStart, measure_start, rotate, set_gain
    from eva_rl.adapters.layers import rank_limits, target_layers
    from eva_rl.adapters.methods import (
        DIRECTIONS,
        GRADIENTS,
        METHODS,
        MOMENTS,
        PROJECTIONS,
        SOURCES,
        Method,
        check_gain,
        find_method,
    )
    from eva_rl.adapters.refresh import Refresh, refresh_directions, subspace_overlap
    from eva_rl.adapters.switching import AdaptedPolicy, Adapters
    from eva_rl.adapters.validation import find_adapter

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
    "LayerStart",
    "Method",
    "Refresh",
    "Rollouts",
    "adapter_bytes",
    "attach_adapter",
    "attach_eva",
    "base_weights",
    "check_gain",
    "compute_eva",
    "count_parameters",
    "find_adapter",
    "find_method",
    "initial_rank",
    "input_moments",
    "load_policy",
    "measure_start",
    "rank_limits",
    "refresh_directions",
    "rotate",
    "save_adapted_policy",
    "second_moments",
    "set_gain",
    "subspace_overlap",
    "target_layers",
    "targeted_layers",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ADAPTER_NAME": "eva_rl.adapters.extensions",
        "AdaptedPolicy": "eva_rl.adapters.switching",
        "Adapters": "eva_rl.adapters.switching",
        "AttachedAdapter": "eva_rl.adapters.attach",
        "DIRECTIONS": "eva_rl.adapters.methods",
        "GRADIENTS": "eva_rl.adapters.methods",
        "LayerStart": "eva_rl.adapters.gain",
        "METHODS": "eva_rl.adapters.methods",
        "MOMENTS": "eva_rl.adapters.methods",
        "Method": "eva_rl.adapters.methods",
        "PROJECTIONS": "eva_rl.adapters.methods",
        "Refresh": "eva_rl.adapters.refresh",
        "Rollouts": "eva_rl.adapters.eva_init",
        "SOURCES": "eva_rl.adapters.methods",
        "adapter_bytes": "eva_rl.adapters.folders",
        "attach_adapter": "eva_rl.adapters.attach",
        "attach_eva": "eva_rl.adapters.anywhere",
        "base_weights": "eva_rl.adapters.attach",
        "check_gain": "eva_rl.adapters.methods",
        "compute_eva": "eva_rl.adapters.eva_init",
        "count_parameters": "eva_rl.adapters.attach",
        "find_adapter": "eva_rl.adapters.validation",
        "find_method": "eva_rl.adapters.methods",
        "initial_rank": "eva_rl.adapters.extensions",
        "input_moments": "eva_rl.adapters.eva_init",
        "load_policy": "eva_rl.adapters.folders",
        "measure_start": "eva_rl.adapters.gain",
        "rank_limits": "eva_rl.adapters.layers",
        "refresh_directions": "eva_rl.adapters.refresh",
        "rotate": "eva_rl.adapters.gain",
        "save_adapted_policy": "eva_rl.adapters.folders",
        "second_moments": "eva_rl.adapters.eva_init",
        "set_gain": "eva_rl.adapters.gain",
        "subspace_overlap": "eva_rl.adapters.refresh",
        "targeted_layers": "eva_rl.adapters.anywhere",
        "target_layers": "eva_rl.adapters.layers",
    },
)
