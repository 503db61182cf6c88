"""One HDF5 file of episodes, in the layout of Minari's ``main_data.hdf5``.

Groups ``episode_0``, ``episode_1``, ... hold ``observations`` (T + 1 rows), ``actions``, ``rewards``,
``terminations``, ``truncations`` (T rows), and where known ``infos/success`` and ``infos/target_actions`` (T rows).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from eva_rl.data.trajectories import Episode, Trajectories
from eva_rl.errors import UserError

REQUIRED = ("observations", "actions", "rewards", "terminations", "truncations")


def write_episodes(path: Path, trajectories: Trajectories, metadata: Mapping[str, Any] | None = None) -> None:
    """Write trajectories to a new file, completely or not at all.

    Args:
        path: The file to make; its folder is made where missing.
        trajectories: What to write.
        metadata: Attributes of the file, besides ``env_id``, ``source``, ``total_episodes`` and ``total_steps``.

    Raises:
        UserError: The file exists, or the disk is full or not writable.
    """
    if path.exists():
        raise UserError(f"{path} exists and is not overwritten. Name another file with out=, or remove it.")
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(aside, "w") as file:
            _write_attributes(file, trajectories, metadata or {})
            for index in range(trajectories.num_episodes):
                _write_episode(file.create_group(f"episode_{index}"), index, trajectories.episode(index))
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error}. Free some room, or name another out=.") from error
    finally:
        aside.unlink(missing_ok=True)


def _write_attributes(file: h5py.File, trajectories: Trajectories, metadata: Mapping[str, Any]) -> None:
    file.attrs["env_id"] = trajectories.env_id
    file.attrs["source"] = trajectories.source
    file.attrs["total_episodes"] = trajectories.num_episodes
    file.attrs["total_steps"] = trajectories.num_steps
    for key, value in metadata.items():
        file.attrs[key] = value


def _write_episode(group: h5py.Group, index: int, episode: Episode) -> None:
    group.attrs["id"] = index
    group.attrs["total_steps"] = len(episode.rewards)
    for name in REQUIRED:
        group.create_dataset(name, data=getattr(episode, name))
    if episode.successes is not None:
        group.create_dataset("infos/success", data=episode.successes)
    if episode.target_actions is not None:
        group.create_dataset("infos/target_actions", data=episode.target_actions)


def read_episodes(path: Path) -> Trajectories:
    """Read a file of episodes.

    Args:
        path: A file in Minari's episode layout, with flat (Box) observations and actions.

    Raises:
        UserError: No such file, not HDF5, a key is missing or has the wrong length.
    """
    if not path.is_file():
        raise UserError(f"No data file {path}. Make one with `python -m eva_rl.collect env=push-v3 out={path}`.")
    try:
        with h5py.File(path, "r") as file:
            names = sorted((n for n in file if n.startswith("episode_")), key=lambda n: int(n.split("_")[1]))
            episodes = [_read_episode(path, name, file[name]) for name in names]
            env_id, source = str(file.attrs.get("env_id", "")), str(file.attrs.get("source", path.name))
    except OSError as error:
        raise UserError(f"{path} is not a readable HDF5 file: {error}.") from error
    return Trajectories.from_episodes(episodes, env_id=env_id, source=source or str(path))


def _read_episode(path: Path, name: str, group: h5py.Group) -> Episode:
    arrays = {}
    for key in REQUIRED:
        if key not in group or not isinstance(group[key], h5py.Dataset):
            raise UserError(f"{path}: {name}/{key} is missing; expected {', '.join(REQUIRED)} in each episode.")
        arrays[key] = group[key][()]
    steps = len(arrays["rewards"])
    for key, array in arrays.items():
        expected = steps + (key == "observations")
        if len(array) != expected:
            raise UserError(f"{path}: {name}/{key} has {len(array)} rows, expected {expected} for {steps} env steps.")
    return Episode(
        observations=arrays["observations"].astype(np.float32),
        actions=arrays["actions"].astype(np.float32),
        rewards=arrays["rewards"].astype(np.float32),
        terminations=arrays["terminations"].astype(bool),
        truncations=arrays["truncations"].astype(bool),
        successes=group["infos/success"][()].astype(bool) if "infos/success" in group else None,
        target_actions=group["infos/target_actions"][()] if "infos/target_actions" in group else None,
    )
