"""Names of tasks: canonical, short and outdated ones, and what they stand for."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from eva_rl.envs.checked import CheckedEnv, StopAtSuccess
from eva_rl.envs.deadline import Deadline
from eva_rl.envs.names import (
    DENSE,
    GOAL,
    METAWORLD_GROUPS,
    METAWORLD_PREFIX,
    METAWORLD_TASKS,
    MUJOCO_PREFIX,
    MUJOCO_TASKS,
    MUJOCO_VERSION,
    REWARD,
    TASK_SETS,
    goal_of,
    split_options,
    task_list,
    with_options,
)
from eva_rl.envs.spec import EnvSpec
from eva_rl.errors import EnvironmentFailedError, UnknownNameError, UserError

log = logging.getLogger(__name__)

DEFAULT_HORIZON = 1000
DATA_SET = re.compile(rf"(mujoco/)?(?P<task>{'|'.join(MUJOCO_TASKS)})[-/][a-z-]+-v\d+")
"""D4RL's ``hopper-medium-v2`` and Minari's ``mujoco/hopper/medium-v0``."""
P = ParamSpec("P")
T = TypeVar("T")


def task_ids(names: str) -> list[str]:
    """Canonical names of a task set, or of names and sets joined by ``+``."""
    return [task for part in names.split("+") for task in _tasks_of(part.strip())]


def _tasks_of(part: str) -> list[str]:
    name, _, options = part.partition("?")
    known = _task_set(name.lower().replace("_", "-").removeprefix(METAWORLD_PREFIX))
    if known is None:
        return [canonical_id(part)]
    return [canonical_id(f"{task}?{options}" if options else task) for task in known]


def _task_set(name: str) -> tuple[str, ...] | None:
    if name in METAWORLD_GROUPS:
        from eva_rl.envs.metaworld import task_group

        return task_group(name)
    return TASK_SETS.get(name)


def canonical_id(name: str) -> str:
    """Resolve a task name as a user may type it.

    Args:
        name: ``metaworld/push-v3``, ``push-v3``, ``push``, ``push-v2`` (mapped to v3, with a message),
            ``mujoco/hopper``, ``mujoco/hopper-v4``, any registered Gymnasium id such as ``Hopper-v5``, or
            ``module:Env-v0``, whose module is imported first, as ``gymnasium.make`` does. Options may follow
            (:func:`with_options`).

    Returns:
        ``metaworld/<task>-v3``, a Gymnasium id or ``module:<id>``, with its options.

    Raises:
        UnknownNameError: No such task; the message lists close matches.
        UserError: The module cannot be imported, or an option makes no sense for the task.
    """
    if not isinstance(name, str):
        raise UserError(
            f"env is a {type(name).__name__}, expected the name of a task. Register yours with gymnasium.register and "
            "name it, or name MODULE:ID of the module that registers it."
        )
    return _canonical_id(name)


@cache
def _canonical_id(name: str) -> str:
    base, options = split_options(name.strip())
    resolved = _resolve(base)
    goal = options.pop(GOAL, None) if resolved.startswith(METAWORLD_PREFIX) else None
    return with_options(resolved, options, None if goal is None else goal_of(goal))


def is_known(name: str) -> bool:
    """Whether a task can be made without a module that its name gives, or arguments for its constructor.

    What a file says of itself nobody typed: only then is it looked up.
    """
    return ":" not in name and (name in gym.registry or name.partition("?")[0] in METAWORLD_TASKS)


def _resolve(name: str) -> str:
    module, colon, env_id = name.rpartition(":")
    if colon:
        return f"{module}:{_registered_by(module, env_id)}"
    if name in gym.registry:
        return name
    resolved = _mujoco_id(name) if name.startswith(MUJOCO_PREFIX) else _metaworld_id(name)
    if resolved is None and (name in TASK_SETS or name in METAWORLD_GROUPS):
        raise UserError(
            f"env={name} is a set of tasks, and this takes one: name one of them, such as env=push-v3. Sets are for "
            "env= of evaluate and pretrain, and tasks= of benchmark."
        )
    if resolved is None:
        _refuse_data_set(name)
        known = [
            *TASK_SETS,
            *METAWORLD_GROUPS,
            *task_list(),
            *(MUJOCO_PREFIX + task for task in MUJOCO_TASKS),
            *(task.removeprefix(METAWORLD_PREFIX) for task in METAWORLD_TASKS),
        ]
        hint = "`eva-rl finetune --help` lists the tasks; an environment of your own is named module:Env-v0."
        raise UnknownNameError("env", name, [*known, *gym.registry], hint)
    return resolved


def _refuse_data_set(name: str) -> None:
    """Where a name is D4RL's, or Minari's, of recorded episodes: say how to name these and their task."""
    found = DATA_SET.fullmatch(name)
    if found:
        task = MUJOCO_TASKS[found["task"]]
        kind = "minari" if name.startswith(MUJOCO_PREFIX) else "d4rl"
        raise UserError(
            f"env={name} names a data set, and this takes a task. Type env={task}-{MUJOCO_VERSION}, and "
            f"data={kind}:{name} to train on its episodes."
        )


def _registered_by(module: str, env_id: str) -> str:
    """The id of an environment that a module registers when it is imported; without a version, its latest."""
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the module's own code raises
        raise UserError(
            f"env={module}:{env_id}: the module {module} could not be imported ({type(error).__name__}: {error}). "
            "Start from the folder that holds it, or install it."
        ) from error
    if env_id in gym.registry:
        return env_id
    versions = [
        spec for spec in gym.registry.values() if spec.version is not None and spec.id == f"{env_id}-v{spec.version}"
    ]
    if versions:
        return max(versions, key=lambda spec: spec.version or 0).id
    raise UnknownNameError(
        f"environment of the module {module}", env_id, gym.registry, "The module has to call gymnasium.register()."
    )


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


def make_env(
    name: str, *, horizon: int | None = None, render_mode: str | None = None, stop_at_success: bool = False
) -> CheckedEnv:
    """Make one environment; ``reset(seed=)`` determines the whole episode.

    Args:
        name: Any name that :func:`canonical_id` takes.
        horizon: Env steps after which an episode is truncated; None takes the task's own, or
            :data:`DEFAULT_HORIZON` where it has none.
        render_mode: Gymnasium's render mode; not passed on when None.
        stop_at_success: Terminate an episode at its first success.

    Raises:
        UnknownNameError: No such task.
        UserError: The environment cannot be made, or its spaces are not flat boxes.
    """
    env_id = canonical_id(name)
    env = _unchecked(env_id, horizon, render_mode)
    return CheckedEnv(StopAtSuccess(env) if stop_at_success else env, env_id)


def _unchecked(env_id: str, horizon: int | None, render_mode: str | None) -> gym.Env[Any, Any]:
    base, options = split_options(env_id)
    if base.startswith(METAWORLD_PREFIX):
        from eva_rl.envs import metaworld

        steps = horizon or metaworld.HORIZON
        return _constructed(env_id, partial(metaworld.MetaWorldTask, base, steps, render_mode), options)
    if render_mode is not None:
        options["render_mode"] = render_mode
    if "max_episode_steps" in options:
        raise UserError(f"{env_id}: max_episode_steps is no argument of the environment. Set env.horizon=STEPS.")
    steps = _horizon(base, horizon)
    make = partial(gym.make, base, max_episode_steps=steps, disable_env_checker=True)
    return _flat(_constructed(env_id, make, options), env_id)


def _constructed(env_id: str, make: Callable[..., gym.Env[Any, Any]], options: Mapping[str, Any]) -> gym.Env[Any, Any]:
    """What a constructor makes; one message for whatever it raises."""
    failed = partial(EnvironmentFailedError, env_id, "while it was made")
    try:
        with Deadline(failed, "its constructor"):
            return make(**options)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # foreign constructors may raise anything
        unknown = re.search(r"unexpected keyword argument '(goal|reward)'", str(error))
        if unknown and unknown[1] in options:
            key = f"env.{unknown[1]}="
            raise UserError(f"{env_id} takes no {unknown[1]}: {key} is Meta-World's. Leave it out.") from error
        raise UserError(
            f"The environment {env_id} could not be made: {type(error).__name__}: {error}. Give its constructor what "
            "it needs with env.kwargs='{NAME:VALUE}', install what it needs, or name another env=."
        ) from error


def _horizon(env_id: str, horizon: int | None) -> int:
    """Env steps after which an episode is truncated: the user's, the environment's own, or the default."""
    own = gym.spec(env_id.rpartition(":")[2]).max_episode_steps
    return horizon or (own if own and own > 0 else DEFAULT_HORIZON)


def _flat(env: gym.Env[Any, Any], env_id: str) -> gym.Env[Any, Any]:
    for space in _parts(env.observation_space):
        if isinstance(space, spaces.Text) or (
            isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) > 1
        ):
            kind = "text" if isinstance(space, spaces.Text) else "images"
            raise UserError(
                f"{env_id} observes {kind} ({space}); a Decision Transformer of this package sees vectors of numbers. "
                "Name an env with state observations, or wrap it so that it gives features."
            )
    if isinstance(env.observation_space, spaces.Dict | spaces.Tuple):
        env = gym.wrappers.FlattenObservation(env)
    observations, actions = env.observation_space, env.action_space
    if (
        not isinstance(observations, spaces.Box)
        or not isinstance(actions, spaces.Box)
        or not np.issubdtype(actions.dtype, np.floating)
    ):
        raise UserError(
            f"{env_id} has observations {observations} and actions {actions}; a Decision "
            "Transformer needs Box observations and Box (continuous) actions. Name another env."
        )
    if 0 in (*observations.shape, *actions.shape):
        raise UserError(
            f"{env_id} has observations of shape {observations.shape} and actions of shape {actions.shape}; expected "
            "at least one number in each. Name another env."
        )
    return env if len(observations.shape) == 1 else gym.wrappers.FlattenObservation(env)


def _parts(space: gym.Space[Any]) -> Iterator[gym.Space[Any]]:
    """A space, or those that a Dict or Tuple is made of, at any depth."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        for part in space.values() if isinstance(space, spaces.Dict) else space:
            yield from _parts(part)
    else:
        yield space


