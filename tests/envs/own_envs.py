"""Environments of a user, registered when this module is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np


class Point(gym.Env[Any, Any]):
    """A point on a line; it has arrived at ``goal`` when it is near. No time limit, no ``render_mode``."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)

    def __init__(self, goal: float = 1.0, key: str = "success", only_at_end: bool = False) -> None:
        self._goal, self._key, self._only_at_end = goal, key, only_at_end

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._x = float(self.np_random.uniform(-0.1, 0.1))
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._x += float(np.clip(action[0], -2, 2)) / 10
        arrived = abs(self._x - self._goal) < 0.1
        info = {} if self._only_at_end and not arrived else {self._key: arrived}
        return self._observation(), -abs(self._x - self._goal), arrived and self._only_at_end, False, info

    def _observation(self) -> Any:
        return np.array([self._x, self._goal])


class Needy(Point):
    """Cannot be made without an argument."""

    def __init__(self, must: int) -> None:
        super().__init__(float(must))


class Missing(Point):
    """Needs a file that is not there."""

    def __init__(self) -> None:
        raise FileNotFoundError("no robot.xml here")


class Blind(Point):
    """Says that it renders, and does not."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012 - as in gym.Env

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__()
        self.render_mode = render_mode


class Recorded(Point):
    """Writes to a file when it is made and when it is closed, as one that owns a simulator starts and ends it."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self._file = file
        self._write("made")

    def close(self) -> None:
        self._write("closed")

    def _write(self, word: str) -> None:
        with Path(self._file).open("a") as file:
            file.write(f"{word}\n")


class Fails(Point):
    """Fails in its first step."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        raise RuntimeError("the cable is off")


for cls in (Point, Needy, Missing, Blind, Recorded, Fails):
    gym.register(f"Own{cls.__name__}-v0", entry_point=cls)
gym.register("OwnScaled-v0", entry_point=lambda: gym.wrappers.NormalizeReward(Point()), max_episode_steps=30)
gym.register("OwnPoint-v2", entry_point=Point, max_episode_steps=30)
