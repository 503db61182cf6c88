"""Checks of what files hold; each failure names the file, the key and the row."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eva_rl.data.trajectories import Episode, Flags, Floats
from eva_rl.errors import UserError

READ_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    SyntaxError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What h5py, zipfile and numpy raise on damaged files."""
BOUND_TOLERANCE = 1e-3
"""How far an action may lie outside its bounds, in units of their distance: rounding, not another scale."""


@dataclass(frozen=True)
class ActionBounds:
    """Bounds of the actions and what to do with those outside.

    Attributes:
        low: (act,) or a number.
        high: (act,) or a number.
        outside: ``check`` raises, ``clip`` moves them to the bound, ``keep`` keeps them.
    """

    low: NDArray[np.float32] | float
    high: NDArray[np.float32] | float
    outside: str = "check"


@contextmanager
def reading(path: Path | str, key: str = "") -> Iterator[None]:
    """Turn what a library raises on a damaged file into one message. Only calls of that library belong inside.

    Raises:
        UserError: Naming file and key.
    """
    try:
        yield
    except READ_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{place(path, key)}: not readable: {reason}. The file is damaged, cut short, of another format or not "
            "yours to read; download or write it again, or name another."
        ) from error


def place(path: Path | str, key: str = "", row: int | None = None) -> str:
    """Name a file, a key and a row."""
    return f"{path}" + (f": {key}" if key else "") + ("" if row is None else f", row {row}")


def floats(path: Path | str, key: str, raw: NDArray[Any], first_row: int = 0) -> Floats:
    """Numbers as (T, dim) float32, all finite.

    Args:
        path: Of the file, for messages.
        key: Of the array, for messages.
        raw: (T,) or (T, ...), of any numeric type; further axes are flattened.
        first_row: Row of the file that ``raw[0]`` is, for messages.

    Raises:
        UserError: Not numbers, no row axis, or not finite as float32.
    """
    raw = np.asarray(raw)
    check_dtype(path, key, raw.dtype)
    if raw.ndim == 0:
        raise UserError(f"{place(path, key)} is a single number, expected one row per env step.")
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.ascontiguousarray(raw.reshape(len(raw), int(np.prod(raw.shape[1:]))), np.float32)
    if array.shape[1] == 0:
        raise UserError(f"{place(path, key)} has shape {raw.shape}, expected at least one number a row.")
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(1))[0])
        values = raw.reshape(len(raw), -1)[row]
        raise UserError(
            f"{place(path, key, first_row + row)}: {values[~np.isfinite(array[row])][0]} is not a finite float32. "
            "Repair or leave out that episode."
        )
    return array


def vector(path: Path | str, key: str, raw: NDArray[Any], first_row: int = 0) -> Floats:
    """One finite number per row, from (T,) or (T, 1).

    Raises:
        UserError: As :func:`floats`, or more than one number a row.
    """
    array = floats(path, key, raw, first_row)
    if array.shape[1] != 1:
        raise UserError(f"{place(path, key)} has shape {np.shape(raw)}, expected (T,) or (T, 1).")
    return array[:, 0]


def flags(path: Path | str, key: str, raw: NDArray[Any], first_row: int = 0) -> Flags:
    """One truth value per row, from (T,) or (T, 1) of bool, or of numbers that are 0 or 1.

    Raises:
        UserError: As :func:`vector`, or a number that is neither 0 nor 1.
    """
    array = vector(path, key, raw, first_row)
    wrong = np.flatnonzero((array != 0) & (array != 1))
    if len(wrong):
        raise UserError(f"{place(path, key, first_row + int(wrong[0]))}: {array[wrong[0]]:g}, expected 0 or 1.")
    return array.astype(bool)


def check_dtype(path: Path | str, key: str, dtype: np.dtype[Any]) -> None:
    """Raise unless the type is one of numbers.

    Raises:
        UserError: Naming the type.
    """
    if dtype.kind not in "fiub":
        raise UserError(f"{place(path, key)} holds {dtype}, expected floating-point numbers, integers or bool.")


def check_rows(path: Path | str, key: str, rows: int, expected: int, because: str) -> None:
    """Raise unless an array is as long as the others say.

    Raises:
        UserError: Naming both lengths.
    """
    if rows != expected:
        raise UserError(f"{place(path, key)} has {rows} rows, expected {expected}: {because}.")


