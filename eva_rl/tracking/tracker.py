"""Metrics to ``metrics.jsonl``, TensorBoard and others, under the same keys."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from eva_rl.files import disk_errors, write_file
from eva_rl.tracking.figures import overview_figure, pixels
from eva_rl.tracking.layers import layer_norms
from eva_rl.tracking.sinks import TENSORBOARD, RunInfo, Sink, check_trackers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
STEP, WALL_TIME = "step", "wall_time"
ENV_STEPS = "time/env_steps"
"""Env steps of training so far, in the rows of an online run's training; its axis counts all that were played."""
PAUSE = "time/pause"
"""Seconds between the last point that a resumed run builds on and its going on, in its first row after that."""
CLONING = "bc/"
"""Before the keys of cloning, in runs whose record counts env steps afterwards."""
TRAINING = "train/"
LAYER_POINTS = 50
"""Norms of layers are recorded at most this often in a run."""

RENAMED = {"eva/directions_aimed": "eva/directions_reinitialised"}
"""Metrics of earlier versions, and what they are called now."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Resume:
    """Where a run goes on.

    Attributes:
        step: The last step that it builds on.
        cloning: Whether that is a step of the cloning before another phase.
    """

    step: int
    cloning: bool = False

    def kept(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that were recorded before, of all in the order of the record."""
        if not self.cloning:
            return [row for row in rows if _of_cloning(row) or row[STEP] <= self.step]
        cloned = [index for index, row in enumerate(rows) if _of_cloning(row) and row[STEP] <= self.step]
        return list(rows[: cloned[-1] + 1]) if cloned else [row for row in rows if row[STEP] == 0]


