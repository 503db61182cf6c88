"""Folders with one file per episode (L2M, LRAM), tables of several episodes, pickled lists of episodes (kzl, L2M)."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eva_rl.data.formats.checks import (
    IN_MEMORY,
    LayoutError,
    Source,
    check_regular_file,
    kind_of_file,
    reader_for,
    warn_of_repeated_ends,
)
from eva_rl.data.formats.episodes import KNOWN, NAMES, Arrays, EpisodeChecker, ReadOptions, standard_names
from eva_rl.data.formats.episodes import with_final_observation as with_final
from eva_rl.data.formats.hdf5 import HdfFile
from eva_rl.data.formats.pickles import read_pickle
from eva_rl.data.formats.spaces import one_array
from eva_rl.data.trajectories import Episode, Trajectories
from eva_rl.errors import UserError

LENGTHS = "episode_lengths.json"
"""Beside files of episodes, where something says how many env steps each has."""
SUFFIXES = {".npz", ".hdf5", ".h5", ".pkl", ".pickle"}
SUCCESS = ("success", "is_success")
"""What infos call success."""
PART_EPISODES = 256
MAX_COMPRESSION = 1100
"""An array is at most so many times larger than its part of a zip archive: deflate reaches 1032."""

Read = Callable[[], Arrays]


def iterate_folder(path: Path, options: ReadOptions) -> Iterator[Trajectories]:
    """Read a folder, or one file, part by part.

    Args:
        path: A folder with ``.npz``, ``.hdf5`` or ``.pkl`` files of one episode each, or one such file, which may also
            hold several episodes one after the other; a pickle may also hold a list of episodes.
        options: How to read it.

    Yields:
        Some whole episodes each.

    Raises:
        UserError: A file is unreadable or holds no episode; with file, key and row.
    """
    if options.keys:
        raise one_array(Source(path, "observations"), options.keys)
    lengths = _stated_lengths(path)
    episodes = (
        (source, partial(_with_length, source, read, lengths.get(file.stem)))
        for file in episode_files(path)
        for source, read in _episodes_of(file, options)
    )
    return checked_parts(str(path), episodes, options)


def iterate_content(content: Any, options: ReadOptions) -> Iterator[Trajectories]:
    """Episodes that are in memory already: a dict of arrays, or a list of such dicts, one an episode.

    Raises:
        UserError: Something else, or one is missing, has the wrong length or values that cannot be.
    """
    return checked_parts(IN_MEMORY, from_content(Source(IN_MEMORY), content), options)


def checked_parts(
    name: str, episodes: Iterable[tuple[Source, Read]], options: ReadOptions, env_id: str = ""
) -> Iterator[Trajectories]:
    """Check episodes one by one and hand them on some at a time.

    Args:
        name: What to call the data.
        episodes: Name of each, for messages, and what reads its arrays; see :meth:`EpisodeChecker.episode`.
        options: How to read them.
        env_id: The task they come from.
    """
    checker = EpisodeChecker(name, options)
    pending: list[Episode] = []
    for source, read in episodes:
        episode = checker.episode(source, read)
        pending += [] if episode is None else [episode]
        if len(pending) >= PART_EPISODES:
            yield Trajectories.from_episodes(pending, env_id=env_id, source=name)
            pending = []
    checker.close()
    if pending:
        yield Trajectories.from_episodes(pending, env_id=env_id, source=name)


def episode_files(path: Path) -> list[Path]:
    """Files of a folder in the order of the numbers in their names; the file itself where it is one.

    Raises:
        UserError: There is none.
    """
    with Source(path).reading():
        folder = path.is_dir()
        files = [file for file in path.iterdir() if _may_be_an_episode(file)] if folder else [path]
    if not files:
        raise UserError(f"{path} holds no episodes. Expected a folder with files {', '.join(sorted(SUFFIXES))}.")
    for file in files:
        check_regular_file(file)
    return sorted(files, key=_natural)


def _may_be_an_episode(file: Path) -> bool:
    return file.suffix in SUFFIXES and not file.name.startswith(".")  # as what macOS leaves beside a file


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _stated_lengths(path: Path) -> dict[str, int]:
    """What ``episode_lengths.json`` says by name, where it is there and says it by name."""
    file = path / LENGTHS
    if not file.exists():
        return {}
    check_regular_file(file)
    with Source(file).reading():
        stated = json.loads(file.read_text())
    items = stated.items() if isinstance(stated, dict) else ()
    return {_without_suffix(Path(name)): length for name, length in items if isinstance(length, int)}


def _without_suffix(file: Path) -> str:
    return file.stem if file.suffix in SUFFIXES else file.name


def _with_length(source: Source, read: Read, stated: int | None) -> Arrays:
    raw = read()
    if stated is not None:
        (source / "rewards").check_rows(len(np.atleast_1d(raw["rewards"])), stated, LENGTHS)
    return raw


def _episodes_of(file: Path, options: ReadOptions) -> Iterator[tuple[Source, Read]]:
    """Name of each episode in a file, for messages, and what reads its arrays."""
    source = Source(file)
    if file.suffix in {".pkl", ".pickle"}:
        yield from from_content(source, read_pickle(file, options.allow_pickle))
    elif file.suffix in SUFFIXES:
        try:
            episodes = _split_file(source, file)
        except UserError:
            if not options.skip_damaged:
                raise
            yield source, partial(_raised_again, source, file)  # and counted as a damaged episode
            return
        yield from episodes
    else:
        kind = kind_of_file(file)
        raise UserError(
            f"{file}{kind and f' is {kind}'}: expected a file {', '.join(sorted(SUFFIXES))}. Convert it, "
            "for instance with numpy.savez(FILE, observations=..., actions=..., rewards=..., terminals=...)."
        )


def _split_file(source: Source, file: Path) -> list[tuple[Source, Read]]:
    return list(split(source, _read_npz(file) if file.suffix == ".npz" else _read_hdf5(file)))


def _raised_again(source: Source, file: Path) -> Arrays:
    return _split_file(source, file)[0][1]()


def from_content(source: Source, content: Any) -> Iterator[tuple[Source, Read]]:
    """Episodes of a dict of arrays, or of a list of such dicts, one an episode.

    Raises:
        UserError: It is something else, or empty.
    """
    if isinstance(content, Mapping):
        yield from split(source, _known_arrays(source, content))
        return
    if not isinstance(content, Sequence) or not all(isinstance(episode, Mapping) for episode in content):
        kind = type(content).__name__
        raise UserError(f"{source} holds a {kind}, expected a dict of arrays, or a list of such dicts, one an episode.")
    if not content:
        raise UserError(f"{source} holds no episode.")
    for index, episode in enumerate(content):
        inner = source / f"episode_{index}"
        yield inner, partial(_one_of_list, inner, episode)


def _one_of_list(source: Source, episode: Mapping[Any, Any]) -> Arrays:
    return with_final(source, standard_names(source, _known_arrays(source, episode)))


def _known_arrays(source: Source, content: Mapping[Any, Any]) -> Arrays:
    """The arrays of a dict that have a usual name; all of them where one is missing, for the message."""
    content = {name: value for name, value in content.items() if value is not None}
    known = {name: content[name] for name in content if name in KNOWN}
    if not known.keys() & NAMES["successes"] and (told := _success_in(content.get("infos"))) is not None:
        known["success"] = told
    standard_names(source, dict.fromkeys(map(str, content), np.zeros(0)))
    arrays = {}
    for name, value in known.items():
        if isinstance(value, Mapping):
            raise LayoutError(
                f"{source / name} is a dictionary of {', '.join(map(str, value))}; a policy sees one row of numbers. "
                "Lay its parts side by side in the order of the environment's own space, with np.concatenate(..., 1)."
            )
        with (source / name).reading():
            arrays[name] = value if isinstance(value, np.ndarray) else np.asarray(value, np.float64)
    return arrays


def _success_in(infos: Any) -> Any:
    """What Gymnasium's infos, a dict of arrays or one dict an env step, tell of success; None where they do not."""
    for name in SUCCESS:
        told = None
        if isinstance(infos, Mapping):
            told = infos.get(name)
        elif isinstance(infos, Sequence) and all(isinstance(info, Mapping) for info in infos):
            told = [info.get(name) for info in infos]
            told[:1] = [False if first is None else first for first in told[:1]]  # that of reset() tells nothing
        if told is not None and _tells(told):
            return told
    return None


