"""One way to name data: ``d4rl:``, ``minari:`` and ``trajectories:``."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from eva_rl.data.arrays import MEMORY_FRACTION, cache_folder
from eva_rl.data.formats import d4rl_names
from eva_rl.data.formats.checks import IN_MEMORY, ActionBounds, Source
from eva_rl.data.formats.d4rl import read_d4rl
from eva_rl.data.formats.episode_folder import LENGTHS, episode_files, iterate_content, iterate_folder
from eva_rl.data.formats.episodes import ReadOptions, unknown_bounds
from eva_rl.data.formats.groups import iterate_d3rlpy, iterate_robomimic, layout_of
from eva_rl.data.formats.minari import METADATA, iterate_minari, minari_data_folder, minari_folder
from eva_rl.data.formats.minari_file import iterate_episodes
from eva_rl.data.formats.spaces import one_array
from eva_rl.data.formats.store import FORMAT, is_store, read_store, write_store
from eva_rl.data.trajectories import Trajectories, concatenate
from eva_rl.errors import UnknownNameError, UserError
from eva_rl.files import alone, expanded
from eva_rl.limits.memory import memory_limit

log = logging.getLogger(__name__)

GivenData = str | Path | Trajectories | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""A source by its name, or the data themselves."""
Side = float | Iterable[float]
"""One side of the bounds of actions."""
KINDS = ("d4rl", "minari", "trajectories")
D4RL_FILES = {".hdf5", ".h5"}
OUTSIDE = ("check", "clip", "keep")
OPTIONS = ("actions", "horizon", "keys")
CHECK_ROWS = 1 << 18
"""Rows of a mapped array that are looked at at a time."""
READING = 2
"""Raised where a file is read as other episodes than before, so that it is converted again."""


@dataclass(frozen=True)
class ParsedSource:
    """A parsed source.

    Attributes:
        kind: One of :data:`KINDS`.
        name: Path, name or id.
        horizon: Env steps of an episode at most, for D4RL files; None takes what the name says where timeouts are
            missing.
        actions: What to do with actions out of bounds: ``check``, ``clip`` or ``keep``.
        keys: Parts of Dict observations in their order; none takes the data's own.
    """

    kind: str
    name: str
    horizon: int | None = None
    actions: str = "check"
    keys: tuple[str, ...] = ()


def parse_source(text: str) -> ParsedSource:
    """Parse ``KIND:NAME?horizon=STEPS&actions=check|clip|keep&keys=a,b``; without a kind it is ``trajectories:``.

    Raises:
        UserError: No such kind or option.
    """
    body, query = _without_options(text)
    kind, colon, name = body.partition(":")
    if not colon or "/" in kind or "\\" in kind:
        kind, name = "trajectories", body
    if kind not in KINDS:
        raise UnknownNameError(
            "kind of data", kind, KINDS, f"Expected {', '.join(f'{k}:NAME' for k in KINDS)} or a path."
        )
    if not name:
        raise UserError(f"{text!r} names no data. Expected, for instance, d4rl:hopper-medium-v2 or {kind}:NAME.")
    source = ParsedSource(kind, name)
    for key, value in parse_qsl(query, keep_blank_values=True):
        source = _with_option(source, key, value)
    if source.horizon is not None and kind != "d4rl":
        raise UserError(
            f"horizon={source.horizon} in the data source: only d4rl: cuts episodes by their length. Leave out."
        )
    if source.keys and kind == "d4rl":
        raise UserError(
            f"keys={','.join(source.keys)} in the data source: observations of d4rl: have no parts. Leave out."
        )
    return source


def _without_options(text: str) -> tuple[str, str]:
    """A source and its options: what follows the last ``?``, unless a path with that name is there."""
    body, mark, query = text.rpartition("?")
    kind, colon, path = text.partition(":")
    paths = [text, path] if colon and kind in KINDS else [text]
    there = any(os.path.lexists(expanded(name)) for name in paths)
    return (body, query) if mark and "=" in query and not there else (text, "")


def _with_option(source: ParsedSource, key: str, value: str) -> ParsedSource:
    if key == "actions" and value in OUTSIDE:
        return replace(source, actions=value)
    if key == "horizon" and value.isdecimal() and 0 < int(value) < 10**9:
        return replace(source, horizon=int(value))
    if key == "keys" and all(value.split(",")):
        return replace(source, keys=tuple(value.split(",")))
    if key not in OPTIONS:
        raise UnknownNameError("option of a data source", key, OPTIONS)
    expected = {"actions": " or ".join(OUTSIDE), "horizon": "a number of env steps"}.get(key, "names joined by commas")
    raise UserError(f"{key}={value!r} in the data source: expected {expected}.")


