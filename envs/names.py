"""Names of tasks and of their options, known without importing a simulator."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

from eva_rl.errors import UserError

TIMEOUT = 600.0
"""Seconds that one call of an environment may take, where nothing else is said."""
METAWORLD_PREFIX, MUJOCO_PREFIX = "metaworld/", "mujoco/"


def _metaworld(*names: str) -> tuple[str, ...]:
    return tuple(f"{METAWORLD_PREFIX}{name}-v3" for name in names)


CW10 = _metaworld(
    "hammer", "push-wall", "faucet-close", "push-back", "stick-pull", "handle-press-side", "push", "shelf-place",
    "window-close", "peg-unplug-side",
)  # fmt: skip
"""The ten tasks of Continual World (Wolczyk et al. 2021), which the EVA paper fine-tunes on."""
MT40 = _metaworld(
    "assembly", "basketball", "bin-picking", "box-close", "button-press-topdown", "button-press-topdown-wall",
    "button-press", "button-press-wall", "coffee-button", "coffee-pull", "coffee-push", "dial-turn", "disassemble",
    "door-close", "door-lock", "door-open", "door-unlock", "drawer-close", "drawer-open", "faucet-open", "hand-insert",
    "handle-press", "handle-pull-side", "handle-pull", "lever-pull", "peg-insert-side", "pick-out-of-hole",
    "pick-place", "pick-place-wall", "plate-slide-back-side", "plate-slide-back", "plate-slide-side", "plate-slide",
    "reach", "reach-wall", "soccer", "stick-push", "sweep-into", "sweep", "window-open",
)  # fmt: skip
"""The other forty tasks of Meta-World."""
METAWORLD_TASKS = tuple(sorted((*CW10, *MT40)))
"""Meta-World's fifty tasks."""
TASK_SETS = {"mt40": MT40, "cw10": CW10, "mt50": METAWORLD_TASKS}
"""Named lists of tasks; Meta-World's own groups come on top."""
METAWORLD_GROUPS = ("mt10", "mt25", *(f"ml{n}{part}" for n in (10, 25, 45) for part in ("", "-train", "-test")))
"""Names of Meta-World's own lists of tasks; :func:`eva_rl.envs.metaworld.task_group` gives the tasks."""
GOAL = "goal"
"""Option of a Meta-World task: the one goal of all episodes, by its seed or by its index (:func:`goal_index`)."""
NUM_GOALS = 50
"""Goals in one of Meta-World's own lists."""
REWARD = "reward"
"""Option of a Meta-World task: one of :data:`REWARDS`."""
DENSE, SPARSE = REWARDS = ("dense", "sparse")
"""Rewards of a Meta-World task: its own, or 1 where it is solved and else 0."""

MUJOCO_TASKS = {
    "ant": "Ant",
    "halfcheetah": "HalfCheetah",
    "hopper": "Hopper",
    "humanoid": "Humanoid",
    "humanoidstandup": "HumanoidStandup",
    "inverteddoublependulum": "InvertedDoublePendulum",
    "invertedpendulum": "InvertedPendulum",
    "pusher": "Pusher",
    "reacher": "Reacher",
    "swimmer": "Swimmer",
    "walker2d": "Walker2d",
}
"""MuJoCo's tasks: the name after ``mujoco/``, and Gymnasium's."""
MUJOCO_VERSION = "v5"


def task_list() -> list[str]:
    """The name by which each task is shown: Meta-World tasks, then MuJoCo tasks by their Gymnasium ids."""
    return [*METAWORLD_TASKS, *(f"{name}-{MUJOCO_VERSION}" for name in MUJOCO_TASKS.values())]


def with_options(name: str, kwargs: Mapping[str, Any] | None = None, goal: int | str | None = None) -> str:
    """A task's name together with what it is made with, for instance ``Pendulum-v1?g=9.81`` or ``push-v3?goal=7``.

    The options are part of the name, so that whatever knows the name, worker processes and saved policies included,
    makes the same environment.

    Args:
        name: Tasks as ``env=`` takes them; names joined by ``+`` get the options each.
        kwargs: Keyword arguments of the environment's constructor, JSON values.
        goal: The one goal of a Meta-World task, a seed or ``index:7``; None gives each episode its own.

    Raises:
        UserError: A value cannot be written as JSON.
    """
    given = dict(kwargs or {}) | ({} if goal is None else {GOAL: goal})
    if not given:
        return name
    query = "&".join(f"{quote(key)}={quote(_as_text(key, value), safe=':@')}" for key, value in sorted(given.items()))
    return "+".join(f"{part}{'&' if '?' in part else '?'}{query}" for part in name.split("+"))


def _as_text(key: str, value: Any) -> str:
    if isinstance(value, str) and value_of_text(value) == value:
        return value
    try:
        return json.dumps(value)
    except TypeError as error:
        raise UserError(
            f"env.kwargs.{key} is of type {type(value).__name__}: expected numbers, texts, true, false, null, lists or "
            "mappings of them."
        ) from error


def split_options(name: str) -> tuple[str, dict[str, Any]]:
    """The inverse of :func:`with_options`: the name alone, and the options."""
    base, _, query = name.partition("?")
    options: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"env={name}: expected NAME?KEY=VALUE&KEY=VALUE, found {part!r} without a value.")
        options[unquote(key)] = value_of_text(unquote(value))
    return base, options


def value_of_text(text: str) -> Any:
    """A JSON value as it may be typed: numbers, true, false, null, lists; anything else is text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def goal_of(value: Any) -> int | str:
    """A goal as it stands in a task's name: a seed from 0, or ``index:7`` or ``index:7@42`` (:func:`goal_index`).

    Raises:
        UserError: Neither.
    """
    index = goal_index(value)
    if index is not None and index[0] < NUM_GOALS:
        return f"index:{index[0]}" + (f"@{index[1]}" if index[1] else "")
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise UserError(
        f"env.goal={value}: expected the seed of a goal, a whole number from 0; or index:0 to index:{NUM_GOALS - 1} of "
        "metaworld.MT1(task, seed=0).train_tasks, where index:7@42 is the one of seed=42."
    )


def goal_index(goal: Any) -> tuple[int, int] | None:
    """Index of a goal in ``metaworld.MT1(task, seed=SEED).train_tasks``, and SEED; None where it is given by a seed."""
    found = re.fullmatch(r"index:(\d{1,9})(?:@(\d{1,9}))?", goal) if isinstance(goal, str) else None
    return None if found is None else (int(found[1]), int(found[2] or 0))
