"""Where metrics go besides ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from eva_rl.errors import UnknownNameError, UserError

TENSORBOARD = "tensorboard"
SERVICES = {"trackio": "Trackio", "wandb": "Weights & Biases"}
"""Trackers that are extras, by the name of the package and of the extra."""
TRACKERS = (TENSORBOARD, *SERVICES)


Point = tuple[int, frozenset[str]]
"""Step and keys of a row of metrics."""


class Sink(Protocol):
    """Shows metrics, pictures and results.

    Attributes:
        is_new: Whether it has shown nothing of the run yet, as where a continued run names it for the first time.
    """

    is_new: bool

    def scalars(self, metrics: Mapping[str, float], step: int, wall_time: float) -> None:
        """Metrics of a step, at a time in seconds since the epoch."""

    def image(self, tag: str, pixels: NDArray[np.uint8], step: int) -> None:
        """A picture, (height, width, 3)."""

    def video(self, tag: str, gif: Path, step: int) -> None:
        """An animated GIF."""

    def histogram(self, tag: str, values: NDArray[np.floating[Any]], step: int) -> None:
        """Numbers of any shape."""

    def finished(self, results: Mapping[str, float]) -> None:
        """The run is finished, with these results."""

    def close(self) -> None:
        """Write what is not written yet."""


@dataclass(frozen=True)
class RunInfo:
    """A run, as a sink needs to know it.

    Attributes:
        run_dir: The run directory.
        hyperparameters: Settings, flat.
        purge_step: Points from here on were forgotten, for the run goes on from before; None in a new one.
        logged: Step and keys of all points that the run recorded before, the purged ones too: they are logged again,
            with the same values.
    """

    run_dir: Path
    hyperparameters: Mapping[str, Any]
    purge_step: int | None
    logged: frozenset[Point] = frozenset()

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.run_dir.resolve().name


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise unless metrics can go to all of these.

    Raises:
        UnknownNameError: There is none of that name.
        UserError: Its package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise UnknownNameError("tracker", name, TRACKERS)
        if name in SERVICES:
            _check_installed(name)


def _check_installed(name: str) -> None:
    try:
        __import__(name)
    except ImportError as error:
        raise UserError(
            f"tracker={name}: {SERVICES[name]} is not installed ({error}). Type pip install 'eva-rl[{name}]', or "
            f"leave {name} out of tracker=."
        ) from error
