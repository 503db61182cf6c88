"""One HDF5 file of episodes, in the layout of Minari's ``main_data.hdf5``.

Groups ``episode_0``, ``episode_1``, ... hold ``observations`` (T + 1 rows), ``actions``, ``rewards``,
``terminations``, ``truncations`` (T rows), and where known ``infos/success`` and ``infos/target_actions`` (T rows).
What is written here carries checksums and a digest of everything in it, so that a damaged file is not read as
something else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from eva_rl.data.formats.episodes import EpisodeChecker, ReadOptions
from eva_rl.data.formats.hdf5 import HdfFile
from eva_rl.data.formats.spaces import MAX_DEPTH, Spaces, Tree, flattened
from eva_rl.data.trajectories import Episode, Trajectories, concatenate
from eva_rl.errors import UserError
from eva_rl.files import write_file

REQUIRED = ("observations", "actions", "rewards", "terminations", "truncations")
INFOS = {"success": "successes", "target_actions": "target_actions"}
READ_INFOS = {"is_success": "successes"} | INFOS
"""What is read; of two names of one the latter wins."""
PART_ROWS = 1 << 16
"""Env steps after which the episodes read so far are handed on."""
RESERVED = ("total_episodes", "total_steps", "sha256")
DIGEST = "sha256"


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
    digest = Digest()
    with h5py.File(aside, "w", libver="v110") as file:  # from this version on, HDF5 sums its own structures
        file.attrs["env_id"] = trajectories.env_id
        file.attrs["source"] = trajectories.source
        file.attrs["total_episodes"] = trajectories.num_episodes
        file.attrs["total_steps"] = trajectories.num_steps
        for key, value in metadata.items():
            file.attrs[key] = value
        for index in range(trajectories.num_episodes):
            _write_episode(file.create_group(f"episode_{index}"), index, trajectories.episode(index), digest)
    with HdfFile(aside) as written:
        digest.attributes(written.attributes())
    with h5py.File(aside, "a", libver="v110") as file:
        file.attrs[DIGEST] = digest.hex()


def _write_episode(group: h5py.Group, index: int, episode: Episode, digest: Digest) -> None:
    group.attrs["id"] = index
    group.attrs["total_steps"] = len(episode.rewards)
    arrays: dict[str, Any] = {name: getattr(episode, name) for name in REQUIRED}
    arrays |= {key: getattr(episode, name) for key, name in INFOS.items() if getattr(episode, name) is not None}
    for name, array in arrays.items():
        inner = f"infos/{name}" if name in INFOS else name
        group.create_dataset(inner, data=array, chunks=array.shape, fletcher32=True)
    digest.arrays(arrays)


class Digest:
    """SHA-256 of the arrays and attributes of a file, in the order of its episodes."""

    def __init__(self) -> None:
        self._sum = hashlib.sha256()

    def arrays(self, arrays: Mapping[str, Tree]) -> None:
        """Add the arrays of one episode."""
        for name in sorted(arrays):
            array = arrays[name]
            if isinstance(array, Mapping):
                self.arrays(array)
                continue
            self._sum.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
            self._sum.update(np.ascontiguousarray(array).data)

    def attributes(self, attributes: Mapping[str, str]) -> None:
        """Add the attributes of the file."""
        self._sum.update(repr(sorted(item for item in attributes.items() if item[0] != DIGEST)).encode())

    def hex(self) -> str:
        """The sum so far."""
        return self._sum.hexdigest()


def read_episodes(path: Path, options: ReadOptions | None = None) -> Trajectories:
    """Read a file of episodes into memory.

    Args:
        path: A file in Minari's episode layout, with Box observations and actions or Dicts of them.
        options: Bounds of the actions, and what to do with damaged episodes.

    Raises:
        UserError: No such file, not HDF5, a key is missing, has the wrong length or values that cannot be.
    """
    if not path.exists():
        raise UserError(f"No data file {path}. Make one with `python -m eva_rl.collect env=push-v3 out={path}`.")
    parts = list(iterate_episodes(path, options or ReadOptions()))
    return concatenate(parts, source=parts[0].source)


def iterate_episodes(
    path: Path, options: ReadOptions, spaces: Spaces | None = None, origin: Mapping[str, str] | None = None
) -> Iterator[Trajectories]:
    """Read a file of episodes part by part.

    Args:
        path: The file.
        options: Bounds of the actions, and what to do with damaged episodes.
        spaces: What is known of the spaces.
        origin: ``env_id``, ``source`` and metadata of a file that does not say them itself.

    Yields:
        Some whole episodes each.

    Raises:
        UserError: As :func:`read_episodes`.
    """
    with HdfFile(path) as file:
        attributes = file.attributes()
        said = dict(origin or {key: value for key, value in attributes.items() if key not in RESERVED})
        env_id, source = said.pop("env_id", ""), said.pop("source", "") or str(path)
        checker, digest = EpisodeChecker(path, options), Digest()
        pending: list[Episode] = []
        rows = 0
        for name in _episode_names(file, attributes):
            read = partial(_raw_episode, file, name, spaces or Spaces(), options.keys, digest)
            episode = checker.episode(file.source(name), read)
            if episode is not None:
                pending.append(episode)
                rows += len(episode.rewards)
            if rows >= PART_ROWS:
                yield Trajectories.from_episodes(pending, env_id=env_id, source=source, metadata=said)
                pending, rows = [], 0
        if DIGEST in attributes:
            _check_digest(file, digest, attributes)
        checker.close()
        if pending:
            yield Trajectories.from_episodes(pending, env_id=env_id, source=source, metadata=said)


def _check_digest(file: HdfFile, digest: Digest, attributes: Mapping[str, str]) -> None:
    digest.attributes(attributes)
    if digest.hex() != attributes[DIGEST]:
        raise UserError(
            f"{file.path} is damaged or was changed: its content does not have the digest that was written with it. "
            "Copy or collect it again."
        )


def _episode_names(file: HdfFile, attributes: Mapping[str, str]) -> list[str]:
    names = [name for name in file.names() if name.removeprefix("episode_").isdecimal()]
    names = sorted((name for name in names if name.startswith("episode_")), key=lambda name: int(name[8:]))
    if not names:
        raise file.source().missing("episode_0", "groups episode_0, episode_1, ... as in Minari's files", file.names())
    total = attributes.get("total_episodes", "")
    if total:
        expected = int(total) if total.isdecimal() else -1
        file.source("total_episodes").check_rows(len(names), expected, "the file says so")
    return names


def _raw_episode(
    file: HdfFile, name: str, spaces: Spaces, keys: tuple[str, ...], digest: Digest
) -> dict[str, NDArray[Any]]:
    """Arrays of one group of a file."""
    source = file.source(name)
    if not file.is_group(name):
        raise UserError(f"{source} is not a group. Expected one with {', '.join(REQUIRED)}.")
    trees: dict[str, Tree] = {key: read_tree(file, f"{name}/{key}", REQUIRED) for key in REQUIRED}
    infos = [key for key in READ_INFOS if key in file.names(f"{name}/infos")]
    trees |= {key: file.read(f"{name}/infos/{key}") for key in infos}
    digest.arrays(trees)
    raw: dict[str, Any] = {READ_INFOS.get(key, key): value for key, value in trees.items()}
    raw["observations"] = flattened(source / "observations", raw["observations"], spaces.observations, keys)
    raw["actions"] = flattened(source / "actions", raw["actions"], spaces.actions)
    return raw


def read_tree(file: HdfFile, key: str, expected: tuple[str, ...], depth: int = MAX_DEPTH) -> Tree:
    """An array, or the arrays of a group by name.

    Raises:
        UserError: Missing, damaged, or groups within groups without end.
    """
    if not file.is_group(key):
        return file.read(key, expected=", ".join(expected))
    if depth == 0:
        raise UserError(f"{file.source(key)} lies in more than {MAX_DEPTH} groups. Expected arrays.")
    return {name: read_tree(file, f"{key}/{name}", (), depth - 1) for name in file.names(key)}
