"""What an environment knows about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EnvSpec:
    """Everything that the rest of the package needs to know of a task before making it.

    Attributes:
        env_id: Canonical name, for instance ``metaworld/push-v3`` or ``Hopper-v5``.
        observation_dim: Numbers in one (flat) observation.
        action_dim: Numbers in one action.
        action_low: Lower bound of each action dimension, (action_dim,).
        action_high: Upper bound of each action dimension, (action_dim,).
        horizon: Env steps after which an episode is truncated.
        reports_success: Whether ``info["is_success"]`` is meaningful.
        protocol: One line that says how episodes are evaluated.
    """

    env_id: str
    observation_dim: int
    action_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    horizon: int
    reports_success: bool
    protocol: str
