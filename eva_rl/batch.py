"""The values that pass between data, policies and training: windows of steps and the scaling of what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


@dataclass(frozen=True)
class WindowBatch:
    """B windows of T env steps, scaled for the network, padded on the left.

    Attributes:
        observations: (B, T, obs).
        actions: (B, T, act), as executed; zero where padded.
        returns_to_go: (B, T, 1).
        timesteps: (B, T), int64 env steps since the start of the episode.
        attention_mask: (B, T), True where a step is real; None says that all are.
        rewards: (B, T, 1), for token orders with a reward token.
        target_actions: (B, T, act), what a clone should do; None says ``actions``.
    """

    observations: Tensor
    actions: Tensor
    returns_to_go: Tensor
    timesteps: Tensor
    attention_mask: Tensor | None = None
    rewards: Tensor | None = None
    target_actions: Tensor | None = None

    def to(self, device: torch.device | str) -> WindowBatch:
        """The same batch on a device."""
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        on_device: dict[str, Any] = {name: None if x is None else x.to(device) for name, x in moved.items()}
        return replace(self, **on_device)

    def __len__(self) -> int:
        return self.observations.shape[0]


@dataclass(frozen=True)
class InputScaling:
    """How raw numbers become what the network sees.

    Attributes:
        observation_mean: (obs,), subtracted from observations.
        observation_std: (obs,), divides them afterwards.
        return_scale: Divides returns-to-go and rewards.
        action_center: (act,), middle of the action bounds; the network's actions lie in [-1, 1].
        action_half_range: (act,), half the distance between the action bounds.
    """

    observation_mean: Tensor
    observation_std: Tensor
    return_scale: float
    action_center: Tensor
    action_half_range: Tensor

    @classmethod
    def create(
        cls,
        observation_mean: ArrayLike,
        observation_std: ArrayLike,
        return_scale: float,
        action_low: Sequence[float],
        action_high: Sequence[float],
    ) -> InputScaling:
        """Build from array-likes and action bounds."""
        low, high = np.asarray(action_low, np.float32), np.asarray(action_high, np.float32)
        return cls(
            observation_mean=torch.from_numpy(np.array(observation_mean, np.float32)),
            observation_std=torch.from_numpy(np.array(observation_std, np.float32)),
            return_scale=float(return_scale),
            action_center=torch.from_numpy((high + low) / 2),
            action_half_range=torch.from_numpy((high - low) / 2),
        )

    def to(self, device: torch.device | str) -> InputScaling:
        """The same scaling on a device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "return_scale"}
        return replace(self, **{name: x.to(device) for name, x in moved.items()})

    def observations(self, raw: Tensor) -> Tensor:
        """Normalise observations (..., obs)."""
        return (raw - self.observation_mean) / self.observation_std

    def actions(self, raw: Tensor) -> Tensor:
        """Bring actions (..., act) from the environment's bounds to [-1, 1]."""
        return (raw - self.action_center) / self.action_half_range

    def raw_actions(self, scaled: Tensor) -> Tensor:
        """Bring actions (..., act) from [-1, 1] to the environment's bounds."""
        return scaled * self.action_half_range + self.action_center
