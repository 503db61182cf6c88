"""Several environments in one process, and the arrays through which they are stepped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from eva_rl.envs.checked import success_of

Maker = Callable[[], gym.Env[Any, Any]]


@dataclass(frozen=True)
class StepArrays:
    """What n environments take and give, one row an environment; processes may share the memory.

    Attributes:
        actions: (n, act).
        observations: (n, obs), of the next episode where one has ended and another has begun.
        final_observations: (n, obs), the last of an episode that has ended.
        rewards: (n,).
        terminated: (n,).
        truncated: (n,).
        success: (n,), as the environment sees it at this step or at any step so far.
        success_now: (n,), as it sees it at this step.
        reports_success: (n,), whether its infos have told of success since it was made.
        seeds: (n,), of the current episode.
        next_seeds: (n,), of the next one.
        steps: (n,), begun in the current episode.
        busy: (n,), whether a call of the environment has not returned.
    """

    actions: NDArray[np.float32]
    observations: NDArray[np.float32]
    final_observations: NDArray[np.float32]
    rewards: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    success: NDArray[np.bool_]
    success_now: NDArray[np.bool_]
    reports_success: NDArray[np.bool_]
    seeds: NDArray[np.int64]
    next_seeds: NDArray[np.int64]
    steps: NDArray[np.int64]
    busy: NDArray[np.bool_]

    @staticmethod
    def layout(num_envs: int, observation_dim: int, action_dim: int) -> dict[str, tuple[tuple[int, ...], type[Any]]]:
        """Shape and dtype of each array."""
        n = num_envs
        flags = ("terminated", "truncated", "success", "success_now", "reports_success", "busy")
        return {
            "seeds": ((n,), np.int64),
            "next_seeds": ((n,), np.int64),
            "steps": ((n,), np.int64),
            "actions": ((n, action_dim), np.float32),
            "observations": ((n, observation_dim), np.float32),
            "final_observations": ((n, observation_dim), np.float32),
            "rewards": ((n,), np.float32),
            **{flag: ((n,), np.bool_) for flag in flags},
        }

    @classmethod
    def num_bytes(cls, *sizes: int) -> int:
        """Bytes that all arrays take."""
        return sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in cls.layout(*sizes).values())

    @classmethod
    def over(cls, memory: Any, *sizes: int) -> StepArrays:
        """The arrays in a buffer of :meth:`num_bytes`."""
        arrays, offset = {}, 0
        for name, (shape, kind) in cls.layout(*sizes).items():
            arrays[name] = np.ndarray(shape, kind, memory, offset)
            offset += arrays[name].nbytes
        return cls(**arrays)


class EnvHost:
    """Makes, resets and steps some of the environments behind the arrays.

    Args:
        arrays: Of all environments.
        makers: The environments of this host, by their row.
        stride: Distance between the seeds of two successive episodes of an environment.
    """

    def __init__(self, arrays: StepArrays, makers: dict[int, Maker], stride: int) -> None:
        self._arrays, self._stride = arrays, stride
        self.envs = {row: make() for row, make in makers.items()}

    def reset(self, rows: Sequence[int]) -> None:
        """Begin the next episode of some environments."""
        arrays = self._arrays
        for row in rows:
            seed = int(arrays.next_seeds[row])
            arrays.seeds[row], arrays.next_seeds[row] = seed, seed + self._stride
            arrays.steps[row], arrays.busy[row] = 0, True
            observation, info = self.envs[row].reset(seed=seed)
            arrays.busy[row], arrays.observations[row] = False, observation
            arrays.success[row] = arrays.success_now[row] = False
            arrays.reports_success[row] |= success_of(info) is not None

    def step(self, rows: Sequence[int], autoreset: bool) -> None:
        """Advance some environments by one env step; where an episode ends, begin the next one if asked to."""
        for row in rows:
            if self._step(row) and autoreset:
                self._arrays.final_observations[row] = self._arrays.observations[row]
                success, now = self._arrays.success[row], self._arrays.success_now[row]
                self.reset([row])
                self._arrays.success[row], self._arrays.success_now[row] = success, now

    def _step(self, row: int) -> bool:
        arrays = self._arrays
        arrays.steps[row], arrays.busy[row] = arrays.steps[row] + 1, True
        observation, reward, terminated, truncated, info = self.envs[row].step(arrays.actions[row])
        arrays.busy[row], arrays.observations[row], arrays.rewards[row] = False, observation, reward
        arrays.terminated[row], arrays.truncated[row] = terminated, truncated
        success = success_of(info)
        if success is not None:
            arrays.reports_success[row] = True
            arrays.success[row] |= success
            now = info.get("success_now", success)
            arrays.success_now[row] = now if np.ndim(now) == 0 else success  # an array is somebody else's
        return bool(terminated or truncated)

    def call(self, row: int, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of an environment."""
        return self.envs[row].get_wrapper_attr(name)(*args, **kwargs)

    def attribute(self, row: int, name: str) -> Any:
        """An attribute of an environment."""
        return self.envs[row].get_wrapper_attr(name)

    def set_attribute(self, row: int, name: str, value: Any) -> None:
        """Set an attribute of an environment."""
        self.envs[row].set_wrapper_attr(name, value)

    def is_wrapped(self, row: int, kind: type) -> bool:
        """Whether one of an environment's wrappers is of this class."""
        layer: Any = self.envs[row]
        while layer is not None and not isinstance(layer, kind):
            layer = getattr(layer, "env", None)
        return layer is not None

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs.values():
            env.close()
