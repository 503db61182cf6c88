"""Vectorised environments whose episodes are numbered, so that episode n is the same with any number of envs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from eva_rl.envs.registry import canonical_id, make_env
from eva_rl.errors import UserError


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


def make_vec_env(
    name: str,
    num_envs: int,
    *,
    seed: int = 0,
    horizon: int | None = None,
    workers: int = 0,
    stride: int | None = None,
) -> VecEnv:
    """Make a Stable-Baselines3 vectorised environment with distinct, reproducible episodes.

    The k-th episode of environment i is seeded ``seed + i + k * num_envs``: on Meta-World every episode has its own
    goal. ``vec_env.seed(s)`` before ``vec_env.reset()`` starts the list again at ``s``.

    Args:
        name: Any name that :func:`eva_rl.envs.canonical_id` takes.
        num_envs: Number of environments.
        seed: Seed of the first episode.
        horizon: Env steps after which an episode is truncated; None takes the task's own.
        workers: 0 steps all environments in this process, anything else gives each its own.
        stride: Distance between the seeds of two successive episodes of an environment; None takes their number.

    Raises:
        UserError: No such task, or ``num_envs`` is not positive.
    """
    if num_envs < 1:
        raise UserError(f"num_envs={num_envs}: expected at least 1.")
    env_id = canonical_id(name)
    makers: list[Callable[[], gym.Env[Any, Any]]] = [
        partial(_numbered, env_id, horizon, seed + i, stride or num_envs) for i in range(num_envs)
    ]
    return SubprocVecEnv(makers, start_method="forkserver") if workers else DummyVecEnv(makers)


def close_vec_env(vec_env: VecEnv) -> None:
    """Close environments, the worker processes that are left with them where one has died."""
    try:
        vec_env.close()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        for process in getattr(vec_env, "processes", ()):
            process.terminate()
            process.join()


def _numbered(env_id: str, horizon: int | None, first: int, stride: int) -> gym.Env[Any, Any]:
    return NumberedEpisodes(make_env(env_id, horizon=horizon), first, stride)


def make_task_vec_env(names: Sequence[str], *, seed: int = 0, stride: int | None = None) -> VecEnv:
    """Make one environment per task, all in this process, each with its own numbered episodes.

    Args:
        names: Tasks with equal observation and action dimensions.
        seed: Seed of the first episode of the first environment; environment i starts at ``seed + i``.
        stride: Distance between the seeds of two successive episodes of an environment; None takes their number.
    """
    makers: list[Callable[[], gym.Env[Any, Any]]] = [
        partial(_numbered, canonical_id(name), None, seed + i, stride or len(names)) for i, name in enumerate(names)
    ]
    return DummyVecEnv(makers)
