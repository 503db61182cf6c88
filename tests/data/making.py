"""Small data for the tests, and what makes files of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from eva_rl.data import Episode, Trajectories
from eva_rl.data.trajectories import COLUMNS


def table(rows: int = 12, **replaced: Any) -> dict[str, Any]:
    """Arrays of a D4RL file: numbers that say their own row; episodes of 4, 3 and 5 rows."""
    terminals, timeouts = np.zeros(rows, bool), np.zeros(rows, bool)
    terminals[3] = timeouts[[6, 11]] = True
    row = np.arange(rows, dtype=np.float32)
    arrays = {
        "observations": np.stack([row, -row], 1),
        "next_observations": np.stack([row + 0.5, -row], 1),
        "actions": (row / 100)[:, None],
        "rewards": row * 10,
        "terminals": terminals,
        "timeouts": timeouts,
    }
    return {key: value for key, value in (arrays | replaced).items() if value is not None}


def write_h5(path: Path, arrays: dict[str, Any]) -> Path:
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value
    return path


def random_trajectories(
    lengths: tuple[int, ...] = (4, 1, 6), seed: int = 0, dims: tuple[int, int] = (3, 2)
) -> Trajectories:
    rng = np.random.default_rng(seed)
    episodes = []
    for index, steps in enumerate(lengths):
        ends = np.arange(steps) == steps - 1
        episodes.append(
            Episode(
                observations=rng.normal(size=(steps + 1, dims[0])).astype(np.float32),
                actions=rng.uniform(-1, 1, (steps, dims[1])).astype(np.float32),
                rewards=rng.normal(size=steps).astype(np.float32),
                terminations=ends & (index % 2 == 0),
                truncations=ends & (index % 2 == 1),
                successes=np.logical_or.accumulate(rng.random(steps) < 0.5),
                target_actions=rng.uniform(-1, 1, (steps, dims[1])).astype(np.float32),
            )
        )
    return Trajectories.from_episodes(episodes, env_id="", source="random")


def differences(one: Trajectories, other: Trajectories) -> list[str]:
    """Names of the arrays in which two data sets differ, in type too."""
    different = []
    for name in ("offsets", *COLUMNS):
        left, right = getattr(one, name), getattr(other, name)
        same = (left is None) == (right is None)
        if same and left is not None:
            same = left.dtype == right.dtype and np.array_equal(left, right)
        if not same:
            different.append(name)
    return different