def cache_while_registered(function: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
    """Cache what a function of a task's name returns, until the task is registered anew, as in a notebook."""
    found: dict[tuple[Any, ...], tuple[object, T]] = {}

    @wraps(function)
    def cached(name: str, /, *args: P.args, **kwargs: P.kwargs) -> T:
        registered = gym.registry.get(split_options(canonical_id(name))[0].rpartition(":")[2])
        key = (name, args, tuple(sorted(kwargs.items())))
        if key not in found or found[key][0] is not registered:
            found[key] = registered, function(name, *args, **kwargs)
        return found[key][1]

    return cached


@cache_while_registered
def env_spec(name: str, horizon: int | None = None) -> EnvSpec:
    """Describe a task: dimensions, action bounds, horizon, evaluation protocol."""
    env_id = canonical_id(name)
    base, options = split_options(env_id)
    if base.startswith(METAWORLD_PREFIX):
        from eva_rl.envs.metaworld import metaworld_spec

        return metaworld_spec(env_id, horizon, options.get(GOAL), options.get(REWARD, DENSE))
    env = make_env(env_id, horizon=horizon)
    steps, action_space, observation_space = _horizon(base, horizon), env.action_space, env.observation_space
    env.close()
    assert isinstance(action_space, spaces.Box)
    assert isinstance(observation_space, spaces.Box)
    return EnvSpec(
        env_id=env_id,
        observation_dim=observation_space.shape[0],
        action_dim=action_space.shape[0],
        action_low=tuple(map(float, action_space.low)),
        action_high=tuple(map(float, action_space.high)),
        horizon=steps,
        reports_success=False,
        protocol=f"Gymnasium {env_id}, at most {steps} env steps, return of whole episodes, one seed an episode",
    )
