"""Run directories: made, recognised, continued, and never overwritten."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from eva_rl.cli.command import new_run_dir
from eva_rl.cli.console import say
from eva_rl.cli.machine import versions
from eva_rl.cli.parsing import DID_NOTHING, flat, todays_name
from eva_rl.distributed import ProcessGroup
from eva_rl.errors import UserError
from eva_rl.files import (
    FILES,
    SEAL,
    check_folder,
    check_seal,
    expanded,
    is_partial,
    read_json,
    read_yaml,
    remove_leftovers,
    sealed,
    write_file,
    write_json,
)
from eva_rl.schema import Integer, Record, Text

CONFIG_FILE, SUMMARY_FILE, VERSIONS_FILE = "config.yaml", "summary.json", "versions.json"
SEALED_FILES = (CONFIG_FILE, VERSIONS_FILE, "metrics.jsonl", "evaluation.json", "eva_report.json")
"""What the summary holds the digests of."""
PHASES_FILE = "phases.json"
"""What a run has spent so far, for the process that continues it."""
LOCK_FILE = ".lock"
INPUTS = "inputs"
"""Folder of a run directory with what a caller in Python gave as objects; it is there before the run begins."""
ABOUT_FILE = "study.json"
"""In the run directories of a benchmark: which of its methods a run belongs to, and what was tuned."""
FREE_BYTES = 200 * 2**20
"""A run that would start with less room on its disk is refused."""
FREE_TO_CHANGE = {"run_dir", "shared", "resume", "threads", "device", "checkpoint", "tracker", "video", "weight_dtype"}
"""Keys in which a continued run may differ from its first part."""
FREE_IN_GROUPS = {"accumulate", "compile", "log_every", "timeout", "workers"}
"""The same, within groups: what fits a machine and changes no result."""
CLONING = "algo.bc."
"""How the settings begin of cloning before an online algorithm."""
ADDED_LATER = {"study"}
"""Groups that earlier versions did not write."""

MADE_FROM = {"data": ("env.", "data."), "held_out": ("env.", "data.", "eval.demonstrations")}
"""Folders of collected demonstrations in a run directory, and how the settings begin that decide them."""
NOT_SHOWN = {"run_dir", "shared", "study", "resume", "threads", "device", "tracker", "video", "checkpoint"}
"""Settings that say nothing about a result."""
SHORT = {"adapter": "adapter.method", "algo": "algo.name", "env": "env.id", "rank": "adapter.rank", "seed": "seed"}
"""Settings by which runs are told apart most often."""


def check_no_run(folder: Path, setting: str) -> None:
    """Raise where runs are to go below a run directory: reports would see the one run alone.

    Raises:
        UserError: It holds a run's config or summary.
    """
    if found := [name for name in (CONFIG_FILE, SUMMARY_FILE) if (folder / name).is_file()]:
        raise UserError(
            f"{folder} is the directory of a single run (it holds {found[0]}), so that reports see nothing below it. "
            f"Name another {setting}."
        )


def open_run(name: str, options: Any) -> Path:
    """Make or recognise the run directory of a command, say where it is, and note its config.

    Args:
        name: The command, for the name of a new folder.
        options: The whole config; a :class:`RunOptions` dataclass.

    Raises:
        UserError: The folder holds a finished run, an unfinished one with other settings, or something else.
    """
    run_dir = ProcessGroup.current().broadcast_object(lambda: _open(name, options))
    say(f"Run directory: {run_dir}")
    return run_dir


def _open(name: str, options: Any) -> Path:
    run_dir = expanded(options.run_dir or new_run_dir(name))
    config = asdict(options)
    check_run_dir(run_dir)
    if (run_dir / CONFIG_FILE).exists():
        lock(run_dir)
        remove_leftovers(run_dir)
        _continue(run_dir, options)
    _make(run_dir)
    lock(run_dir)
    if not (run_dir / CONFIG_FILE).exists():
        remove_leftovers(run_dir)
        text = f"# python -m eva_rl.{name}\n{OmegaConf.to_yaml(OmegaConf.create(config))}"
        write_file(run_dir / CONFIG_FILE, lambda aside: aside.write_text(text, encoding="utf-8"))
    if not (run_dir / VERSIONS_FILE).exists():
        write_json(run_dir / VERSIONS_FILE, versions())
    return run_dir


def check_run_dir(run_dir: Path) -> None:
    """Raise unless a folder is new, empty or an unfinished run.

    Raises:
        UserError: It holds a finished run, or something else, or cannot be written.
    """
    check_folder(run_dir, "run_dir=")
    if (run_dir / SUMMARY_FILE).exists():
        raise UserError(f"{run_dir} holds a finished run, which is not overwritten. Name another run_dir=.")
    if not run_dir.is_dir() or (run_dir / CONFIG_FILE).exists():
        return
    if any(not _left_by_a_start(path) for path in run_dir.iterdir()):
        raise UserError(f"{run_dir} is not empty and not a run of eva-rl. Name another run_dir=.")


def _left_by_a_start(path: Path) -> bool:
    """Whether a file is what a command that was killed at its start leaves, or a benchmark before it."""
    return path.name in {LOCK_FILE, INPUTS, ABOUT_FILE} or is_partial(path, CONFIG_FILE)


_LOCKS: dict[Path, IO[str]] = {}
"""Open files of the run directories that this process holds; closing one would give it up."""


def lock(run_dir: Path) -> None:
    """Hold a run directory until this process ends.

    Raises:
        UserError: Another process holds it.
    """
    path = run_dir.resolve() / LOCK_FILE
    if path in _LOCKS and path.exists() and os.path.samestat(path.stat(), os.fstat(_LOCKS[path].fileno())):
        return
    file = _open_lock(path)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        raise UserError(
            f"{run_dir} is in use by another process (pid {holder}). Wait for it to end, or name another run_dir=."
        ) from error
    except OSError:  # a file system without locks
        return
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    _LOCKS[path] = file


def _open_lock(path: Path) -> IO[str]:
    try:
        return path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written: {error}. Name another run_dir=.") from error


def _continue(run_dir: Path, options: Any) -> None:
    """Accept the settings that a run began with, or any where it ended before its first checkpoint."""
    if options.resume == "never":
        raise UserError(f"{run_dir} holds an unfinished run. Continue it with resume=auto, or name another run_dir=.")
    try:
        changed = changed_settings(run_dir, options)
    except UserError as error:
        damaged = run_dir / f"{CONFIG_FILE}.damaged"
        (run_dir / CONFIG_FILE).replace(damaged)
        say(
            f"{error} It was moved to {damaged.name}, and {CONFIG_FILE} is written anew from this command: make sure "
            "that it is the command which the run began with."
        )
        return
    if changed and not (run_dir / "checkpoint").exists():
        _remove_record(run_dir)
        for name, decide in MADE_FROM.items():
            if any(key.startswith(decide) for key in changed):
                shutil.rmtree(run_dir / name, ignore_errors=True)
        (run_dir / CONFIG_FILE).unlink()
    elif changed:
        had = ", ".join(f"{key}={_typed(value)}" for key, value in changed.items())
        raise UserError(
            f"{run_dir} holds an unfinished run with other settings of {', '.join(changed)} (see {CONFIG_FILE} "
            f"there). Use the same settings to continue it ({had}), or name another run_dir=."
        )


def _remove_record(run_dir: Path) -> None:
    """Remove what a run has recorded, so that nothing of it is taken for another's with other settings."""
    for name in ("metrics.jsonl", "eva_report.json", PHASES_FILE):
        (run_dir / name).unlink(missing_ok=True)
    for name in ("tb", "figures"):
        shutil.rmtree(run_dir / name, ignore_errors=True)