class Tracker:
    """Writes metrics of one run; a resumed run continues all records without duplicated points.

    Args:
        run_dir: The run directory.
        resume: Where the run goes on; points after it are removed. None starts afresh.
        trackers: Which others show the metrics: ``tensorboard``, ``trackio``, ``wandb``.
        hyperparameters: Settings to show beside the results, flat; None values are left out.
    """

    def __init__(
        self,
        run_dir: Path,
        resume: Resume | None = None,
        trackers: tuple[str, ...] = (TENSORBOARD,),
        hyperparameters: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = run_dir / METRICS_FILE
        run_dir.mkdir(parents=True, exist_ok=True)
        rows = [] if resume is None else read_metrics(run_dir)
        kept = [] if resume is None else resume.kept(rows)
        kept_ids = set(map(id, kept))  # comparing rows takes a minute where there are ten thousand
        forgotten = [row for row in rows if id(row) not in kept_ids]
        write_file(self.path, lambda aside: aside.write_text("".join(json.dumps(row) + "\n" for row in kept)))
        purge = None if resume is None else min([row[STEP] for row in forgotten], default=resume.step + 1)
        logged = frozenset(map(_point, rows))
        self._sinks = open_sinks(trackers, RunInfo(run_dir, hyperparameters or {}, purge, logged))
        self._file = self.path.open("a", encoding="utf-8")
        self._last_step: int = kept[-1][STEP] if kept else 0
        self._pause = {PAUSE: max(0.0, time.time() - kept[-1][WALL_TIME])} if kept else {}
        self._points = set(map(_point, kept))
        self._watched: tuple[nn.Module, int] | None = None
        self._last_training_step = next((row[STEP] for row in reversed(kept) if _of_training(row)), None)
        for row in kept:  # those from the purge step on are of an earlier phase, whose steps count something else
            again = purge is not None and row[STEP] >= purge
            self._tell(row, [sink for sink in self._sinks if again or sink.is_new])

    def watch(self, network: nn.Module, steps: int) -> None:
        """Record the norms of the trained matrices and of their gradients from now on, beside ``train/`` metrics.

        Args:
            network: What is trained.
            steps: Of the whole record, over which the points are spread.
        """
        self._watched = (network, max(1, steps // LAYER_POINTS))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics at a step; the file is flushed, so that a crash loses nothing logged."""
        values = {key: float(value) for key, value in metrics.items()} | self._layers(metrics, step) | self._pause
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        row: Row = {STEP: step, WALL_TIME: time.time(), **finite}
        with disk_errors(self.path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        self._last_step, self._pause = step, {}
        self._points.add(_point(row))
        self._tell(row, self._sinks)

    def log_once(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics unless the step has these keys already: a run may be killed after its last point."""
        if (step, frozenset(metrics)) not in self._points:
            self.log(metrics, step)

    def figure(self, tag: str, draw: Callable[[], Figure | None], step: int) -> None:
        """Show a figure and keep it as ``figures/<tag>.png``; without a tracker to show it nothing is drawn.

        Args:
            tag: Its name.
            draw: Makes the figure; None where there is nothing to show.
            step: Where it belongs.
        """
        drawn = draw() if self._sinks else None
        if drawn is None:
            return
        path = self.path.parent / "figures" / f"{tag.replace('/', '_')}.png"
        picture = pixels(drawn)  # once, for the file and for all sinks
        write_file(path, lambda aside: Image.fromarray(picture).save(aside, format="png"))
        self._show(lambda sink: sink.image(tag, picture, step))

    def histogram(self, tag: str, values: NDArray[np.floating[Any]], step: int) -> None:
        """Show how numbers are distributed."""
        self._show(lambda sink: sink.histogram(tag, values, step))

    def video(self, tag: str, gif: Path, step: int) -> None:
        """Show an animated GIF."""
        self._show(lambda sink: sink.video(tag, gif, step))

    def finished(self, results: Mapping[str, Any]) -> None:
        """Show the run as finished, with those of the results that are numbers."""
        self.figure("overview", lambda: overview_figure(read_metrics(self.path.parent)), self._last_step)
        numbers = {key: float(value) for key, value in results.items() if isinstance(value, int | float)}
        self._show(lambda sink: sink.finished(numbers))

    def close(self) -> None:
        """Flush and close."""
        try:
            with disk_errors(self.path):
                self._file.close()
        finally:
            self._show(lambda sink: sink.close())

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tell(self, row: Row, sinks: Sequence[Sink]) -> None:
        values = {key: math.nan if row[key] is None else row[key] for key in row if key not in (STEP, WALL_TIME)}
        self._show(lambda sink: sink.scalars(values, row[STEP], row[WALL_TIME]), sinks)

    def _show(self, what: Callable[[Sink], object], sinks: Sequence[Sink] | None = None) -> None:
        """Let the sinks, all unless some are named, take something.

        Raises:
            UserError: The disk is full.
        """
        with disk_errors(self.path.parent):
            for sink in self._sinks if sinks is None else sinks:
                what(sink)

    def _layers(self, metrics: Mapping[str, float], step: int) -> dict[str, float]:
        """Norms of layers, at the first training metrics and then where a multiple of the interval was passed."""
        if self._watched is None or not _of_training(metrics):
            return {}
        network, every = self._watched
        before, self._last_training_step = self._last_training_step, step
        return layer_norms(network) if before is None or step // every != before // every else {}


def read_metrics(run_dir: Path) -> list[Row]:
    """Rows of ``metrics.jsonl``; damaged lines are skipped with a warning, except a last one cut off by a crash."""
    path = run_dir / METRICS_FILE
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = [_row(line) for line in lines]
    damaged = [number for number, row in enumerate(rows[:-1], 1) if row is None and lines[number - 1].strip()]
    if damaged:
        log.warning("%s: damaged lines are left out: %s.", path, ", ".join(map(str, damaged)))
    return [row for row in rows if row is not None]


def _row(line: bytes) -> Row | None:
    """A row, or None if the line is not one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get(STEP)) is not int or not _is_number(row.get(WALL_TIME)):
        return None
    if not all(value is None or _is_number(value) for value in row.values()):
        return None
    return {RENAMED.get(str(key), str(key)): value for key, value in row.items()}


def _of_training(metrics: Mapping[str, Any]) -> bool:
    return any(key.startswith(TRAINING) for key in metrics)


def _of_cloning(row: Row) -> bool:
    return any(key.startswith(CLONING) for key in row)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _point(row: Row) -> tuple[int, frozenset[str]]:
    """What tells rows apart: two of one step have different metrics."""
    return row[STEP], frozenset(row) - {STEP, WALL_TIME, PAUSE}


def open_sinks(names: tuple[str, ...], run: RunInfo) -> list[Sink]:
    """The sinks of these names.

    Raises:
        UnknownNameError: There is none of that name.
        UserError: Its package is not installed.
    """
    return [_maker(name)(run) for name in names]


def _maker(name: str) -> Callable[[RunInfo], Sink]:
    check_trackers((name,))
    if name == TENSORBOARD:
        from eva_rl.tracking.tensorboard import TensorBoardSink

        return TensorBoardSink
    from eva_rl.tracking import services

    return services.TrackioSink if name == "trackio" else services.WandbSink


class NullTracker(Tracker):
    """A no-op tracker for every rank but 0."""

    def __init__(self) -> None:
        pass

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def log_once(self, metrics: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def figure(self, tag: str, draw: Callable[[], Figure | None], step: int) -> None:
        """Do nothing."""

    def watch(self, network: nn.Module, steps: int) -> None:
        """Do nothing."""

    def histogram(self, tag: str, values: NDArray[np.floating[Any]], step: int) -> None:
        """Do nothing."""

    def video(self, tag: str, gif: Path, step: int) -> None:
        """Do nothing."""

    def finished(self, results: Mapping[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def by_training_step(rows: Iterable[Mapping[str, float]]) -> Iterator[tuple[float, Mapping[str, float]]]:
    """Rows of a record with the env steps of training before each; of one without any, with its steps."""
    kept, trained = list(rows), 0.0
    online = any(ENV_STEPS in row for row in kept)
    for row in kept:
        trained = row.get(ENV_STEPS, trained)
        yield (trained if online else row[STEP]), row


def open_tracker(
    run_dir: Path,
    resume: Resume | None,
    trackers: Sequence[str] = (TENSORBOARD,),
    hyperparameters: Mapping[str, Any] | None = None,
    *,
    writes: bool = True,
) -> Tracker:
    """The tracker of a run, see :class:`Tracker`; a :class:`NullTracker` where ``writes`` is false."""
    return Tracker(run_dir, resume, tuple(trackers), hyperparameters) if writes else NullTracker()
