"""Videos of a policy: one episode, rendered without a display."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio
import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from eva_rl.agents.policy import Policy
from eva_rl.envs import canonical_id, make_env
from eva_rl.envs.checked import success_of
from eva_rl.envs.names import METAWORLD_PREFIX
from eva_rl.errors import UserError
from eva_rl.files import write_file
from eva_rl.seeding import EVALUATION, episode_seeds

FRAMES_PER_SECOND = 20
CAPTION_HEIGHT = 24
GAP = 4
CAPTION_COLOUR, SOLVED_COLOUR = "#1f2937", "#14532d"
"""Behind the caption; the first also between two films, where white would shine on a dark page."""
MARGIN = 6
CAPTION_SIZES = (13, 12, 11, 10, 9, 8)
"""Sizes of the caption's letters, the first that fits."""
METAWORLD_FRAME = (480, 480)
METAWORLD_PART = (slice(150, 390), slice(120, 360))
"""The table and the gripper: in the whole frame a puck is a few pixels."""

Frame = NDArray[np.uint8]


@dataclass(frozen=True)
class Clip:
    """One episode.

    Attributes:
        frames: (height, width, 3) each.
        every: Env steps between two frames.
        returns: Sum of the rewards until each frame.
        first_success: Env step (from 0) of the first success; None where there was none, or where the task knows none.
    """

    frames: tuple[Frame, ...]
    every: int
    returns: tuple[float, ...]
    first_success: int | None

    def captioned(self, name: str) -> tuple[Frame, ...]:
        """The frames below a line with a name, the return so far, and from the first success on that."""
        solved = len(self.frames) if self.first_success is None else -(-(self.first_success + 1) // self.every)
        texts = [f"{name}   return {so_far:z.0f}" for so_far in self.returns]
        return tuple(
            _below_caption(frame, f"{text}   solved" if index >= solved else text, index >= solved)
            for index, (frame, text) in enumerate(zip(self.frames, texts, strict=True))
        )


def choose_renderer() -> None:
    """Let MuJoCo render without a display, where the user has not said how: EGL on a GPU, else OSMesa."""
    if "MUJOCO_GL" not in os.environ and "DISPLAY" not in os.environ:
        backend = "egl" if Path("/dev/nvidia0").exists() else "osmesa"
        os.environ["MUJOCO_GL"] = backend
    if os.environ.get("MUJOCO_GL") in {"egl", "osmesa"}:
        os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])


def record_clip(
    policy: Policy,
    env: str,
    *,
    seed: int = 0,
    horizon: int | None = None,
    every: int = 2,
    on_step: Callable[[int], None] = lambda _: None,
) -> Clip:
    """Play the first evaluation episode of a seed and keep frames.

    Args:
        policy: Acts.
        env: The task.
        seed: Evaluation seed, as in :func:`eva_rl.evaluate_policy`.
        horizon: Env steps at most; None takes the task's own.
        every: Env steps between two frames.
        on_step: Called after each env step with its number, from 1.

    Raises:
        UserError: There is no renderer on this machine, or the environment gives no frames.
    """
    with _rendering(env, horizon) as environment:
        return _play(policy, environment, canonical_id(env), episode_seeds(EVALUATION, seed), every, on_step)


def check_frames(env: str, horizon: int | None = None) -> None:
    """Raise unless the environment gives frames on this machine.

    Args:
        env: The task.
        horizon: Env steps at most; None takes the task's own.

    Raises:
        UserError: There is no renderer on this machine, or the environment gives no frames.
    """
    with _rendering(env, horizon) as environment:
        environment.reset(seed=0)
        _frame(environment, None)


@contextmanager
def _rendering(env: str, horizon: int | None) -> Iterator[Any]:
    """An environment whose ``render()`` gives frames; what goes wrong with that is said in words."""
    choose_renderer()
    try:
        environment = make_env(env, horizon=horizon, render_mode="rgb_array")
    except UserError as error:
        raise UserError(f"{error} It was made with render_mode=rgb_array, for video=true: leave that out?") from error
    try:
        yield environment
    except UserError:
        raise
    except Exception as error:  # of the renderer, whose errors differ by backend
        if isinstance(error, NotImplementedError) or can_render():  # the former is gymnasium.Env's own render()
            raise UserError(
                f"{env} gives no frames: render() of mode rgb_array raised {type(error).__name__}: {error}. Leave out "
                "video=true."
            ) from error
        raise UserError(
            f"Video frames cannot be rendered here ({type(error).__name__}: {error}). Install Debian's libosmesa6 "
            "(apt-get install libosmesa6) or use a machine with a GPU, or leave out video=true."
        ) from error
    finally:
        environment.close()


