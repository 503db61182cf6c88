"""One HDF5 file of episodes, in the layout of Minari's ``main_data.hdf5``.

Groups ``episode_0``, ``episode_1``, ... hold ``observations`` (T + 1 rows), ``actions``, ``rewards``,
``terminations``, ``truncations`` (T rows), and where known ``infos/success`` and ``infos/target_actions`` (T rows).
What is written here carries checksums, so that a damaged file is not read as something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from eva_rl.data.formats import hdf5
from eva_rl.data.formats.checks import ActionBounds, check_dims, check_rows, checked_episode, floats, place
from eva_rl.data.formats.store import gather
from eva_rl.data.trajectories import Episode, Trajectories
from eva_rl.errors import UserError
from eva_rl.files import write_file

REQUIRED = ("observations", "actions", "rewards", "terminations", "truncations")
PART_ROWS = 1 << 16
"""Env steps after which the episodes read so far are handed on."""
RESERVED = ("env_id", "source", "total_episodes", "total_steps")


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
    write_file(path, lambda aside: _write(aside, trajectories, trajectories.metadata | dict(metadata or {})))


def _write(aside: Path, trajectories: Trajectories, metadata: Mapping[str, Any]) -> None:
    with h5py.File(aside, "w", libver="v110") as file:  # from this version on, HDF5 sums its own structures
        file.attrs["env_id"] = trajectories.env_id
        file.attrs["source"] = trajectories.source
        file.attrs["total_episodes"] = trajectories.num_episodes
        file.attrs["total_steps"] = trajectories.num_steps
        for key, value in metadata.items():
            file.attrs[key] = value
        for index in range(trajectories.num_episodes):
            _write_episode(file.create_group(f"episode_{index}"), index, trajectories.episode(index))


def _write_episode(group: h5py.Group, index: int, episode: Episode) -> None:
    group.attrs["id"] = index
    group.attrs["total_steps"] = len(episode.rewards)
    arrays = {name: getattr(episode, name) for name in REQUIRED}
    arrays |= {"infos/success": episode.successes, "infos/target_actions": episode.target_actions}
    for name, array in arrays.items():
        if array is not None:
            group.create_dataset(name, data=array, chunks=array.shape, fletcher32=True)


def read_episodes(path: Path, bounds: ActionBounds | None = None) -> Trajectories:
    """Read a file of episodes into memory.

    Args:
        path: A file in Minari's episode layout, with Box observations and actions or Dicts of them.
        bounds: Of the actions.

    Raises:
        UserError: No such file, not HDF5, a key is missing, has the wrong length or values that cannot be.
    """
    if not path.exists():
        raise UserError(f"No data file {path}. Make one with `python -m eva_rl.collect env=push-v3 out={path}`.")
    parts = list(iterate_episodes(path, bounds))
    return gather(parts, parts[0].source)


def iterate_episodes(
    path: Path, bounds: ActionBounds | None = None, origin: Mapping[str, str] | None = None
) -> Iterator[Trajectories]:
    """Read a file of episodes part by part.

    Args:
        path: The file.
        bounds: Of the actions.
        origin: ``env_id``, ``source`` and metadata of a file that does not say them itself.

    Yields:
        Some whole episodes each.

    Raises:
        UserError: As :func:`read_episodes`.
    """
    with hdf5.open_hdf5(path) as file:
        names = _episode_names(path, file)
        said = dict(origin or _origin(path, file))
        env_id, source = said.pop("env_id", ""), said.pop("source", "") or str(path)
        pending: list[Episode] = []
        first: Episode | None = None
        for name in names:
            episode = _read_episode(path, name, hdf5.member(path, file, name), bounds)
            first = first or episode
            check_dims(path, f"{name}/", episode, first)
            pending.append(episode)
            if name == names[-1] or sum(len(waiting.rewards) for waiting in pending) >= PART_ROWS:
                yield Trajectories.from_episodes(pending, env_id=env_id, source=source, metadata=said)
                pending = []


def _episode_names(path: Path, file: h5py.File) -> list[str]:
    names = [name for name in hdf5.keys(path, file) if name.removeprefix("episode_").isdecimal()]
    names = sorted((name for name in names if name.startswith("episode_")), key=lambda name: int(name[8:]))
    if not names:
        raise UserError(f"{path} holds no group episode_0, episode_1, ... Expected Minari's episode layout.")
    total = hdf5.attribute(path, file, "total_episodes")
    if total:
        check_rows(path, "total_episodes", len(names), int(total) if total.isdecimal() else -1, "the file says so")
    return names


def _origin(path: Path, file: h5py.File) -> dict[str, str]:
    said = {key: hdf5.attribute(path, file, key) for key in hdf5.keys(path, file.attrs)}
    return {key: value for key, value in said.items() if key not in RESERVED[2:]}


def _read_episode(path: Path, name: str, group: Any, bounds: ActionBounds | None) -> Episode:
    if not isinstance(group, h5py.Group):
        raise UserError(f"{place(path, name)} is no group. Expected one with {', '.join(REQUIRED)}.")
    raw = {key: _flattened(path, group, key, f"{name}/") for key in ("observations", "actions")}
    raw |= {key: _read(path, group, key, f"{name}/") for key in REQUIRED[2:]}
    infos = hdf5.member(path, group, "infos")
    if isinstance(infos, h5py.Group):
        known = {"success": "successes", "target_actions": "target_actions"}
        found = [key for key in hdf5.keys(path, infos) if key in known]
        raw |= {known[key]: _read(path, infos, key, f"{name}/infos/") for key in found}
    return checked_episode(path, f"{name}/", raw, bounds)


def _read(path: Path, group: h5py.Group, key: str, prefix: str) -> NDArray[Any]:
    return hdf5.read(path, prefix + key, hdf5.array(path, group, key, ", ".join(REQUIRED), prefix))


def _flattened(path: Path, group: h5py.Group, key: str, prefix: str) -> NDArray[Any]:
    """A Box as it is, a Dict as its parts side by side: by key in alphabetical order, ``_index_<i>`` by number.

    That is the order of Gymnasium's ``flatten``, and so of ``FlattenObservation``.
    """
    found = hdf5.member(path, group, key)
    if not isinstance(found, h5py.Group):
        return _read(path, group, key, prefix)
    inner = sorted(hdf5.keys(path, found), key=_by_index)
    parts = [floats(path, f"{prefix}{key}/{name}", _flattened(path, found, name, f"{prefix}{key}/")) for name in inner]
    if not parts:
        raise UserError(f"{place(path, prefix + key)} is an empty group, expected numbers.")
    for name, part in zip(inner, parts, strict=True):
        check_rows(path, f"{prefix}{key}/{name}", len(part), len(parts[0]), f"{inner[0]} has as many")
    return np.concatenate(parts, axis=1)


def _by_index(name: str) -> tuple[int, str]:
    number = name.removeprefix("_index_")
    return (int(number), "") if number.isdecimal() and number != name else (-1, name)


def is_episode_file(path: Path) -> bool:
    """Whether an HDF5 file is in Minari's layout, with groups ``episode_<i>``."""
    with hdf5.open_hdf5(path) as file:
        return any(isinstance(hdf5.member(path, file, key), h5py.Group) for key in hdf5.keys(path, file))
