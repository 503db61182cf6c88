"""What the processes of a run that do not write use in place of what writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from eva_rl.tracking import Tracker
from eva_rl.training.distributed import Ranks


class SilentTracker(Tracker):
    """Takes what a tracker takes, and writes nothing."""

    def __init__(self) -> None:
        pass

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def open_tracker(run_dir: Path, resume_step: int | None) -> Tracker:
    """The tracker of a run; on all processes but the first, one that writes nothing."""
    return Tracker(run_dir, resume_step) if Ranks.here().first else SilentTracker()
