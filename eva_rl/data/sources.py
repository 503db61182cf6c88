"""One way to name data: ``d4rl:``, ``minari:`` and ``trajectories:``."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np

from eva_rl.data.formats import d4rl_names
from eva_rl.data.formats.checks import ActionBounds
from eva_rl.data.formats.d4rl import read_d4rl
from eva_rl.data.formats.episode_folder import episode_files, iterate_folder
from eva_rl.data.formats.minari import iterate_minari, minari_folder
from eva_rl.data.formats.minari_file import is_episode_file, iterate_episodes
from eva_rl.data.formats.store import FORMAT, gather, is_store, read_store
from eva_rl.data.trajectories import Trajectories
from eva_rl.errors import UnknownNameError, UserError

log = logging.getLogger(__name__)

KINDS = ("d4rl", "minari", "trajectories")
OUTSIDE = ("check", "clip", "keep")
MEMORY_FRACTION = 0.25
"""Data are mapped instead of read when their files are larger than this part of the machine's memory."""


@dataclass(frozen=True)
class Source:
    """A parsed source.

    Attributes:
        kind: One of :data:`KINDS`.
        name: Path, name or id.
        horizon: Env steps of an episode, for D4RL files without timeouts; None takes what the name says.
        actions: What to do with actions out of bounds: ``check``, ``clip`` or ``keep``.
    """

    kind: str
    name: str
    horizon: int | None = None
    actions: str = "check"


def parse_source(text: str) -> Source:
    """Parse ``KIND:NAME?horizon=STEPS&actions=check|clip|keep``; a path without a kind is ``trajectories:``.

    Raises:
        UserError: No such kind or option.
    """
    body, _, query = text.partition("?")
    kind, colon, name = body.partition(":")
    if not colon or "/" in kind or "\\" in kind:
        kind, name = "trajectories", body
    if kind not in KINDS:
        raise UnknownNameError(
            "kind of data", kind, KINDS, f"Expected {', '.join(f'{k}:NAME' for k in KINDS)} or a path."
        )
    if not name:
        raise UserError(f"{text!r} names no data. Expected for instance d4rl:hopper-medium-v2 or {kind}:NAME.")
    source = Source(kind, name)
    for key, value in parse_qsl(query, keep_blank_values=True):
        source = _with_option(source, key, value)
    return source


def _with_option(source: Source, key: str, value: str) -> Source:
    if key == "actions" and value in OUTSIDE:
        return replace(source, actions=value)
    if key == "horizon" and value.isdecimal() and 0 < int(value) < 10**9:
        return replace(source, horizon=int(value))
    if key in {"actions", "horizon"}:
        expected = " or ".join(OUTSIDE) if key == "actions" else "a number of env steps"
        raise UserError(f"{key}={value!r} in the data source: expected {expected}.")
    raise UnknownNameError("option of a data source", key, ("actions", "horizon"))


def cache_folder() -> Path:
    """Where downloads and memory maps are kept: ``EVA_RL_CACHE`` or ``~/.cache/eva-rl``."""
    return Path(os.environ.get("EVA_RL_CACHE") or "~/.cache/eva-rl").expanduser()


def load_dataset(
    source: str,
    *,
    allow_pickle: bool = False,
    memory_map: bool | None = None,
    action_bounds: tuple[Iterable[float], Iterable[float]] | None = None,
) -> Trajectories:
    """Load offline data.

    Args:
        source: ``d4rl:NAME`` or ``d4rl:PATH``, ``minari:ID``, ``trajectories:PATH`` (a file of this package, a store,
            a folder with one ``.npz``, ``.hdf5`` or ``.pkl`` per episode, or a pickled list), or just a path.
            ``?actions=clip`` and ``?horizon=1000`` may follow.
        allow_pickle: Whether pickles may be opened; even then only numpy arrays and builtin containers are admitted.
        memory_map: Whether to keep a flat copy in :func:`cache_folder` and map it instead of reading everything into
            memory; None decides by size.
        action_bounds: Lowest and highest action, each (act,), where the data do not say them themselves.

    Returns:
        Whole episodes, checked: numbers are finite, actions within known bounds, and no episode is empty.

    Raises:
        UserError: Nothing there, or not what it should be; with file, key and row.
    """
    parsed = parse_source(source)
    path = locate(parsed)
    if parsed.kind == "trajectories" and is_store(path):
        return replace(read_store(path), source=source)
    mapped = memory_map if memory_map is not None else _too_large(path)
    folder = _store_folder(source, path) if mapped else None
    if folder is not None and is_store(folder):
        return replace(read_store(folder), source=source)
    bounds = None
    if action_bounds is not None:
        low, high = (np.asarray(list(side), np.float32) for side in action_bounds)
        bounds = ActionBounds(low, high, parsed.actions)
    return gather(_parts(parsed, path, bounds, allow_pickle), source, folder)


def locate(source: Source) -> Path:
    """File or folder of a source; data sets known by name are downloaded where they are missing.

    Raises:
        UserError: It is not there.
    """
    if source.kind == "minari":
        return minari_folder(source.name)
    path = Path(source.name).expanduser()
    if source.kind == "d4rl" and not path.exists() and path.suffix not in {".hdf5", ".h5"}:
        return d4rl_names.resolve(source.name, cache_folder() / "d4rl")
    if not path.exists():
        raise UserError(
            f"No data at {path}. Name an existing file or folder; `python -m eva_rl.datasets` lists what is known, and "
            "`python -m eva_rl.collect` makes new data."
        )
    return path


def _parts(source: Source, path: Path, bounds: ActionBounds | None, allow_pickle: bool) -> Iterator[Trajectories]:
    if source.kind == "minari":
        return iterate_minari(source.name, source.actions)
    if source.kind == "d4rl":
        return _d4rl_parts(source, path, bounds)
    if path.suffix in {".h5", ".hdf5"} and is_episode_file(path):
        return iterate_episodes(path, bounds)
    return iterate_folder(path, bounds, allow_pickle)


def _d4rl_parts(source: Source, path: Path, bounds: ActionBounds | None) -> Iterator[Trajectories]:
    name = path.stem if Path(source.name).suffix else source.name
    for fault in d4rl_names.known_faults(name):
        log.warning("%s: %s.", name, fault)
    rules = d4rl_names.conventions(name)
    if source.horizon is not None:
        rules = replace(rules, horizon=source.horizon)
    if bounds is None and rules.unit_actions:
        bounds = ActionBounds(-1.0, 1.0, source.actions)
    return read_d4rl(path, rules, bounds, {"dataset": name})


def _too_large(path: Path) -> bool:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return sum(file.stat().st_size for file in _files(path)) > MEMORY_FRACTION * memory


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / "metadata.json").is_file():
        return [file for file in path.iterdir() if file.is_file()]
    return episode_files(path)


def _store_folder(source: str, path: Path) -> Path:
    """A folder whose name changes when the files or the way they are read do."""
    digest = hashlib.sha256(f"{FORMAT}|{source}|{path.resolve()}".encode())
    for file in _files(path):
        found = file.stat()
        digest.update(f"|{file.name}|{found.st_size}|{found.st_mtime_ns}".encode())
    return cache_folder() / "stores" / f"{path.stem}-{digest.hexdigest()[:16]}"
