"""What a run shows besides numbers: its settings, the policy's actions, and a film, before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eva_rl.commands.command import console
from eva_rl.tracking import Tracker
from eva_rl.tracking.figures import action_figure
from eva_rl.training.distributed import Ranks
from eva_rl.video import Clip, record_clip, side_by_side, write_video

if TYPE_CHECKING:
    from eva_rl.commands.session import Session

NOT_SHOWN = {"run_dir", "resume", "threads", "device", "tracker", "video", "checkpoint"}
"""Settings that say nothing about a result."""
SHORT = {"adapter": "adapter.method", "algo": "algo.name", "env": "env.id", "rank": "adapter.rank", "seed": "seed"}
"""Settings by which runs are told apart most often."""
FRAMES = 100
"""Frames of a film, about."""


def shown(config: Any) -> dict[str, Any]:
    """The settings of a run, flat; TensorBoard's table of runs shows the first five, in alphabetical order."""
    settings = {key: value for key, value in _flat(asdict(config)) if key.partition(".")[0] not in NOT_SHOWN}
    short = {name: settings.pop(key) for name, key in SHORT.items() if key in settings}
    return short | {f"settings/{key}": value for key, value in settings.items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | dict):
            yield prefix + key, ", ".join(map(str, value))
        else:
            yield prefix + key, value


@dataclass(frozen=True)
class Look:
    """How the policy acts.

    Attributes:
        actions: (N, act), of the last evaluation (in a run of several processes: the first one's part).
        clip: One episode, where ``video=true`` asks for it.
    """

    actions: NDArray[np.float32]
    clip: Clip | None


def look_at(session: Session) -> Look:
    """Look at the policy after an evaluation; films an episode where asked to.

    Raises:
        UserError: There is no renderer on this machine.
    """
    config, actions = session.config, session.actor.actions
    if not config.video or not Ranks.here().first:
        return Look(actions, None)
    every = max(2, session.spec.horizon // FRAMES)
    clip = record_clip(session.policy, config.env.id, seed=config.eval.seed, horizon=config.env.horizon, every=every)
    return Look(actions, clip)


def compare_looks(session: Session, tracker: Tracker, before: Look, after: Look) -> None:
    """Show two looks: histograms of each number of an action, and the films side by side."""
    last = session.config.algo.final_step
    for index in range(before.actions.shape[1]):
        for look, step in ((before, 0), (after, last)):
            tracker.histogram(f"eval/action_{index}", look.actions[:, index], step)
    tracker.figure("eval/actions", action_figure(before.actions, after.actions), last)
    if before.clip is None or after.clip is None:
        return
    frames = side_by_side(before.clip.captioned("before"), after.clip.captioned("after"))
    path = session.run_dir / "videos" / f"{session.spec.env_id.replace('/', '-')}.gif"
    for written in write_video(path, frames):
        console.print(f"Video:       {written}", soft_wrap=True)
    tracker.video("eval/before_and_after", path, last)
