"""Checks of what files hold; each failure names the file, the key and the row."""

from __future__ import annotations

import logging
import stat
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eva_rl.errors import UserError, counted

log = logging.getLogger(__name__)

READ_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    NotImplementedError,
    SyntaxError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What h5py, zipfile, numpy, json and minari raise on damaged files."""
BOUND_TOLERANCE = 1e-3
"""How far an action may lie outside its bounds, in units of their distance: rounding, not another scale."""
IN_MEMORY = "arrays"
"""What data are called that come from no file."""
AS_WIDE = ", as wide as the first episode's"
"""In messages of episodes that are unlike the first one."""
LISTED = 12
"""Names that a message lists at most."""


class LayoutError(UserError):
    """A fault of a whole data set, which leaving out episodes does not mend."""


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


@dataclass(frozen=True)
class Source:
    """Where an array comes from; every check of it raises :class:`UserError` naming this.

    Attributes:
        path: The file, or what a user calls the data.
        key: Of the array or the group, "" for the whole.
        row: Row of the file that the array's row 0 is.
    """

    path: Path | str
    key: str = ""
    row: int = 0

    def __truediv__(self, key: str) -> Source:
        return replace(self, key=f"{self.key}/{key}" if self.key else key)

    def __str__(self) -> str:
        return f"{self.path}: {self.key}" if self.key else str(self.path)

    def at(self, row: int) -> str:
        """Name a row of the array."""
        return f"{self}, row {self.row + row}"

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn what a library raises on a damaged file into one message. Only calls of that library belong inside.

        Raises:
            UserError: Naming this source.
        """
        try:
            yield
        except READ_ERRORS as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            advice = (
                "Give an array of numbers, or what numpy.asarray makes one of."
                if self.path == IN_MEMORY
                else "The file is damaged, cut short, of another format or not yours to read; download or write it "
                "again, or name another."
            )
            raise UserError(f"{self}: not readable: {reason}. {advice}") from error

    def floats(self, raw: NDArray[Any]) -> NDArray[np.float32]:
        """Numbers as (T, dim) float32, all finite.

        Args:
            raw: (T,) or (T, ...), of any numeric type; further axes are flattened.

        Raises:
            UserError: Not numbers, images, no row axis, or not finite as float32.
        """
        if np.ma.is_masked(raw):
            raise UserError(f"{self} has masked values. Fill them, or leave out those episodes.")
        with self.reading():
            raw = np.asarray(raw)
        self.check_dtype(raw.dtype)
        if raw.ndim == 0:
            raise UserError(f"{self} is a single number, expected one row per env step.")
        if raw.dtype == np.uint8 and raw.ndim > 2:
            raise LayoutError(
                f"{self} has shape {raw.shape} and type uint8: images, and a Decision Transformer of this package sees "
                "vectors of numbers. Name data of state observations, or of features of the images."
            )
        width = int(np.prod(raw.shape[1:]))
        if width == 0:
            raise UserError(f"{self} has shape {raw.shape}, expected at least one number a row.")
        with np.errstate(over="ignore", invalid="ignore"):
            array = np.ascontiguousarray(raw.reshape(len(raw), width), np.float32)
        wrong = np.argwhere(~np.isfinite(array))
        if len(wrong):
            row, column = wrong[0]
            raise UserError(
                f"{self.at(row)}: {raw.reshape(len(raw), -1)[row, column]} is not a finite float32. "
                "Repair or leave out that episode."
            )
        return array

    def vector(self, raw: NDArray[Any]) -> NDArray[np.float32]:
        """One finite number per row, from (T,) or (T, 1).

        Raises:
            UserError: As :meth:`floats`, or more than one number a row.
        """
        array = self.floats(raw)
        if array.shape[1] != 1:
            raise UserError(f"{self} has shape {np.shape(raw)}, expected (T,) or (T, 1).")
        return array[:, 0]

    def flags(self, raw: NDArray[Any]) -> NDArray[np.bool_]:
        """One truth value per row, from (T,) or (T, 1) of bool, or of numbers that are 0 or 1.

        Raises:
            UserError: As :meth:`vector`, or a number that is neither 0 nor 1.
        """
        array = self.vector(raw)
        wrong = np.flatnonzero((array != 0) & (array != 1))
        if len(wrong):
            raise UserError(f"{self.at(int(wrong[0]))}: {array[wrong[0]]:g}, expected 0 or 1.")
        return array.astype(bool)

    def check_dtype(self, dtype: np.dtype[Any]) -> None:
        """Raise unless the type is one of numbers.

        Raises:
            UserError: Naming the type.
        """
        if dtype.kind not in "fiub":
            raise UserError(f"{self} holds {dtype}, expected floating-point numbers, integers or bool.")

    def check_rows(self, rows: int, expected: int, because: str) -> None:
        """Raise unless an array is as long as the others say.

        Raises:
            UserError: Naming both lengths.
        """
        if rows != expected:
            raise UserError(f"{self} has {counted(rows, 'row')}, expected {expected}: {because}.")

    def bounded(self, actions: NDArray[np.float32], bounds: ActionBounds | None) -> NDArray[np.float32]:
        """Actions within their bounds.

        Raises:
            UserError: One lies outside and ``bounds.outside`` is ``check``, or there are other bounds than actions.
        """
        if bounds is None:
            return actions
        low, high = np.asarray(bounds.low, np.float32), np.asarray(bounds.high, np.float32)
        for bound in (low, high):
            if bound.ndim and bound.shape != actions.shape[1:]:
                raise UserError(
                    f"{self} has {counted(actions.shape[1], 'number')} a row, expected {len(bound)}, as many as the "
                    "task's actions. Name other data=, or the task that they were made in with env=."
                )
        if bounds.outside == "keep":
            return actions
        if bounds.outside == "clip":
            return np.clip(actions, low, high)
        self._check_bounds(actions, low, high)
        return actions

    def _check_bounds(self, actions: NDArray[np.float32], low: NDArray[Any], high: NDArray[Any]) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            room = np.nan_to_num(BOUND_TOLERANCE * (high - low), posinf=0)
        outside = np.argwhere((actions < low - room) | (actions > high + room))
        if len(outside):
            row, column = outside[0]
            low, high = (np.broadcast_to(bound, actions.shape[1:])[column] for bound in (low, high))
            raise UserError(
                f"{self.at(int(row))}: {actions[row, column]:g} in dimension {column} lies outside "
                f"the bounds {low:g} to {high:g}. {self._how_to_clip}"
            )

    @property
    def _how_to_clip(self) -> str:
        if self.path == IN_MEMORY:
            return "Move such actions to the bound with np.clip."
        return "Add ?actions=clip to the source to move such actions to the bound, or ?actions=keep to keep them."

    def missing(self, key: str, expected: str, held: Collection[str]) -> UserError:
        """What to raise where a key is missing: it names what there is instead, and the reader that fits that."""
        listed = ", ".join(sorted(held)[:LISTED]) + (", ..." if len(held) > LISTED else "")
        listed = listed.encode(errors="replace").decode()
        text = f"{self / key} is missing; expected {expected}. {self} holds {listed or 'nothing'}."
        return UserError(f"{text} {reader_for(held, self.path, key)}".rstrip())