def record_episode(
    policy: Policy, env: str, path: Path, *, seed: int = 0, horizon: int | None = None, every: int = 2
) -> int:
    """Write the clip of :func:`record_clip` as an animated GIF.

    Args:
        policy: Acts.
        env: The task.
        path: The ``.gif`` to write.
        seed: Evaluation seed.
        horizon: Env steps at most; None takes the task's own.
        every: Env steps between two frames.

    Returns:
        Number of frames.

    Raises:
        UserError: There is no renderer on this machine.
    """
    clip = record_clip(policy, env, seed=seed, horizon=horizon, every=every)
    write_video(path, clip.captioned(canonical_id(env).removeprefix(METAWORLD_PREFIX)))
    return len(clip.frames)


def side_by_side(left: Sequence[Frame], right: Sequence[Frame]) -> tuple[Frame, ...]:
    """Frames beside each other; the shorter sequence stays at its last frame."""
    length = max(len(left), len(right))
    gap = np.full((left[0].shape[0], GAP, 3), ImageColor.getrgb(CAPTION_COLOUR), np.uint8)
    return tuple(
        np.concatenate([left[min(i, len(left) - 1)], gap, right[min(i, len(right) - 1)]], axis=1) for i in range(length)
    )


def write_video(path: Path, frames: Sequence[Frame]) -> list[Path]:
    """Write an animated GIF and, where imageio-ffmpeg is installed, an MP4 beside it.

    Args:
        path: The ``.gif`` to write.
        frames: (height, width, 3) each; height and width are even for MP4.

    Returns:
        What was written.
    """
    duration = 1000 / FRAMES_PER_SECOND
    write_file(path, lambda aside: imageio.mimsave(aside, list(frames), format="GIF", duration=duration, loop=0))
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        return [path]
    video = path.with_name(path.name.removesuffix(".gif") + ".mp4")
    encoded = iio.imwrite(
        "<bytes>", np.stack(frames), plugin="FFMPEG", extension=".mp4", fps=FRAMES_PER_SECOND, macro_block_size=2
    )
    write_file(video, lambda aside: aside.write_bytes(encoded))
    return [path, video]


def can_render() -> bool:
    """Whether the library that renders is there, after :func:`choose_renderer`."""
    library = "OSMesa" if os.environ.get("MUJOCO_GL") == "osmesa" else "EGL"
    return ctypes.util.find_library(library) is not None


def _play(policy: Policy, env: Any, env_id: str, seed: int, every: int, on_step: Callable[[int], None]) -> Clip:
    policy.reset([env_id])
    observation, _ = env.reset(seed=seed)
    reward, total, start, done, step = 0.0, 0.0, True, False, 0
    first_success = None
    part = METAWORLD_PART if env_id.startswith(METAWORLD_PREFIX) else None
    frames, returns = [_frame(env, part)], [0.0]
    while not done:
        action = policy.act(observation[None], np.array([reward], np.float32), np.array([start]))[0]
        observation, reward, terminated, truncated, info = env.step(action)
        if first_success is None and success_of(info):
            first_success = step
        total, start, done, step = total + float(reward), False, terminated or truncated, step + 1
        if step % every == 0 or done:
            frames.append(_frame(env, part))
            returns.append(total)
        on_step(step)
    return Clip(tuple(frames), every, tuple(returns), first_success)


def _frame(env: Any, part: tuple[slice, slice] | None) -> Frame:
    """A part of a frame, or all of it at half its size; grey ones become coloured.

    Raises:
        UserError: It is no picture of bytes.
    """
    rendered = np.asarray(env.render())
    if rendered.dtype != np.uint8 or rendered.ndim not in {2, 3}:
        raise UserError(
            f"render() returned {rendered.dtype} of shape {rendered.shape}, expected uint8 of (height, width, 3)."
        )
    frame = np.stack([rendered] * 3, axis=-1) if rendered.ndim == 2 else rendered
    if part is not None and frame.shape[:2] == METAWORLD_FRAME:
        return frame[part].copy()
    return np.asarray(Image.fromarray(frame).reduce(2), np.uint8)


def _below_caption(frame: Frame, text: str, solved: bool) -> Frame:
    height, width, _ = frame.shape
    image = Image.new("RGB", (width, height + CAPTION_HEIGHT), SOLVED_COLOUR if solved else CAPTION_COLOUR)
    image.paste(Image.fromarray(frame), (0, CAPTION_HEIGHT))
    draw = ImageDraw.Draw(image)
    fonts = [ImageFont.load_default(size) for size in CAPTION_SIZES]
    font = next((font for font in fonts if draw.textlength(text, font=font) <= width - 2 * MARGIN), fonts[-1])
    draw.text((MARGIN, CAPTION_HEIGHT // 2), text, fill="white", font=font, anchor="lm")
    return np.asarray(image)
