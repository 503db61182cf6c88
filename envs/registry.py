"""Names of tasks: canonical, short and outdated ones, and what they stand for."""

from __future__ import annotations

import logging
import re
import warnings
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from eva_rl.envs.names import (
    METAWORLD_PREFIX,
    METAWORLD_TASKS,
    MUJOCO_PREFIX,
    MUJOCO_TASKS,
    MUJOCO_VERSION,
    TASK_SETS,
    task_list,
)
from eva_rl.envs.spec import EnvSpec
from eva_rl.errors import UnknownNameError, UserError

log = logging.getLogger(__name__)

DEFAULT_HORIZON = 1000


@cache
def canonical_id(name: str) -> str:
    """Resolve a task name as a user may type it.

    Args:
        name: ``metaworld/push-v3``, ``push-v3``, ``push``, ``push-v2`` (mapped to v3, with a message),
            ``mujoco/hopper``, ``mujoco/hopper-v4``, or any registered Gymnasium id such as ``Hopper-v5``.

    Returns:
        ``metaworld/<task>-v3`` or a Gymnasium id.

    Raises:
        UnknownNameError: No such task; the message lists close matches.
    """
    if name in gym.registry:
        return name
    resolved = _mujoco_id(name) if name.startswith(MUJOCO_PREFIX) else _metaworld_id(name)
    if resolved is None:
        known = [
            *task_list(),
            *(MUJOCO_PREFIX + task for task in MUJOCO_TASKS),
            *(task.removeprefix(METAWORLD_PREFIX) for task in METAWORLD_TASKS),
        ]
        raise UnknownNameError("env", name, [*known, *gym.registry], "`eva-rl finetune --help` lists the tasks.")
    return resolved


def _metaworld_id(name: str) -> str | None:
    task = name.removeprefix(METAWORLD_PREFIX)
    base = re.sub(r"-v[123]$", "", task)
    resolved = f"{METAWORLD_PREFIX}{base}-v3"
    if resolved not in METAWORLD_TASKS:
        return None
    if task != base and not task.endswith("-v3"):
        log.warning("%s: only Meta-World's v3 tasks exist; using %s.", name, resolved)
    return resolved


def _mujoco_id(name: str) -> str | None:
    base, _, version = name.removeprefix(MUJOCO_PREFIX).lower().partition("-")
    if base not in MUJOCO_TASKS:
        return None
    resolved = f"{MUJOCO_TASKS[base]}-{version or MUJOCO_VERSION}"
    return resolved if resolved in gym.registry else None


def make_env(name: str, *, horizon: int | None = None, render_mode: str | None = None) -> gym.Env[Any, Any]:
    """Make one environment; ``reset(seed=)`` determines the whole episode.

    Args:
        name: Any name that :func:`canonical_id` takes.
        horizon: Env steps after which an episode is truncated; None takes the task's own.
        render_mode: Gymnasium's render mode, or None.

    Raises:
        UnknownNameError: No such task.
        UserError: The environment cannot be made, or its spaces are not flat boxes.
    """
    env_id = canonical_id(name)
    if env_id.startswith(METAWORLD_PREFIX):
        from eva_rl.envs import metaworld

        return metaworld.MetaWorldTask(env_id, horizon or metaworld.HORIZON, render_mode)
    try:
        env = gym.make(env_id, max_episode_steps=horizon, render_mode=render_mode)
    except (gym.error.Error, ImportError) as error:
        raise UserError(
            f"The environment {env_id!r} could not be made: {error} Install what it needs, or name another env."
        ) from error
    return _flat(env, env_id)


def _flat(env: gym.Env[Any, Any], env_id: str) -> gym.Env[Any, Any]:
    if isinstance(env.observation_space, spaces.Dict):
        env = gym.wrappers.FlattenObservation(env)
    if not isinstance(env.observation_space, spaces.Box) or not isinstance(env.action_space, spaces.Box):
        raise UserError(
            f"{env_id} has observations {env.observation_space} and actions {env.action_space}; a Decision "
            "Transformer needs Box observations and Box (continuous) actions. Name another env."
        )
    if len(env.observation_space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # infinite bounds lose nothing as float32
        return gym.wrappers.DtypeObservation(env, np.float32)


@cache
def env_spec(name: str, horizon: int | None = None) -> EnvSpec:
    """Describe a task: dimensions, action bounds, horizon, evaluation protocol."""
    env_id = canonical_id(name)
    if env_id.startswith(METAWORLD_PREFIX):
        from eva_rl.envs.metaworld import metaworld_spec

        return metaworld_spec(env_id, horizon)
    env = make_env(env_id, horizon=horizon)
    steps = horizon or (env.spec.max_episode_steps if env.spec else None) or DEFAULT_HORIZON
    action_space, observation_space = env.action_space, env.observation_space
    env.close()
    return EnvSpec(
        env_id=env_id,
        observation_dim=int(np.prod(observation_space.shape or (1,))),
        action_dim=int(np.prod(action_space.shape or (1,))),
        action_low=tuple(float(x) for x in action_space.low),  # type: ignore[attr-defined]
        action_high=tuple(float(x) for x in action_space.high),  # type: ignore[attr-defined]
        horizon=steps,
        reports_success=False,
        protocol=f"Gymnasium {env_id}, at most {steps} env steps, return of whole episodes, one seed an episode",
    )


def task_ids(names: str) -> list[str]:
    """Canonical names of a task set, or of names joined by ``+``."""
    if names in TASK_SETS:
        return list(TASK_SETS[names])
    return [canonical_id(name) for name in names.split("+")]
