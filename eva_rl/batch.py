"""The values that pass between data, policies and training: windows of steps and the scaling of what is in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
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

    def tensors(self) -> dict[str, Tensor]:
        """Those tensors that there are, by name."""
        found: dict[str, Tensor | None] = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: x for name, x in found.items() if x is not None}

    def __len__(self) -> int:
        return self.observations.shape[0]


@dataclass(frozen=True)
class NStepBatch:
    """B transitions of up to n env steps, scaled for the network.

    Attributes:
        observations: (B, obs).
        actions: (B, act), as executed.
        extras: What was kept beside each env step (B, width), by name.
        returns: (B,), discounted sum of the rewards of the steps between, unscaled.
        discounts: (B,), what the value of the last observation is multiplied by; 0 where the episode was over.
        next_observations: (B, obs), n env steps later, or as many as there are.
        next_extras: What was kept beside that step.
        following_observations: (B, obs), one env step later.
        solved: (B,), True in an episode that solved the task.
    """

    observations: Tensor
    actions: Tensor
    extras: Mapping[str, Tensor]
    returns: Tensor
    discounts: Tensor
    next_observations: Tensor
    next_extras: Mapping[str, Tensor]
    following_observations: Tensor
    solved: Tensor

    @classmethod
    def joined(cls, parts: Sequence[NStepBatch]) -> NStepBatch:
        """Several batches as one."""
        return cls(**{f.name: _joined([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    def to(self, device: torch.device | str) -> NStepBatch:
        """The same batch on a device."""
        return type(self)(**{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        found: dict[str, Tensor] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            found |= {f.name: value} if isinstance(value, Tensor) else {f"{f.name}/{k}": x for k, x in value.items()}
        return found


def _joined(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    return {name: torch.cat([value[name] for value in values]) for name in values[0]}


def _moved(value: Any, device: torch.device | str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else {name: x.to(device) for name, x in value.items()}


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
        center, half = within_bounds(low, high)
        return cls(
            observation_mean=torch.from_numpy(np.array(observation_mean, np.float32)),
            observation_std=torch.from_numpy(np.array(observation_std, np.float32)),
            return_scale=float(return_scale),
            action_center=torch.from_numpy(center),
            action_half_range=torch.from_numpy(half),
        )

    def to(self, device: torch.device | str) -> InputScaling:
        """The same scaling on a device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "return_scale"}
        return replace(self, **{name: x.to(device) for name, x in moved.items()})

    @property
    def action_divisor(self) -> Tensor:
        """(act,), what centred actions are divided by: 1 where the action bounds are equal."""
        return self.action_half_range.where(self.action_half_range > 0, 1.0)

    def observations(self, raw: Tensor) -> Tensor:
        """Normalise observations (..., obs)."""
        return (raw - self.observation_mean) / self.observation_std

    def actions(self, raw: Tensor) -> Tensor:
        """Bring actions (..., act) from the environment's bounds to [-1, 1]; to 0 where these leave no choice."""
        return (raw - self.action_center) / self.action_divisor

    def raw_actions(self, scaled: Tensor) -> Tensor:
        """Bring actions (..., act) from [-1, 1] to the environment's bounds."""
        return scaled * self.action_half_range + self.action_center


def within_bounds(
    low: NDArray[np.float32], high: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Middle and half the distance of action bounds, (act,) each, whose sum and difference lie within the bounds.

    Rounded alone, the bounds -1 and 0.7 give 0.70000005. From sum and difference the same two are found again, so that
    a policy that is saved and loaded stays the same.
    """
    while True:
        center, half = (high + low) * np.float32(0.5), (high - low) * np.float32(0.5)
        if not np.isfinite(half).all():
            return center, half
        while (outside := (half > 0) & ((center + half > high) | (center - half < low))).any():
            half = np.where(outside, np.nextafter(half, np.float32(0)), half)
        if np.array_equal(center - half, low) and np.array_equal(center + half, high):
            return center, half
        low, high = center - half, center + half


@dataclass(frozen=True)
class TransitionWindows:
    """Windows of T env steps whose successive steps are transitions.

    Attributes:
        windows: B windows; the last step of one may be the observation after an episode's end, with zeros for its
            action.
        rewards: (B, T), unscaled, of the env step taken in each observation.
        terminated: (B, T), True where that step ended the episode for good.
        returns: (B, T), discounted sum of the rewards that were obtained from each step on.
        acted: (B, T), True where the step is real and an action was taken in it.
        valid: (B, T - 1), True where a step and its successor are both in the window.
        complete: (B, 1), False for windows of an episode that was broken off: its returns are not those that would have
            been obtained.
    """

    windows: WindowBatch
    rewards: Tensor
    terminated: Tensor
    returns: Tensor
    acted: Tensor
    valid: Tensor
    complete: Tensor

    def to(self, device: torch.device | str) -> TransitionWindows:
        """The same windows on a device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return TransitionWindows(**moved)
