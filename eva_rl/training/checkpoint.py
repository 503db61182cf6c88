"""Checkpoints of a training run: atomic, checked, the last few kept."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eva_rl.errors import UserError
from eva_rl.files import FILES, SEAL, check_files, check_seal, read_json, sealed, sha256, write_folder, write_json
from eva_rl.schema import DIGEST, Integer, MapOf, Record, Text
from eva_rl.training.failures import interrupts_deferred

log = logging.getLogger(__name__)
T = TypeVar("T")

TENSORS_FILE, RECORD_FILE = "state.safetensors", "state.json"
RECORD = Record(
    {"step": Integer(0), "record": Record({}, others=True), SEAL: Text(DIGEST)}, {FILES: MapOf(Text(DIGEST))}
)
KEEP = 2
MOST_OF_A_RUN = 20
"""Checkpoints by time are this many times as far apart as the last one took to save."""


@dataclass(frozen=True)
class TrainState:
    """Everything a resumed run needs.

    Attributes:
        step: Gradient steps done.
        tensors: Parameters, optimiser moments, random-number states, by name.
        record: Counters and whatever else is not a tensor, as JSON values.
    """

    step: int
    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


class Checkpoints:
    """Where a training loop keeps its checkpoints, and when the next one is due.

    Args:
        folder: Holds one folder for each checkpoint.
        every: Steps between two checkpoints; 0 for none by steps.
        seconds: Seconds between two checkpoints; 0 for none by time.
        clock: Tells the time, in seconds.
    """

    def __init__(
        self, folder: Path, every: int = 0, seconds: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder, self.every, self.seconds, self._clock = folder, every, seconds, clock
        self._last, self._cost = clock(), 0.0

    @property
    def enabled(self) -> bool:
        """Whether any checkpoint is ever due."""
        return bool(self.every or self.seconds)

    def load(self) -> TrainState | None:
        """See :func:`load_latest_checkpoint`."""
        return load_latest_checkpoint(self.folder)

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Raise one error for whatever does not fit while a checkpoint is put back.

        Raises:
            UserError: The checkpoint is of another policy or algorithm, or of a version with other parts.
        """
        try:
            yield
        except (LookupError, ValueError, TypeError, RuntimeError) as error:
            cause = f"{error} is missing there" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"The checkpoint in {self.folder} does not fit ({cause}): it belongs to another adapter or policy, or "
                "to another version of eva-rl. Use the settings and the version it was made with, or another run_dir="
            ) from error

    def save(self, state: TrainState) -> None:
        """See :func:`save_checkpoint`."""
        began = self._clock()
        with interrupts_deferred():
            save_checkpoint(self.folder, state)
        self._last = self._clock()
        self._cost = self._last - began

    def due(self, step: int, last: bool = False) -> bool:
        """Whether to save after a step: at every ``every``-th, at the last, and when the time has come."""
        by_steps = self.every > 0 and step % self.every == 0
        return self.enabled and (last or by_steps or self.due_by_time())

    def due_by_time(self) -> bool:
        """Whether the time has come; large checkpoints wait, so that saving takes at most a twentieth of a run."""
        return self.seconds > 0 and self._clock() - self._last >= max(self.seconds, MOST_OF_A_RUN * self._cost)


def save_checkpoint(folder: Path, state: TrainState, keep: int = KEEP) -> None:
    """Write ``folder/step_<n>``, completely or not at all, then remove all but the newest ``keep``.

    Raises:
        UserError: The disk is full or not writable; older checkpoints are as they were.
    """
    write_folder(folder / f"step_{state.step:09d}", lambda aside: _write(aside, state))
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def _write(aside: Path, state: TrainState) -> None:
    save_file({k: v.detach().cpu().contiguous() for k, v in state.tensors.items()}, aside / TENSORS_FILE)
    record = {"step": state.step, "record": state.record}
    write_json(aside / RECORD_FILE, sealed(record, aside, [TENSORS_FILE]))


def load_latest_checkpoint(folder: Path) -> TrainState | None:
    """Read the newest whole checkpoint; a damaged one is reported and the one before it used.

    Returns:
        The state, or None where there is no checkpoint.

    Raises:
        UserError: There are checkpoints, and all are damaged.
    """
    return _latest(folder, _read)


def latest_step(folder: Path) -> int | None:
    """Step of what :func:`load_latest_checkpoint` would read; its tensors are checked, but not loaded.

    Raises:
        UserError: As there.
    """
    return _latest(folder, lambda path: int(_checked_record(path)["step"]))


def _latest(folder: Path, read: Callable[[Path], T]) -> T | None:
    found = _checkpoints(folder)
    for path in reversed(found):
        try:
            return read(path)
        except (OSError, ValueError, KeyError, SafetensorError, UserError) as error:
            log.warning("%s is damaged (%s); trying the checkpoint before it.", path, error)
    if found:
        raise UserError(f"All checkpoints in {folder} are damaged. Start afresh with another run_dir.")
    return None


def _read(path: Path) -> TrainState:
    record = _checked_record(path)
    return TrainState(record["step"], load_file(path / TENSORS_FILE), record["record"])


def _checked_record(path: Path) -> dict[str, Any]:
    """The record of a checkpoint, whose tensors have the digest that it states."""
    record: dict[str, Any] = read_json(path / RECORD_FILE, RECORD)
    if FILES in record:
        check_seal(record, path / RECORD_FILE)
        check_files(record, path, [TENSORS_FILE], path / RECORD_FILE)
    elif sha256(path / TENSORS_FILE) != record[SEAL]:  # written before the record was under a checksum itself
        raise ValueError("its checksum does not match")
    return record


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"))