def _tells(success: Any) -> bool:
    """Whether these are numbers: None and NaN tell nothing."""
    values = np.asarray(success)
    return values.dtype.kind in "biuf" and not np.isnan(values).any()


def split(source: Source, arrays: Arrays) -> Iterator[tuple[Source, Read]]:
    """The episodes of a table: one where the only end is in the last row, else cut behind each end.

    Raises:
        UserError: Columns differ in length, or flags are neither 0 nor 1.
    """
    raw = standard_names(source, arrays)
    inside = [name for name in ("terminations", "truncations") if name in raw and _ends_inside(raw[name])]
    if not inside:
        yield source, partial(with_final, source, raw)
        return
    if Path(source.path).suffix in {".hdf5", ".h5"} and "terminals" in arrays:
        first = int(np.flatnonzero(np.ravel(raw[inside[0]]))[0])
        raise UserError(
            f"{(source / inside[0]).at(first)}: an episode ends there and the file goes on: it holds several episodes. "
            f"{reader_for(arrays, source.path)}"
        )
    rows = len(np.atleast_1d(raw["rewards"]))
    for name, column in raw.items():
        (source / name).check_rows(len(np.atleast_1d(column)), rows, f"there are {rows} rewards")
    flags = [(source / name).flags(raw[name]) for name in ("terminations", "truncations") if name in raw]
    ends = np.logical_or.reduce(flags)
    warn_of_repeated_ends(source, ends)
    stops = [int(row) + 1 for row in np.flatnonzero(ends)]
    stops += [rows] if stops[-1] < rows else []
    for index, (first, last) in enumerate(pairwise([0, *stops])):
        own = {name: column[first:last] for name, column in raw.items()}
        inner = replace(source / f"episode_{index}", row=first)
        yield inner, partial(with_final, inner, own)