def warn_of_repeated_ends(source: Source, ends: NDArray[np.bool_]) -> None:
    """Warn of flags that stay true after an episode's end, which make an episode of each further row."""
    repeated = int((ends[1:] & ends[:-1]).sum())
    if repeated > 1 and not ends.all():  # else every episode has one env step
        log.warning(
            "%s: %s of one env step, each right after an end: a flag stays true there. Keep the first of them alone, "
            "and leave out what follows it.",
            source,
            counted(repeated, "episode"),
        )


ENDS = {"terminals", "timeouts", "terminations", "truncations"}
"""Names of the flags that say where episodes end."""


def reader_for(held: Collection[str], path: Path | str, missing: str = "") -> str:
    """Which source reads a file that holds arrays or groups of these names; "" where none is known.

    Args:
        held: The names.
        path: The file.
        missing: What was looked for in it.
    """
    names = set(held)
    table = {"observations", "actions", "rewards"} <= names
    known = {
        f"That is Minari's layout: name it trajectories:{path}.": any(
            name.startswith("episode_") and name[8:].isdecimal() for name in names
        ),
        f"That is d3rlpy's layout: name it trajectories:{path}.": "observations_0" in names,
        f"If that is robomimic's layout (data/demo_0), name it trajectories:{path}.": "data" in names
        or any(name.startswith("demo_") for name in names),
        f"That is D4RL's layout: name it d4rl:{path}.": (table and "terminals" in names) or "virtual" in names,
        "dones does not say whether an episode was terminated or truncated. If its ends are time limits, name it "
        f"trajectories:{path}, which reads dones as truncations; else store terminals and timeouts.": missing in ENDS
        and bool({"dones", "done"} & names),
        f"If it holds episodes under Gymnasium's names, name it trajectories:{path}.": table,
    }
    return next((text for text, fits in known.items() if fits), "")


