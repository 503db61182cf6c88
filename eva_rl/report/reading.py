"""Find runs, and read their files, damaged or foreign: every value checked, every failure one ``UserError``."""

from __future__ import annotations

import glob
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from eva_rl.cli.run_dir import CONFIG_FILE, SUMMARY_FILE
from eva_rl.errors import UserError
from eva_rl.files import FILES, SEAL, PlainLoader, expanded
from eva_rl.schema import DIGEST, Check, Either, Integer, MapOf, NotMeasured, Number, Optional, Record, Text
from eva_rl.tracking.tracker import PAUSE

MOST_BYTES = 256 * 2**20
"""Larger files are no record of a run."""
MOST_CONFIG_BYTES = 2**20
MOST_CHARACTERS = 120
"""Longer names are shortened, so that tables and figures stay readable."""
LARGEST = 1e15
"""Steps, times and scores beyond this are damage."""

UPDATES = ("time/gradient_steps", "train/n_updates")
"""Keys of ``metrics.jsonl`` that count the gradient steps of runs that act in the environment."""
GROUPS = ("data", "seconds")
"""Keys of a summary that hold groups."""

Row = dict[str, float]
RECORD = "eva_rl_record"
"""The key by which the record of a run is recognised."""
DIVERGED = ".diverged"
"""Ending of the file that stands in place of the record of a tuning run that diverged."""


def find_runs(places: Sequence[str]) -> list[Path]:
    """Run directories and records at or below some folders.

    Args:
        places: Run directories, records of runs (JSON files), folders that hold some (however deep), or patterns such
            as ``runs/*``.

    Raises:
        UserError: One of them does not exist, or there is no run in any.
    """
    folders: dict[Path, Path] = {}
    for place in places:
        named = expanded(place)
        matches = [named] if os.path.exists(named) else sorted(map(Path, glob.glob(str(named))))
        if not matches:
            raise UserError(
                f"No folder {place}. Name run directories, a folder that holds some, or a pattern: 'runs/*'."
            )
        for match in matches:
            folders |= {folder.resolve(): folder for folder in _runs_below(match)}
    if not folders:
        raise UserError(f"No run in {', '.join(places)}: a run directory holds a {CONFIG_FILE}.")
    return list(folders.values())