def bounded(path: Path | str, key: str, actions: Floats, bounds: ActionBounds | None, first_row: int = 0) -> Floats:
    """Actions within their bounds.

    Raises:
        UserError: One lies outside and ``bounds.outside`` is ``check``, or there are other bounds than actions.
    """
    if bounds is None or bounds.outside == "keep":
        return actions
    low, high = np.asarray(bounds.low, np.float32), np.asarray(bounds.high, np.float32)
    if low.ndim and low.shape != actions.shape[1:]:
        raise UserError(f"{place(path, key)} has {actions.shape[1]} numbers a row, expected {len(low)}.")
    if bounds.outside == "clip":
        return np.clip(actions, low, high)
    with np.errstate(invalid="ignore"):
        room = np.nan_to_num(BOUND_TOLERANCE * (high - low), posinf=0)
    outside = np.argwhere((actions < low - room) | (actions > high + room))
    if len(outside):
        row, column = outside[0]
        low, high = (np.broadcast_to(bound, actions.shape[1:])[column] for bound in (low, high))
        raise UserError(
            f"{place(path, key, first_row + int(row))}: {actions[row, column]:g} in dimension {column} lies outside "
            f"the bounds {low:g} to {high:g}. Add ?actions=clip to the source to move such actions to the bound, "
            "or ?actions=keep to keep them."
        )
    return actions


def checked_episode(
    path: Path | str, prefix: str, raw: Mapping[str, NDArray[Any]], bounds: ActionBounds | None
) -> Episode:
    """An episode from the arrays of a file.

    Args:
        path: Of the file, for messages.
        prefix: Of the keys, for messages, for instance ``episode_3/``.
        raw: ``observations`` (T + 1 rows), ``actions``, ``rewards``, ``terminations``, ``truncations`` (T rows),
            and where known ``successes`` (T or T + 1 rows) and ``target_actions`` (T rows).
        bounds: Of the actions.

    Raises:
        UserError: Lengths disagree, no env step, values that are not numbers or not finite, actions out of bounds,
            or a termination before the last env step.
    """
    rewards = vector(path, prefix + "rewards", raw["rewards"])
    steps = len(rewards)
    if steps == 0:
        raise UserError(f"{place(path, prefix + 'rewards')} is empty: an episode needs at least one env step.")
    arrays: dict[str, Any] = {
        "observations": floats(path, prefix + "observations", raw["observations"]),
        "actions": bounded(path, prefix + "actions", floats(path, prefix + "actions", raw["actions"]), bounds),
        "terminations": flags(path, prefix + "terminations", raw["terminations"]),
        "truncations": flags(path, prefix + "truncations", raw["truncations"]),
    }
    if "successes" in raw:
        successes = flags(path, prefix + "infos/success", raw["successes"])
        arrays["successes"] = successes[1:] if len(successes) == steps + 1 else successes
    if "target_actions" in raw:
        arrays["target_actions"] = floats(path, prefix + "infos/target_actions", raw["target_actions"])
    for name, array in arrays.items():
        expected = steps + (name == "observations")
        check_rows(path, prefix + name, len(array), expected, f"the episode has {steps} rewards")
    check_ends(path, prefix, arrays["terminations"] | arrays["truncations"])
    return Episode(rewards=rewards, **arrays)


def check_ends(path: Path | str, prefix: str, ends: Flags) -> None:
    """Raise where an episode goes on after its end.

    Raises:
        UserError: Naming the row.
    """
    early = np.flatnonzero(ends[:-1])
    if len(early):
        raise UserError(
            f"{place(path, prefix + 'terminations', int(early[0]))}: the episode is terminated or truncated there and "
            f"goes on to row {len(ends) - 1}. Expected one episode, with its end in the last row."
        )


def check_dims(path: Path | str, prefix: str, episode: Episode, first: Episode) -> None:
    """Raise unless an episode has the dimensions of the first one.

    Raises:
        UserError: Naming both.
    """
    for name in ("observations", "actions"):
        own, expected = getattr(episode, name).shape[1], getattr(first, name).shape[1]
        if own != expected:
            raise UserError(
                f"{place(path, prefix + name)} has {own} numbers a row, expected {expected} as in the first episode."
            )
    if episode.target_actions is not None and episode.target_actions.shape != episode.actions.shape:
        raise UserError(
            f"{place(path, prefix + 'infos/target_actions')} has shape {episode.target_actions.shape}, expected "
            f"{episode.actions.shape} as the actions."
        )