def _typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def changed_settings(run_dir: Path, options: Any) -> dict[str, Any]:
    """The settings of a run that differ from a command's, by key, of those that decide its result.

    What an earlier version did not know is taken to have been what is the default today.

    Args:
        run_dir: Of the run.
        options: The whole config of the command; a dataclass.

    Raises:
        UserError: The run's config cannot be read, or is incomplete.
    """
    before = read_yaml(run_dir / CONFIG_FILE)
    if not isinstance(before, dict) or not asdict(options).keys() - FREE_TO_CHANGE - ADDED_LATER <= before.keys():
        raise UserError(f"{run_dir / CONFIG_FILE} is damaged: settings are missing.")
    return changed_from(before, options)


def changed_from(before: Mapping[str, Any], options: Any) -> dict[str, Any]:
    """As :func:`changed_settings`, from the settings of a run themselves."""
    now = asdict(options)
    old, new, usual = _deciding(before), _deciding(now), dict(flat(_defaults(options)))
    gone = {key: old[key] for key in old.keys() - new.keys() if key.rpartition(".")[2] not in DID_NOTHING}
    there = {key: (usual | old).get(key) for key in new}
    changed = gone | {key: value for key, value in there.items() if value != new[key]}
    return {key: value for key, value in changed.items() if not any(key.startswith(f"{table}.") for table in gone)}