SIGNATURES = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"PK\x03\x04": "a zip archive, as .npz files are",
    b"\x93NUMPY": "a single array of numpy (.npy)",
    b"\x1f\x8b": "a gzip archive",
    b"\x80": "a pickle; name it trajectories:PATH and add data.allow_pickle=true if you trust it",
    b"ARROW1": "an Arrow file",
    b"PAR1": "a Parquet file",
    b"<": "an HTML or XML page, such as a server's error message",
    b"{": "JSON",
    b"version https://git-lfs": "a pointer of Git LFS instead of the file",
}


def kind_of_file(path: Path) -> str:
    """What a file is by its first bytes, in words; "" where unknown."""
    with Source(path).reading(), path.open("rb") as file:
        head = file.read(64).lstrip(b" \r\n\t\xef\xbb\xbf")
    return next((kind for magic, kind in SIGNATURES.items() if head.startswith(magic)), "")


def check_regular_file(path: Path) -> None:
    """Raise unless a path is a file with an end: opening a pipe waits for ever, a device never ends.

    Raises:
        UserError: Not there, a folder, a pipe, a socket or a device.
    """
    with Source(path).reading():
        if not path.exists():
            kind = "missing"
        else:
            kind = {stat.S_IFREG: "", stat.S_IFDIR: "a folder"}.get(stat.S_IFMT(path.stat().st_mode), "special")
    if kind == "missing":
        raise UserError(f"No data file {path}. Name an existing file; `python -m eva_rl.datasets` lists what is there.")
    if kind == "special":
        raise UserError(f"{path} is a pipe, a socket or a device, expected a regular file. Copy its content to a file.")
    if kind:
        raise UserError(f"{path} is {kind}, expected a file. Name a file in it.")


def check_episode(where: Source, episode: Any, first: Any) -> None:
    """Raise unless an episode has the shapes of an :class:`eva_rl.data.Episode` and finite numbers.

    Args:
        where: What messages call it.
        episode: The episode.
        first: One with the numbers an observation and an action that are expected.

    Raises:
        UserError: A shape is another, a number is not finite, or it ends before its last row.
    """
    steps = len(episode.rewards)
    if not steps:
        raise UserError(f"{where / 'rewards'} is empty: an episode needs at least one env step.")
    expected = {
        "observations": (steps + 1, *first.observations.shape[1:]),
        "actions": (steps, *first.actions.shape[1:]),
        "target_actions": (steps, *first.actions.shape[1:]),
        **dict.fromkeys(("rewards", "terminations", "truncations", "successes"), (steps,)),
    }
    for name, shape in expected.items():
        array = getattr(episode, name)
        if array is None:
            continue
        because = f"the episode has {counted(steps, 'reward')}"
        if name == "observations":
            because += ", and the last row is what the last action led to"
        (where / name).check_rows(len(array), shape[0], because)
        if array.shape != shape:
            wide = AS_WIDE if shape[1:] else ""
            raise UserError(f"{where / name} has shape {array.shape}, expected {shape}{wide}.")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0][0])
            raise UserError(f"{(where / name).at(row)} is not finite. Repair or leave out that episode.")
    early = np.flatnonzero((episode.terminations | episode.truncations)[:-1])
    if len(early):
        raise UserError(
            f"{(where / 'terminations').at(int(early[0]))}: the episode is terminated or truncated there and "
            f"goes on to row {steps - 1}. Expected one episode, with its end in the last row."
        )
