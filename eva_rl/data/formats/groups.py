"""HDF5 files of other libraries that keep each episode by itself: d3rlpy's and robomimic's.

Sources: ``d3rlpy/dataset/io.py`` of https://github.com/takuseno/d3rlpy, and robomimic's documentation,
https://robomimic.github.io/docs/datasets/overview.html.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from eva_rl.data.formats.checks import Source
from eva_rl.data.formats.episode_folder import Read, checked_parts
from eva_rl.data.formats.episodes import Arrays, ReadOptions, standard_names, with_final_observation
from eva_rl.data.formats.hdf5 import HdfFile
from eva_rl.data.formats.spaces import INDEX, Tree, flattened
from eva_rl.data.trajectories import Trajectories

DEMO_KEYS = ("obs", "next_obs", "actions", "rewards")


def layout_of(path: Path) -> str:
    """Whose layout an HDF5 file has: ``minari``, ``d3rlpy``, ``robomimic``, or "" for a table or another file."""
    if path.suffix not in {".h5", ".hdf5"} or path.is_dir():
        return ""
    with HdfFile(path) as file:
        names = file.names()
        if any(name.startswith("episode_") and file.is_group(name) for name in names):
            return "minari"
        if "observations_0" in names or "observations_0_0" in names:
            return "d3rlpy"
        return "robomimic" if any(name.startswith("demo_") for name in file.names("data")) else ""


def iterate_d3rlpy(path: Path, options: ReadOptions) -> Iterator[Trajectories]:
    """Read what d3rlpy's ``ReplayBuffer.dump`` writes, version 2.1: ``observations_0``, ``actions_0``, ...

    Its version 1 is a table, which ``d4rl:`` reads.

    Raises:
        UserError: As :func:`eva_rl.data.formats.episode_folder.iterate_folder`.
    """
    with HdfFile(path) as file:
        held = frozenset(file.names())  # once: there are several an episode
        numbers = sorted({int(name.split("_")[1]) for name in held if re.fullmatch(r"actions_\d+", name)})
        read = partial(_d3rlpy_episode, file, held, options.keys)
        episodes = ((file.source(f"episode_{i}"), partial(read, i)) for i in numbers)
        yield from checked_parts(str(path), episodes, options)


def _d3rlpy_episode(file: HdfFile, held: frozenset[str], keys: tuple[str, ...], number: int) -> Arrays:
    source = file.source(f"episode_{number}")
    arrays: dict[str, Any] = {}
    for key in ("observations", "actions", "rewards"):
        name = f"{key}_{number}"
        parts = list(takewhile(held.__contains__, (f"{name}_{i}" for i in count())))
        if name in held:
            arrays[key] = file.read(name)
        elif parts:
            tree: Tree = {f"{INDEX}{i}": file.read(part) for i, part in enumerate(parts)}
            arrays[key] = flattened(source / key, tree, None, keys)
    flag = f"terminated_{number}"
    return _one_episode(source, arrays, flag in held and file.scalar(flag) != 0)


def _one_episode(source: Source, arrays: dict[str, Any], terminated: bool) -> Arrays:
    """One episode; where it was not terminated, it ran into its time limit."""
    raw = with_final_observation(source, standard_names(source, arrays))
    steps = np.size(raw["rewards"])
    ends = np.arange(steps) == steps - 1
    return raw | {"terminations": ends & terminated, "truncations": ends & (not terminated)}


def iterate_robomimic(path: Path, options: ReadOptions) -> Iterator[Trajectories]:
    """Read robomimic's ``data/demo_0``, ...; ``?keys=`` says which observations a policy sees, and in which order.

    Each demonstration is one episode, truncated at its last env step: its ``dones`` may mark several rows, and do not
    say why it ended.

    Raises:
        UserError: As :func:`eva_rl.data.formats.episode_folder.iterate_folder`, or the order is not known.
    """
    with HdfFile(path) as file:
        demos = sorted((name for name in file.names("data") if re.fullmatch(r"demo_\d+", name)), key=_number)
        episodes: Iterator[tuple[Source, Read]] = (
            (file.source(f"data/{demo}"), partial(_demo, file, f"data/{demo}", options.keys)) for demo in demos
        )
        yield from checked_parts(str(path), episodes, options, _env_name(file))


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def _env_name(file: HdfFile) -> str:
    try:
        said = json.loads(file.attribute("env_args", "data") or "{}")
    except (ValueError, RecursionError):
        return ""
    return str(said.get("env_name", "")) if isinstance(said, dict) else ""


def _demo(file: HdfFile, group: str, keys: tuple[str, ...]) -> Arrays:
    source, held = file.source(group), file.names(group)
    if "obs" not in held:  # states are the simulator's, other names are of other layouts
        raise source.missing("obs", "robomimic's name of the observations", held)
    standard_names(source, {name: np.zeros(0) for name in held})
    arrays: dict[str, Any] = {}
    for key in DEMO_KEYS:
        if file.is_group(f"{group}/{key}"):
            names = keys or file.names(f"{group}/{key}")
            tree: Tree = {name: file.read(f"{group}/{key}/{name}") for name in names}
            arrays[key] = flattened(source / key, tree, None, keys)
        elif key in held:
            arrays[key] = file.read(f"{group}/{key}")
    return _one_episode(source, arrays, terminated=False)
