"""Names of tasks, known without importing a simulator."""

from __future__ import annotations

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
"""Named lists of tasks."""

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
