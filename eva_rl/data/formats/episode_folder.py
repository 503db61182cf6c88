"""Folders with one file per episode (L2M, LRAM), and pickled lists of episodes (kzl, L2M).

Accepted names of the arrays, first found wins: see :data:`NAMES`. ``dones`` does not say why an episode ended; it is
read as a truncation, which is what it is in Meta-World and DM Control, where all episodes end by their time limit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eva_rl.data.formats import hdf5
from eva_rl.data.formats.checks import ActionBounds, check_dims, check_rows, checked_episode, place, reading
from eva_rl.data.formats.pickles import read_pickle
from eva_rl.data.trajectories import Episode, Trajectories
from eva_rl.errors import UserError

NAMES = {
    "observations": ("observations", "states", "obs"),
    "actions": ("actions",),
    "rewards": ("rewards",),
    "next_observations": ("next_observations",),
    "terminations": ("terminations", "terminals"),
    "truncations": ("truncations", "timeouts", "dones"),
    "successes": ("successes", "success"),
}
REQUIRED = ("observations", "actions", "rewards")
SUFFIXES = {".npz", ".hdf5", ".h5", ".pkl", ".pickle"}
PART_EPISODES = 256

Arrays = Mapping[str, NDArray[Any]]


def iterate_folder(path: Path, bounds: ActionBounds | None, allow_pickle: bool) -> Iterator[Trajectories]:
    """Read a folder, or one file, part by part.

    Args:
        path: A folder with ``.npz``, ``.hdf5`` or ``.pkl`` files of one episode each, or one such file; a pickle may
            also hold a list of episodes.
        bounds: Of the actions.
        allow_pickle: Whether pickles may be opened.

    Yields:
        Some whole episodes each.

    Raises:
        UserError: A file is unreadable or holds no episode; with file, key and row.
    """
    files = episode_files(path)
    lengths = _stated_lengths(path)
    pending: list[Episode] = []
    first: Episode | None = None
    for file in files:
        for where, arrays in _episodes_of(file, allow_pickle):
            episode = _episode(file, where, arrays, bounds)
            first = first or episode
            check_dims(file, where, episode, first)
            if file.stem in lengths:
                check_rows(file, where + "rewards", len(episode.rewards), lengths[file.stem], "episode_lengths.json")
            pending.append(episode)
        if len(pending) >= PART_EPISODES or (pending and file == files[-1]):
            yield Trajectories.from_episodes(pending, source=str(path))
            pending = []


def episode_files(path: Path) -> list[Path]:
    """Files of a folder in the order of the numbers in their names; the file itself where it is one.

    Raises:
        UserError: There is none.
    """
    if path.is_file():
        return [path]
    with reading(path):
        files = [file for file in path.iterdir() if file.suffix in SUFFIXES] if path.is_dir() else []
    if not files:
        raise UserError(f"{path} holds no episodes. Expected a folder with files {', '.join(sorted(SUFFIXES))}.")
    return sorted(files, key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _stated_lengths(path: Path) -> dict[str, int]:
    """What ``episode_lengths.json`` says by name, where it is there and says it by name."""
    file = path / "episode_lengths.json"
    if not file.is_file():
        return {}
    with reading(file):
        stated = json.loads(file.read_text())
    items = stated.items() if isinstance(stated, dict) else ()
    return {Path(name).stem: length for name, length in items if isinstance(length, int)}


def _episodes_of(file: Path, allow_pickle: bool) -> Iterator[tuple[str, Arrays]]:
    """Name of each episode in a file, for messages, and its arrays."""
    if file.suffix == ".npz":
        yield "", _read_npz(file)
    elif file.suffix in {".pkl", ".pickle"}:
        yield from _unpickled(file, read_pickle(file, allow_pickle))
    else:
        yield "", _read_hdf5(file)


def _read_npz(file: Path) -> Arrays:
    with reading(file), np.load(file, allow_pickle=False) as archive:
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise UserError(f"{file} is not an .npz archive.")
        wanted = [name for names in NAMES.values() for name in names if name in archive.files]
        return {name: archive[name] for name in wanted}


def _read_hdf5(file: Path) -> Arrays:
    with hdf5.open_hdf5(file) as root:
        known = {name for names in NAMES.values() for name in names}
        found = [name for name in hdf5.keys(file, root) if name in known]
        return {name: hdf5.read(file, name, hdf5.array(file, root, name)) for name in found}


def _unpickled(file: Path, content: Any) -> Iterator[tuple[str, Arrays]]:
    episodes = [content] if isinstance(content, dict) else content
    if not isinstance(episodes, list | tuple) or not all(isinstance(episode, dict) for episode in episodes):
        raise UserError(f"{file} holds a {type(content).__name__}, expected a list of dicts of arrays, one an episode.")
    if not episodes:
        raise UserError(f"{file} holds no episode.")
    for index, episode in enumerate(episodes):
        known = {name for names in NAMES.values() for name in names} & episode.keys()
        with reading(file, f"episode {index}"):
            arrays = {name: np.asarray(episode[name]) for name in known}
        yield f"episode {index}: ", arrays


def _episode(file: Path, where: str, arrays: Arrays, bounds: ActionBounds | None) -> Episode:
    found = {key: next((n for n in names if n in arrays), None) for key, names in NAMES.items()}
    for key in REQUIRED:
        if found[key] is None:
            raise UserError(f"{place(file, where + key)} is missing; expected {' or '.join(NAMES[key])}.")
    raw = {key: arrays[name] for key, name in found.items() if name is not None}
    rewards = np.asarray(raw["rewards"])
    steps = len(rewards) if rewards.ndim else 0
    raw["observations"] = _with_final(file, where, raw, steps)
    raw.pop("next_observations", None)
    none = np.zeros(steps, bool)
    raw.setdefault("terminations", none)
    if "truncations" not in raw:
        raw["truncations"] = none.copy()
        if steps and not np.asarray(raw["terminations"]).reshape(-1)[-1:].any():
            raw["truncations"][-1] = True  # the file ends here and no terminal says why
    return checked_episode(file, where, raw, bounds)


def _with_final(file: Path, where: str, raw: Arrays, steps: int) -> NDArray[Any]:
    """Observations with the one after the last env step; where it is not noted, the last one is repeated."""
    observations = np.asarray(raw["observations"])
    if observations.ndim == 0 or len(observations) != steps or steps == 0:
        return observations  # T + 1 rows already; anything else is reported with its length
    following = np.asarray(raw["next_observations"]) if "next_observations" in raw else observations
    if following.shape != observations.shape:
        raise UserError(
            f"{place(file, where + 'next_observations')} has shape {following.shape}, expected {observations.shape}."
        )
    return np.concatenate([observations, following[-1:]])