def load_dataset(
    source: GivenData,
    *,
    allow_pickle: bool = False,
    memory_map: bool | None = None,
    action_bounds: tuple[Side, Side] | None = None,
    skip_damaged: bool = False,
) -> Trajectories:
    """Load offline data.

    Args:
        source: ``d4rl:NAME`` or ``d4rl:PATH``, ``minari:ID``, ``trajectories:PATH`` (a file of this package, a store,
            a folder with one ``.npz``, ``.hdf5`` or ``.pkl`` per episode, a pickled list, or a file of d3rlpy or
            robomimic), or just a path; ``?actions=clip``, ``?horizon=1000`` and ``?keys=a,b`` may follow. Or the data
            themselves: a dict of arrays under their usual names (``observations`` (N, obs), ``actions`` (N, act),
            ``rewards``, ``terminations``, ``truncations`` (N,)), or a list of such dicts, one an episode, whose
            observations may be (T + 1, obs). Names of D4RL and Minari are downloaded unless they are there; what the
            scripted experts show comes from :func:`eva_rl.rollouts.experts.collect_expert`.
        allow_pickle: Whether pickles may be opened; even then only numpy arrays and builtin containers are admitted.
        memory_map: Whether to keep a flat copy in the cache (``EVA_RL_CACHE``) and map it instead of reading everything
            into memory; None decides by size.
        action_bounds: Lowest and highest action of the task, each (act,) or a number; None takes those that the data
            say.
        skip_damaged: Whether episodes that are damaged, such as those without the observation after their last env
            step, are left out, with a warning, instead of refused.

    Returns:
        Whole episodes, flat: N env steps of E episodes, ``final_observations`` (E, obs), ``offsets`` (E + 1,). They are
        checked: numbers are finite, actions within known bounds, and no episode is empty.

    Raises:
        UserError: Nothing there, or not what it should be; with file, key and row.
    """
    if not isinstance(source, str | Path):
        return _given(source, ReadOptions(_bounds(action_bounds), skip_damaged=skip_damaged))
    source = str(source)
    parsed = parse_source(source)
    bounds = _bounds(action_bounds, parsed.actions)
    options = ReadOptions(bounds, parsed.actions, allow_pickle, skip_damaged, parsed.keys)
    path = locate(parsed)
    if parsed.kind == "trajectories" and is_store(path):
        if parsed.keys:
            raise one_array(Source(path, "observations"), parsed.keys)
        if parsed.actions == "clip" and bounds is None:
            raise unknown_bounds(path)
        return _bounded_store(read_store(path), source, bounds)
    if memory_map if memory_map is not None else _too_large(path):
        return _converted(parsed, path, options, _store_folder(source, path, options), source)
    return concatenate(list(_parts(parsed, path, options)), source=source)


def _converted(parsed: ParsedSource, path: Path, options: ReadOptions, folder: Path, source: str) -> Trajectories:
    """The data as a store in the cache; of processes that want it at once, one makes it."""
    if not is_store(folder):
        with alone(folder, "EVA_RL_CACHE"):
            if not is_store(folder):
                write_store(folder, _parts(parsed, path, options), source)
    return replace(read_store(folder), source=source)


def _bounds(sides: tuple[Side, Side] | None, outside: str = "check") -> ActionBounds | None:
    if sides is None:
        return None
    try:
        low, high = (np.asarray(list(side) if isinstance(side, Iterable) else side, np.float32) for side in sides)
        ordered = bool((low <= high).all())
    except (TypeError, ValueError):
        ordered = False
    if not ordered:
        raise UserError(
            f"action_bounds={sides!r}: expected the lowest and the highest action, (LOW, HIGH), each a number or one "
            "for each of an action's."
        )
    return ActionBounds(low, high, outside)


def _given(source: Any, options: ReadOptions) -> Trajectories:
    """Data that are in memory already."""
    if isinstance(source, Trajectories):
        return _bounded_store(source, source.source, options.bounds)
    if not isinstance(source, Mapping | list | tuple):
        raise UserError(
            f"load_dataset was given a {type(source).__name__}. Expected a source such as 'd4rl:hopper-medium-v2' or "
            "a path, a dict of arrays (observations, actions, rewards, terminations, truncations), or a list of such "
            "dicts, one an episode. Flat arrays: Trajectories.from_arrays(observations, actions, rewards, ...)."
        )
    return concatenate(list(iterate_content(source, options)), source=IN_MEMORY)


