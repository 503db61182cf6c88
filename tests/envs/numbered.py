"""An environment whose episodes are numbered, for Stable-Baselines3's own vectorised environments."""

from __future__ import annotations

from typing import Any

import gymnasium as gym


class NumberedEpisodes(gym.Wrapper[Any, Any, Any, Any]):
    """Seeds its k-th episode with ``first + k * stride``.

    Environment i of n, with ``first = seed + i`` and ``stride = n``, plays the episodes i, i + n, i + 2n, ... of one
    common list, so the list of episodes does not depend on n.

    Args:
        env: The environment.
        first: Seed of the first episode.
        stride: Distance between the seeds of two successive episodes.
    """

    def __init__(self, env: gym.Env[Any, Any], first: int, stride: int) -> None:
        super().__init__(env)
        self._next = first
        self._stride = stride

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start the episode numbered ``seed``, or the next one when None."""
        number = self._next if seed is None else seed
        self._next = number + self._stride
        observation, info = self.env.reset(seed=number, options=options)
        return observation, info | {"episode_seed": number}