def todays_settings(values: Mapping[str, Any], options: Any) -> dict[str, Any]:
    """The settings of a run, flat, by the names of today; what an earlier version did not know has today's default.

    Args:
        values: As the run's ``config.yaml`` has them.
        options: A config of today with the run's algorithm; a dataclass.
    """
    usual, found = dict(flat(_defaults(options))), _renamed(flat(values))
    gone = {key for key in found.keys() - usual.keys() if key.rpartition(".")[2] in DID_NOTHING}
    filled = {key for key, value in usual.items() if value == {} and any(name.startswith(f"{key}.") for name in found)}
    usual = {key: value for key, value in usual.items() if key not in filled}  # a table with entries is no empty one
    return usual | {key: value for key, value in found.items() if key not in gone}


def _renamed(settings: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """By the names of today."""
    return {todays_name(key): value for key, value in settings}


def _deciding(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide a result, flat and by the names of today; not how to clone where nothing is cloned."""
    everything = flat({key: value for key, value in values.items() if key not in FREE_TO_CHANGE})
    settings = {
        key: value
        for key, value in _renamed(everything).items()
        if "." not in key or key.rpartition(".")[2] not in FREE_IN_GROUPS
    }
    if settings.get(f"{CLONING}updates") == 0:
        settings = {k: v for k, v in settings.items() if not k.startswith(CLONING) or k == f"{CLONING}updates"}
    return settings


def _defaults(options: Any) -> dict[str, Any]:
    """The default of each setting that has one, in groups."""
    found: dict[str, Any] = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            found[field.name] = _defaults(value)
        elif field.default is not MISSING:
            found[field.name] = field.default
        elif field.default_factory is not MISSING:
            found[field.name] = field.default_factory()
    return found


def _make(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run_dir).free
    except OSError as error:
        raise UserError(f"{run_dir} cannot be made: {error}. Name another run_dir=.") from error
    if free < FREE_BYTES:
        raise UserError(
            f"{run_dir}: {free / 2**20:.0f} MiB are free on its disk, a run needs {FREE_BYTES / 2**20:.0f} MiB. "
            "Free some space, or name a run_dir= on another disk."
        )


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json``, which marks a run as finished, with digests of itself and of what a report reads."""
    names = [name for name in SEALED_FILES if (run_dir / name).is_file()]
    write_json(run_dir / SUMMARY_FILE, sealed(summary, run_dir, names))


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Read ``summary.json``, without its digests.

    Raises:
        UserError: It is missing, or was changed or damaged.
    """
    path = run_dir / SUMMARY_FILE
    found = read_json(path, Record({"env": Text(), "method": Text(), "seed": Integer()}, others=True))
    check_seal(found, path)
    return {key: value for key, value in found.items() if key not in {FILES, SEAL}}


def flat_hyperparameters(config: Any) -> dict[str, Any]:
    """The settings of a run, flat; TensorBoard's table of runs shows the first five, in alphabetical order."""
    settings = {key: _text(value) for key, value in flat(asdict(config)) if key.partition(".")[0] not in NOT_SHOWN}
    short = {name: settings.pop(key) for name, key in SHORT.items() if key in settings}
    return short | {f"settings/{key}": value for key, value in settings.items()}


def _text(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list | dict) else value
