"""Videos of a policy: one episode, rendered without a display."""

from __future__ import annotations

import ctypes.util
import os
from pathlib import Path
from typing import Any

import imageio
import numpy as np
from numpy.typing import NDArray

from eva_rl import envs
from eva_rl.agents.policy import Policy
from eva_rl.errors import UserError
from eva_rl.files import write_file
from eva_rl.seeding import EVALUATION, episode_seeds

FRAMES_PER_SECOND = 20


def choose_renderer() -> None:
    """Let MuJoCo render without a display, where the user has not said how: EGL on a GPU, else OSMesa."""
    if "MUJOCO_GL" not in os.environ and "DISPLAY" not in os.environ:
        backend = "egl" if Path("/dev/nvidia0").exists() else "osmesa"
        os.environ["MUJOCO_GL"] = backend
    if os.environ.get("MUJOCO_GL") in {"egl", "osmesa"}:
        os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])


def record_episode(
    policy: Policy, env: str, path: Path, *, seed: int = 0, horizon: int | None = None, every: int = 2
) -> int:
    """Play the first evaluation episode of a seed and write it as an animated GIF.

    Args:
        policy: Acts.
        env: The task.
        path: The ``.gif`` to write.
        seed: Evaluation seed, as in :func:`eva_rl.evaluation.evaluate`.
        horizon: Env steps at most; None takes the task's own.
        every: Env steps between two frames.

    Returns:
        Number of frames.

    Raises:
        UserError: There is no renderer on this machine.
    """
    choose_renderer()
    environment = envs.make_env(env, horizon=horizon, render_mode="rgb_array")
    try:
        frames = _frames(policy, environment, envs.canonical_id(env), episode_seeds(EVALUATION, seed), every)
    except Exception as error:
        if _can_render():
            raise
        raise UserError(
            f"Video frames cannot be rendered here ({type(error).__name__}: {error}). Install Debian's libosmesa6 "
            "(apt-get install libosmesa6) or use a machine with a GPU, or leave video=true out."
        ) from error
    finally:
        environment.close()
    duration = 1000 / FRAMES_PER_SECOND
    write_file(path, lambda aside: imageio.mimsave(aside, list(frames), format="GIF", duration=duration, loop=0))
    return len(frames)


def _can_render() -> bool:
    library = "OSMesa" if os.environ.get("MUJOCO_GL") == "osmesa" else "EGL"
    return ctypes.util.find_library(library) is not None


def _frames(policy: Policy, env: Any, env_id: str, seed: int, every: int) -> list[NDArray[np.uint8]]:
    policy.reset([env_id])
    observation, _ = env.reset(seed=seed)
    reward, start, done, step = 0.0, True, False, 0
    frames = [env.render()]
    while not done:
        action = policy.act(observation[None], np.array([reward], np.float32), np.array([start]))[0]
        observation, reward, terminated, truncated, _ = env.step(action)
        start, done, step = False, terminated or truncated, step + 1
        if step % every == 0 or done:
            frames.append(env.render())
    return [np.asarray(frame)[::2, ::2] for frame in frames]
