"""Meta-World v3 tasks with goals that follow ``reset(seed=)``, and their scripted experts.

Meta-World itself ignores the seed given to ``reset`` and gives every environment made with the same constructor
seed the same goal. Here each seed draws its own goal and object position, on any instance, whatever it did before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from numpy.typing import NDArray

from eva_rl.envs.names import DENSE, REWARDS, SPARSE, goal_index
from eva_rl.envs.names import METAWORLD_PREFIX as PREFIX
from eva_rl.envs.sawyer import lean_class
from eva_rl.envs.spec import EnvSpec
from eva_rl.options import one_of

OBSERVATION_DIM = 39
ACTION_DIM = 4
CAMERA = "corner2"
HORIZON = 200
"""Env steps per episode in the Continual-World literature; Meta-World's own default is 500."""


@cache
def _task_classes() -> dict[str, type[Any]]:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS as classes

    return {f"{PREFIX}{key}": cls for key, cls in classes.items()}


def task_group(name: str) -> tuple[str, ...]:
    """Tasks of one of Meta-World's own groups: ``mt10``, ``mt25``, ``ml10``, ``ml10-train``, and so on."""
    from metaworld import env_dict

    group, _, part = name.partition("-")
    classes = getattr(env_dict, f"{group.upper()}_V3")
    if group.startswith("ml"):
        classes = classes[part] if part else classes["train"] | classes["test"]
    return tuple(f"{PREFIX}{task}" for task in classes)


def _make_task(env_id: str, render_mode: str | None, **options: Any) -> Any:
    """One of Meta-World's tasks with a visible goal, made as Meta-World makes it; leaner where nothing is rendered."""
    plain: Any = _task_classes()[env_id]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # its spaces are cast to float32
        task = (lean_class(plain) if render_mode is None else plain)(**options)
    task._partially_observable = False
    del task.sawyer_observation_space  # computed anew, with the goal
    task._set_task_called = True
    task._freeze_rand_vec, task.seeded_rand_vec = False, True
    task.render_mode = render_mode
    task.seed(0)
    return task


@cache
def _train_tasks(name: str, seed: int) -> list[Any]:
    """Meta-World's own list of 50 goals of a task, as its users make it; half a second to two."""
    import metaworld

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return list(metaworld.MT1(name, seed=seed).train_tasks)


class MetaWorldTask(gym.Wrapper[NDArray[np.float32], NDArray[np.float32], NDArray[Any], NDArray[np.float32]]):
    """One Meta-World task with a visible goal, float32 observations and success at any step of the episode.

    ``reset(seed=s)`` draws the goal of seed ``s``; ``reset()`` draws the next goal of the same stream.
    ``info["success"]`` and ``info["is_success"]`` (the name Stable-Baselines3 reads at the last step) tell whether
    the task has been solved at any step so far; ``info["success_now"]`` is Meta-World's own per-step flag.

    Args:
        env_id: Canonical name, for instance ``metaworld/push-v3``.
        horizon: Env steps after which an episode is truncated.
        render_mode: Gymnasium's render mode, or None.
        goal: The one goal of all episodes: a seed, or ``index:7``, the seventh (from 0) of Meta-World's own list
            ``MT1(task, seed=0).train_tasks``; ``index:7@42`` takes the list of seed 42. None lets each episode's seed
            draw its own.
        reward: ``dense``, Meta-World's own, or ``sparse``: 1 at each env step in which the task is solved, else 0.
        **options: Of Meta-World's constructor, for instance ``reward_function_version="v1"``.
    """

    def __init__(
        self,
        env_id: str,
        horizon: int = HORIZON,
        render_mode: str | None = None,
        goal: int | str | None = None,
        reward: str = DENSE,
        **options: Any,
    ) -> None:
        one_of(REWARDS, env__reward=reward)
        task = _make_task(env_id, render_mode, **options)
        task.max_path_length = horizon
        if render_mode is not None:
            task.mujoco_renderer.camera_id = mujoco.mj_name2id(task.model, mujoco.mjtObj.mjOBJ_CAMERA, CAMERA)
        super().__init__(task)
        index = goal_index(goal)
        if index is not None:
            task.set_task(_train_tasks(env_id.removeprefix(PREFIX), index[1])[index[0]])  # freezes its random vector
        self._task, self._seed = task, goal if isinstance(goal, int) else None
        self._solved, self._sparse = False, reward == SPARSE
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (OBSERVATION_DIM,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode on the goal of ``seed``, or on the next goal when None."""
        seed = seed if self._seed is None else self._seed
        if seed is not None:
            self._task.seed(seed)
        self._solved = False
        observation, info = self._task.reset()
        return observation.astype(np.float32), info

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Advance one env step (0.0125 s of simulated time)."""
        observation, reward, terminated, truncated, info = self._task.step(action)
        now = bool(info["success"])
        self._solved = self._solved or now
        info |= {"success_now": now, "success": self._solved, "is_success": self._solved}
        reward = float(now) if self._sparse else float(reward)
        return observation.astype(np.float32), reward, terminated, truncated, info

    def render(self) -> NDArray[np.uint8] | None:
        """The scene from Meta-World's customary camera, which hangs upside down: (height, width, 3)."""
        frame = self._task.render()
        return None if frame is None else np.rot90(frame, 2).copy()


def metaworld_spec(
    env_id: str, horizon: int | None = None, goal: int | str | None = None, reward: str = DENSE
) -> EnvSpec:
    """Describe a Meta-World task without making it."""
    horizon = horizon or HORIZON
    one_of(REWARDS, env__reward=reward)
    index = goal_index(goal)
    goals = "one seeded goal an episode" if goal is None else f"the goal of seed {goal} in every episode"
    if index is not None:
        goals = f"goal {index[0]} of Meta-World's MT1(seed={index[1]}).train_tasks in every episode"
    return EnvSpec(
        env_id=env_id,
        observation_dim=OBSERVATION_DIM,
        action_dim=ACTION_DIM,
        action_low=(-1.0,) * ACTION_DIM,
        action_high=(1.0,) * ACTION_DIM,
        horizon=horizon,
        reports_success=True,
        protocol=f"Meta-World v3, goal visible, {horizon} env steps, success at any step, {goals}"
        + (", rewarded at success alone" if reward == SPARSE else ""),
    )


def scripted_expert(env_id: str) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Return Meta-World's scripted expert for a task.

    Its gains are meant to saturate; Meta-World warns of that at every call (a ``UserWarning`` a caller may silence).

    Returns:
        A function from one observation (39,) to one action (4,), clipped to the action bounds.
    """
    from metaworld.policies import ENV_POLICY_MAP

    policy = ENV_POLICY_MAP[env_id.removeprefix(PREFIX).partition("?")[0]]()

    def act(observation: NDArray[np.float32]) -> NDArray[np.float32]:
        action: NDArray[np.float32] = np.clip(policy.get_action(observation), -1.0, 1.0).astype(np.float32)
        return action

    return act