def _ends_inside(flags: NDArray[Any]) -> bool:
    flags = np.asarray(flags)
    return flags.dtype.kind in "fiub" and bool(np.ravel(flags)[:-1].any())


def _read_npz(file: Path) -> Arrays:
    source = Source(file)
    with source.reading(), zipfile.ZipFile(file) as archive:
        infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        for info in infos.values():
            if info.file_size > MAX_COMPRESSION * info.compress_size or info.compress_size > file.stat().st_size:
                raise UserError(f"{source / info.filename} claims {info.file_size} bytes, more than the file can hold.")
    standard_names(source, dict.fromkeys(infos, np.zeros(0)))
    with source.reading(), np.load(file, allow_pickle=False) as arrays:
        return {name: _checked_member(source / name, arrays, infos[name]) for name in infos if name in KNOWN}


def _checked_member(source: Source, arrays: Any, info: zipfile.ZipInfo) -> NDArray[Any]:
    """An array whose header claims no more than the archive holds of it."""
    with arrays.zip.open(info) as member:
        version = np.lib.format.read_magic(member)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read_header[version](member)
    claimed = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
    if claimed > info.file_size:
        raise UserError(f"{source} claims {claimed} bytes, the archive holds {info.file_size}. It is damaged.")
    array: NDArray[Any] = arrays[source.key]
    return array


def _read_hdf5(file: Path) -> Arrays:
    with HdfFile(file) as root:
        standard_names(root.source(), dict.fromkeys(root.names(), np.zeros(0)))
        found = {name: root.read(name) for name in root.names() if name in KNOWN}
        if found.keys() & NAMES["successes"]:
            return found
        told = _success_in({name: root.read(f"infos/{name}") for name in root.names("infos") if name in SUCCESS})
        return found if told is None else found | {"success": told}