def _runs_below(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Those at or below a folder; links are followed, but for those to a folder above them."""
    if _is_run(folder):
        yield folder
        return
    above |= {folder.resolve()}
    for inner in _inner(folder):
        if inner.is_dir() and not inner.name.startswith("."):
            if inner.resolve() not in above:
                yield from _runs_below(inner, above)
        elif inner.suffix in {".json", DIVERGED} and _is_run(inner):
            yield inner


def _inner(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError:  # a folder that may not be read holds no run for us
        return []


def _is_run(folder: Path) -> bool:
    if folder.is_file():
        return folder.suffix == DIVERGED or is_record(folder)
    return os.path.exists(folder / CONFIG_FILE) or os.path.exists(folder / SUMMARY_FILE)  # Path's raises without access


def is_record(path: Path) -> bool:
    """Whether a file is the record of a run, damaged or not; one that cannot be read may be, and is not lost."""
    if not os.path.isfile(path):
        return False
    try:
        with path.open("rb") as file:
            return f'"{RECORD}"'.encode() in file.read(200)
    except OSError:
        return True


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Read a text file.

    Raises:
        UserError: It is missing, no regular file (a pipe would block for ever), too large, or not UTF-8.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is not a regular file.")
        if status.st_size > most:
            raise UserError(f"{path} has {status.st_size} bytes, more than the {most} that are read.")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"No file {path}.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        UserError: See :func:`read_text`; or it is not JSON, nested too deeply, or holds something else.
    """
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected an object.")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping with text keys.

    Raises:
        UserError: See :func:`read_text`; or it is not YAML, has aliases, or holds something else.
    """
    try:
        value = yaml.load(read_text(path, MOST_CONFIG_BYTES), PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{path} holds no mapping of text keys.")
    return value


def one_line(text: object) -> str:
    """A name on one line, printable in every encoding, shortened in the middle where it is long."""
    spaced = " ".join(str(text).split())
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in spaced)
    half = (MOST_CHARACTERS - len("...")) // 2
    return plain if len(plain) <= MOST_CHARACTERS else f"{plain[:half]}...{plain[-half:]}"


def as_typed(value: object) -> str:
    """A value of a study file as text: that of YAML, not Python's ``True`` and ``None``."""
    return one_line(value if isinstance(value, str) else json.dumps(value))


def is_number(value: object) -> bool:
    """Whether it is a finite number of a plausible size, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def numbers(values: object) -> Row:
    """The entries of a mapping that are finite numbers."""
    items = values.items() if isinstance(values, Mapping) else ()
    return {str(key): float(value) for key, value in items if is_number(value)}


NAME, COUNT = Text(r"(?s).+", "a name"), Number(0, LARGEST)  # records keep counts as numbers
MEASURED = Either((Number(-LARGEST, LARGEST), NotMeasured()))
RATE = Either((Number(0, 1), NotMeasured()))
EVALUATIONS = ("eval", "eval_before", "eval_cloned", "eval_residual")
SCORES: dict[str, Check] = {
    "success_rate": RATE,
    "success_at_end": RATE,
    "mean_reward": MEASURED,  # none where episodes ended at their first success
    "std_reward": MEASURED,
    "mean_ep_length": MEASURED,
    "normalized_score": MEASURED,
}
DATA = Record({}, {"source": Text(), "hash": Text(), "episodes": COUNT, "steps": COUNT, "mean_return": MEASURED})
SUMMARY = Record(
    {"env": NAME, "method": NAME, "seed": Integer()},
    {
        **{f"{when}/{key}": check for when in EVALUATIONS for key, check in SCORES.items()},
        **dict.fromkeys(("algo", "policy", "protocol", "study"), Text()),
        **dict.fromkeys(("trainable_parameters", "total_parameters", "adapter_bytes", "peak_memory_bytes"), COUNT),
        **dict.fromkeys(("updates", "env_steps", "processes", "episodes"), Number(0, LARGEST)),
        **dict.fromkeys(("seconds_per_update", "eva/gain", "eva/effective_rank", "target_return"), MEASURED),
        "data": Optional(DATA),
        "seconds": MapOf(Number(0, LARGEST)),
        "shared": MapOf(Text()),
        "eval_at": MapOf(MapOf(MEASURED)),
        FILES: MapOf(Text(DIGEST)),
        SEAL: Text(DIGEST),
    },
    others=True,
)
"""What ``summary.json`` may hold; keys that are not listed pass unless they are nested too deeply."""


def clean_summary(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a report uses of ``summary.json``: names on one line, finite numbers, one level of groups.

    Raises:
        UserError: It is not what :data:`SUMMARY` admits, or has no score.
    """
    SUMMARY.of(raw, str(path))
    if not _has_score(raw):
        returns = one_line(raw.get("eval/mean_reward"))
        raise UserError(f"{path}: eval/mean_reward={returns}, expected a finite number, or an eval/success_rate.")
    plain = {key: value for key, value in raw.items() if key not in {*GROUPS, FILES, SEAL}}
    found: dict[str, Any] = {**numbers(plain), "seed": raw["seed"]}
    found |= {str(key): one_line(value) for key, value in plain.items() if isinstance(value, str)}
    groups = {str(key): value for key, value in raw.items() if isinstance(value, Mapping) and key != FILES}
    return found | {
        key: {**numbers(own), **{str(k): one_line(v) for k, v in own.items() if isinstance(v, str)}}
        for key, own in groups.items()
    }


def _has_score(raw: Mapping[str, Any]) -> bool:
    return is_number(raw.get("eval/success_rate")) or is_number(raw.get("eval/mean_reward"))


def read_rows(path: Path) -> tuple[list[Row], int]:
    """Rows of ``metrics.jsonl`` in order of their time: those that can be read, and the number of those that cannot.

    Their times leave out the pauses of a run that was resumed.

    Raises:
        UserError: See :func:`read_text`.
    """
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    rows = [row for line in lines if (row := _row(line)) is not None]
    return list(_without_pauses(rows)), len(lines) - len(rows)


def _without_pauses(rows: Sequence[Row]) -> Iterator[Row]:
    paused = 0.0
    for row in rows:
        paused += row.get(PAUSE, 0.0)
        yield {**row, "wall_time": row["wall_time"] - paused}


def _row(line: str) -> Row | None:
    try:
        row = numbers(json.loads(line))
    except (ValueError, RecursionError):
        return None
    return row if {"step", "wall_time"} <= row.keys() else None


def episodes_by_seed(record: Mapping[str, Any], task: str) -> dict[int, Row]:
    """Held-out episodes of ``evaluation.json`` after training, by the seed of the episode: success and return.

    An episode that was ended at its first success has no return. None are returned that are all alike.

    Raises:
        ValueError: There are none of this task.
    """
    after = record.get("after")
    found_there = after.get("episodes") if isinstance(after, Mapping) else None
    episodes = found_there if isinstance(found_there, list) else []
    own = [e for e in episodes if isinstance(e, Mapping) and e.get("env_id") == task]
    found = {e["episode_seed"]: _outcome(e) for e in own if isinstance(e.get("episode_seed"), int) and _is_sound(e)}
    if not found or len(found) < len(episodes):
        raise ValueError(f"{len(found)} of {len(episodes)} episodes are sound")
    return {} if record["after"].get("alike") else found


def recorded_goal(success: Any, total: Any) -> Row:
    """An episode of a record; null is the return of one that was ended at its first success."""
    found = numbers({"success": success} if total is None else {"success": success, "episode_return": total})
    if len(found) < 1 + (total is not None):
        raise ValueError(f"episode with success {one_line(success)} and return {one_line(total)}")
    return found


def _is_sound(episode: Mapping[str, Any]) -> bool:
    """Whether it has a return, or was ended at its first success, so that there is none."""
    total = episode.get("episode_return")
    return is_number(total) or (total is None and episode.get("stopped") is True)


def _outcome(episode: Mapping[str, Any]) -> Row:
    success = {"success": float(bool(episode.get("success")))}
    total = episode["episode_return"]
    return success if total is None else success | {"episode_return": float(total)}
