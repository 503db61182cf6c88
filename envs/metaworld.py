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

from eva_rl.envs.names import METAWORLD_PREFIX as PREFIX
from eva_rl.envs.spec import EnvSpec

OBSERVATION_DIM = 39
ACTION_DIM = 4
CAMERA = "corner2"
HORIZON = 200
"""Env steps per episode in the Continual-World literature; Meta-World's own default is 500."""


@cache
def _task_classes() -> dict[str, type[gym.Env[Any, Any]]]:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as classes

    return {f"{PREFIX}{key.removesuffix('-goal-observable')}": cls for key, cls in classes.items()}


class MetaWorldTask(gym.Wrapper[NDArray[np.float32], NDArray[np.float32], NDArray[Any], NDArray[np.float32]]):
    """One Meta-World task with a visible goal, float32 observations and success at any step of the episode.

    ``reset(seed=s)`` draws the goal of seed ``s``; ``reset()`` draws the next goal of the same stream.
    ``info["success"]`` and ``info["is_success"]`` (the name Stable-Baselines3 reads at the last step) tell whether
    the task has been solved at any step so far; ``info["success_now"]`` is Meta-World's own per-step flag.

    Args:
        env_id: Canonical name, for instance ``metaworld/push-v3``.
        horizon: Env steps after which an episode is truncated.
        render_mode: Gymnasium's render mode, or None.
    """

    def __init__(self, env_id: str, horizon: int = HORIZON, render_mode: str | None = None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # its spaces are cast to float32
            task: Any = _task_classes()[env_id](seed=0, render_mode=render_mode)  # type: ignore[call-arg]
        task._freeze_rand_vec = False
        task.seeded_rand_vec = True
        task.max_path_length = horizon
        if render_mode is not None:
            task.mujoco_renderer.camera_id = mujoco.mj_name2id(task.model, mujoco.mjtObj.mjOBJ_CAMERA, CAMERA)
        super().__init__(task)
        self._task = task
        self._solved = False
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (OBSERVATION_DIM,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode on the goal of ``seed``, or on the next goal when None."""
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
        return observation.astype(np.float32), float(reward), terminated, truncated, info

    def render(self) -> NDArray[np.uint8] | None:
        """The scene from Meta-World's customary camera, which hangs upside down: (height, width, 3)."""
        frame = self._task.render()
        return None if frame is None else np.rot90(frame, 2).copy()


def metaworld_spec(env_id: str, horizon: int | None = None) -> EnvSpec:
    """Describe a Meta-World task without making it."""
    horizon = horizon or HORIZON
    return EnvSpec(
        env_id=env_id,
        observation_dim=OBSERVATION_DIM,
        action_dim=ACTION_DIM,
        action_low=(-1.0,) * ACTION_DIM,
        action_high=(1.0,) * ACTION_DIM,
        horizon=horizon,
        reports_success=True,
        protocol=f"Meta-World v3, goal visible, {horizon} env steps, success at any step, one seeded goal an episode",
    )


def scripted_expert(env_id: str) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Return Meta-World's scripted expert for a task.

    Its gains are meant to saturate; Meta-World warns of that at every call (a ``UserWarning`` a caller may silence).

    Returns:
        A function from one observation (39,) to one action (4,), clipped to the action bounds.
    """
    from metaworld.policies import ENV_POLICY_MAP

    policy = ENV_POLICY_MAP[env_id.removeprefix(PREFIX)]()

    def act(observation: NDArray[np.float32]) -> NDArray[np.float32]:
        action: NDArray[np.float32] = np.clip(policy.get_action(observation), -1.0, 1.0).astype(np.float32)
        return action

    return act
