"""What the processes of a run that do not write use in place of what writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from eva_rl.tracking import Resume, Tracker
from eva_rl.tracking.sinks import TENSORBOARD
from eva_rl.training.distributed import Ranks


class SilentTracker(Tracker):
    """Takes what a tracker takes, and writes nothing."""

    def __init__(self) -> None:
        pass

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def figure(self, tag: str, figure: Figure, step: int) -> None:
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


def open_tracker(
    run_dir: Path,
    resume: Resume | int | None,
    trackers: Sequence[str] = (TENSORBOARD,),
    hyperparameters: Mapping[str, Any] | None = None,
) -> Tracker:
    """The tracker of a run, see :class:`Tracker`; on all processes but the first, one that writes nothing."""
    return Tracker(run_dir, resume, tuple(trackers), hyperparameters) if Ranks.here().first else SilentTracker()
