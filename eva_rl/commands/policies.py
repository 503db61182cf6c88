"""The policy that a command starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from eva_rl.adapters import load_policy
from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.agents.imports import ImportOptions
from eva_rl.commands.options import PolicyOptions

AUTO = "auto"
SHIPPED_FOR = {"Hopper-v5": "hopper", "Hopper-v4": "hopper"}
DEFAULT = "mt40"


def resolve_policy(options: PolicyOptions, env_id: str) -> PolicyOptions:
    """The options with ``auto`` replaced by the shipped policy for a task."""
    if options.path != AUTO:
        return options
    return replace(options, path=SHIPPED_FOR.get(env_id, DEFAULT))


def open_policy(
    options: PolicyOptions,
    device: torch.device,
    *,
    merge: bool = False,
    adapters: Mapping[str, str] | None = None,
) -> DecisionTransformerPolicy:
    """Load the policy that the options name; ``merge`` folds its adapter into its weights, ``adapters`` brings more.

    Raises:
        UserError: See :func:`eva_rl.adapters.load_policy`.
    """
    imported = ImportOptions(
        context_length=options.context_length, target_return=options.target_return, allow_pickle=options.allow_pickle
    )
    return load_policy(options.path, device, imported, merge=merge, adapters=adapters)