def _bounded_store(data: Trajectories, source: str, bounds: ActionBounds | None) -> Trajectories:
    """The same with actions within their bounds, looked at part by part; a clipped copy of them is in memory."""
    data = replace(data, source=source)
    if bounds is None:
        return data
    for name in ("actions", "target_actions"):
        rows = getattr(data, name)
        parts = [
            Source(source or "trajectories", name, begin).bounded(rows[begin : begin + CHECK_ROWS], bounds)
            for begin in range(0, 0 if rows is None else len(rows), CHECK_ROWS)
        ]
        if parts and bounds.outside == "clip":
            changed: dict[str, Any] = {name: np.concatenate(parts)}
            data = replace(data, **changed)
    return data


def locate(source: ParsedSource) -> Path:
    """File or folder of a source; data sets known by name are downloaded where they are missing.

    Raises:
        UserError: It is not there.
    """
    if source.kind == "minari":
        return minari_folder(source.name)
    path = expanded(source.name)
    with Source(path).reading():
        exists = path.exists()
    if source.kind == "d4rl" and not exists and path.suffix not in D4RL_FILES:
        return d4rl_names.resolve(source.name, cache_folder() / "d4rl")
    if not exists:
        raise UserError(
            f"No data at {path}. Name an existing file or folder; `python -m eva_rl.datasets` lists what is known, and "
            "`python -m eva_rl.collect` makes new data."
        )
    return path


def check_file(text: str) -> None:
    """Raise unless what a source names as a file or folder is there; names of data sets are not looked up.

    Raises:
        UserError: No such kind or option of a source, or nothing there.
    """
    source = parse_source(text)
    if source.kind == "trajectories" or Path(source.name).suffix in D4RL_FILES:
        locate(source)


def _parts(source: ParsedSource, path: Path, options: ReadOptions) -> Iterator[Trajectories]:
    if source.kind == "minari":
        return iterate_minari(path, source.name, options)
    if source.kind == "d4rl":
        return _d4rl_parts(source, path, options)
    folder = minari_data_folder(path)
    if folder is not None:
        return iterate_minari(folder, source.name, options)
    layout = layout_of(path)
    if layout == "minari":
        beside = minari_data_folder(path.parent) if path.name == "main_data.hdf5" else None
        return iterate_episodes(path, options) if beside is None else iterate_minari(beside, source.name, options)
    other = {"d3rlpy": iterate_d3rlpy, "robomimic": iterate_robomimic}.get(layout, iterate_folder)
    return other(path, options)


def _d4rl_parts(source: ParsedSource, path: Path, options: ReadOptions) -> Iterator[Trajectories]:
    name = path.resolve().stem if Path(source.name).suffix else source.name
    for fault in d4rl_names.known_faults(name):
        log.warning("%s: %s.", name, fault)
    rules = d4rl_names.conventions(name)
    if options.skip_damaged:
        raise UserError(
            f"data.skip_damaged=true: {path} is one table, in which a damaged row may be the end of an episode. Leave "
            "it out, and repair the rows that the message names."
        )
    if source.horizon is not None:
        rules = replace(rules, horizon=source.horizon, cuts=True)
    bounds = options.bounds
    if bounds is None and rules.unit_actions:
        bounds = ActionBounds(-1.0, 1.0, source.actions)
    if bounds is None and source.actions == "clip":
        raise unknown_bounds(path)
    return read_d4rl(path, rules, bounds, {"dataset": name})


def _too_large(path: Path) -> bool:
    return sum(file.stat().st_size for file in _files(path)) > MEMORY_FRACTION * memory_limit()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    folder = minari_data_folder(path)
    return episode_files(path) if folder is None else [file for file in folder.rglob("*") if file.is_file()]


def _store_folder(source: str, path: Path, options: ReadOptions) -> Path:
    """A folder whose name changes when the files or the way they are read do."""
    digest = hashlib.sha256(f"{FORMAT}|{READING}|{source}|{path.resolve()}|{options.skip_damaged}".encode())
    for side in (options.bounds.low, options.bounds.high) if options.bounds is not None else ():
        digest.update(np.asarray(side).tobytes())
    beside = path.parent / METADATA, path / LENGTHS
    for file in [*_files(path), *(file for file in beside if file.is_file())]:
        found = file.stat()
        digest.update(f"|{file.name}|{found.st_size}|{found.st_mtime_ns}".encode())
    return cache_folder() / "stores" / f"{path.stem}-{digest.hexdigest()[:16]}"
