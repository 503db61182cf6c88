"""One message for whatever goes wrong in an environment: which environment, which step, and why."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from eva_rl.envs.deadline import Deadline
from eva_rl.errors import ActionNotFiniteError, EnvironmentFailedError, UserError

log = logging.getLogger(__name__)
Step = tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]


class CheckedEnv(gym.Wrapper[NDArray[np.float32], NDArray[np.float32], Any, Any]):
    """Checks what goes into an environment and what comes out of it.

    Actions are handed on in the shape and dtype of the environment's own space, as copies that an environment may keep.
    Observations come out as float32.

    Args:
        env: With Box observations of one dimension and Box actions.
        env_id: Its name, for messages.
    """

    def __init__(self, env: gym.Env[Any, Any], env_id: str) -> None:
        super().__init__(env)
        assert isinstance(env.action_space, spaces.Box)
        assert isinstance(env.observation_space, spaces.Box)
        self._env_id, self._step, self._seed = env_id, 0, -1
        self._native, self._num_actions = env.action_space, int(np.prod(env.action_space.shape))
        self._shape = env.observation_space.shape
        bounds = (self._native.low, self._native.high)
        pairs = [(bound.astype(np.float32), bound) for bound in bounds]
        self._rounded = [(rounded, bound) for rounded, bound in pairs if (rounded != bound).any()]
        low, high = (np.asarray(bound, np.float32).reshape(-1) for bound in (self._native.low, self._native.high))
        self.action_space = spaces.Box(low, high, (self._num_actions,), np.float32)
        with np.errstate(over="ignore"):  # a bound beyond float32 is infinite
            self.observation_space = spaces.Box(-np.inf, np.inf, self._shape, np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode.

        Raises:
            EnvironmentFailedError: The environment raised, or gave something that is no observation.
        """
        self._step, self._seed = 0, -1 if seed is None else seed
        with self._failures("reset()"):
            result = self.env.reset(seed=seed, options=options)
        observation, info = self._parts(result, 2, "reset()")
        return self._observation(observation), self._info(info)

    def step(self, action: NDArray[np.float32]) -> Step:
        """Advance one env step.

        Raises:
            EnvironmentFailedError: The action is not finite; the environment raised, or gave an observation or a
                reward of another shape or type than it should, or one that is not finite.
        """
        given = self._action(action)
        self._step += 1
        with self._failures("step()"):
            result = self.env.step(given)
        observation, reward, terminated, truncated, info = self._parts(result, 5, "step()")
        return (
            self._observation(observation),
            self._reward(reward),
            self._flag(terminated, "terminated"),
            self._flag(truncated, "truncated"),
            self._info(info),
        )

    def close(self) -> None:
        """Close the environment; what goes wrong there spoils nothing, and is logged."""
        try:
            with self._failures("close()"):
                self.env.close()
        except EnvironmentFailedError as error:
            log.warning("%s", error)

    def _action(self, action: NDArray[np.float32]) -> NDArray[Any]:
        action = np.asarray(action)
        if action.size != self._num_actions:
            raise self._error(f"the action has {action.size} numbers, its action space {self._native} has other ones")
        if not np.isfinite(action).all():
            raise ActionNotFiniteError(*self._error(f"the policy's action is not finite: {action}").args)
        return self._unrounded(action.reshape(self._native.shape).astype(self._native.dtype))

    def _unrounded(self, action: NDArray[Any]) -> NDArray[Any]:
        """A bound that float32 rounded is the space's own again: 0.4 becomes 0.40000001, which lies outside."""
        for rounded, bound in self._rounded:
            action = np.where(action == rounded, bound, action)
        return action

    @contextmanager
    def _failures(self, call: str) -> Iterator[None]:
        try:
            with Deadline(self._error, call):
                yield
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # foreign code may raise anything, and call sys.exit()
            raise self._error(f"{call} raised {type(error).__name__}: {error}") from error

    def _parts(self, result: Any, count: int, call: str) -> tuple[Any, ...]:
        if not isinstance(result, tuple) or len(result) != count:
            given = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
            raise self._error(f"{call} returned {given}, Gymnasium's interface asks for a tuple of {count}")
        return result

    def _observation(self, observation: Any) -> NDArray[np.float32]:
        row = self._floats(observation, "an observation")
        if row.shape != self._shape:
            raise self._error(f"an observation has shape {row.shape}, its observation space {self._shape}")
        if not np.isfinite(row).all():
            raise self._error(f"an observation is not finite (number {int(np.flatnonzero(~np.isfinite(row))[0])})")
        return row

    def _floats(self, value: Any, what: str) -> NDArray[np.float32]:
        with self._failures(f"reading {what}"):
            array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise self._error(f"{what} is of type {array.dtype}, not of numbers")
        with np.errstate(over="ignore"):  # becomes infinite, which is found
            return array.astype(np.float32)

    def _reward(self, reward: Any) -> float:
        array = self._floats(reward, "a reward")
        if array.size != 1:
            raise self._error(f"a reward has shape {array.shape}, not one number")
        if not np.isfinite(array).all():
            raise self._error(f"a reward is not finite: {reward}")
        return float(np.asarray(reward).reshape(()))

    def _flag(self, value: Any, name: str) -> bool:
        if np.size(value) != 1 or np.asarray(value).dtype.kind not in "biuf":
            raise self._error(f"{name} is {value!r}, not true or false")
        return bool(value)

    def _info(self, info: Any) -> dict[str, Any]:
        if not isinstance(info, dict):
            raise self._error(f"info is of type {type(info).__name__}, not a dictionary")
        return info

    def _error(self, cause: str) -> EnvironmentFailedError:
        where = f"in env step {self._step}" if self._step else "at the start"
        return EnvironmentFailedError(self._env_id, f"{where} of the episode seeded {self._seed}", cause)


class StopAtSuccess(gym.Wrapper[Any, Any, Any, Any]):
    """Terminates an episode at its first success."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Advance one env step; a success is for good."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        solved = bool(success_of(info))
        return observation, reward, terminated or solved, truncated and not solved, info


def success_of(info: dict[str, Any]) -> bool | None:
    """Whether a step's info tells success, under Stable-Baselines3's name or Meta-World's; None where it does not.

    NaN tells nothing.
    """
    value = info.get("is_success")
    value = info.get("success") if value is None else value
    if value is None:
        return None
    try:
        value = np.asarray(value.cpu() if hasattr(value, "cpu") else value)  # tensors of simulators on a GPU
    except (RuntimeError, TypeError, ValueError):
        return None
    if value.dtype.kind not in "biuf" or np.isnan(value).any():
        return None
    return bool(value.any())
