"""Trackio and Weights & Biases, which are extras: ``pip install 'eva-rl[trackio]'``, ``'eva-rl[wandb]'``."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eva_rl.errors import UserError
from eva_rl.files import write_file
from eva_rl.tracking.sinks import Point, RunInfo

PROJECT = "eva-rl"
STEP = "step"


class WandbSink:
    """A run of Weights & Biases; wandb's own settings (``WANDB_MODE``) decide where it goes, and whether at all.

    Args:
        run: The run; a resumed one keeps its identity.
    """

    def __init__(self, run: RunInfo) -> None:
        import wandb

        self._wandb = wandb
        identity, self.is_new = _identity(run, "wandb_id")
        self._logged: frozenset[Point] = frozenset() if self.is_new else run.logged
        try:
            self._run: Any = wandb.init(
                project=PROJECT,
                name=run.name,
                id=identity,
                resume="allow",
                dir=str(run.run_dir),
                config=dict(run.hyperparameters),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"tracker=wandb: Weights & Biases says: {error} Type wandb login, or set "
                "WANDB_MODE=offline to keep the run on this machine."
            ) from error
        self._run.define_metric("*", step_metric=STEP)

    def scalars(self, metrics: Mapping[str, float], step: int, wall_time: float) -> None:
        """Metrics of a step, unless they were shown before the run was interrupted."""
        if (step, frozenset(metrics)) not in self._logged:
            self._run.log({**metrics, STEP: step})

    def image(self, tag: str, pixels: NDArray[np.uint8], step: int) -> None:
        """A picture, (height, width, 3)."""
        self._run.log({tag: self._wandb.Image(pixels), STEP: step})

    def video(self, tag: str, gif: Path, step: int) -> None:
        """An animated GIF."""
        self._run.log({tag: self._wandb.Video(str(gif), format="gif"), STEP: step})

    def histogram(self, tag: str, values: NDArray[np.floating[Any]], step: int) -> None:
        """Numbers of any shape."""
        self._run.log({tag: self._wandb.Histogram(values.ravel()), STEP: step})

    def finished(self, results: Mapping[str, float]) -> None:
        """The run's summary."""
        self._run.summary.update(dict(results))

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class TrackioSink:
    """A run of Trackio, which keeps its records on this machine; ``trackio show`` serves them.

    Args:
        run: The run; a resumed one keeps its name.
    """

    def __init__(self, run: RunInfo) -> None:
        import trackio

        self._trackio: Any = trackio
        identity, self.is_new = _identity(run, "trackio_id")
        self._logged: frozenset[Point] = frozenset() if self.is_new else run.logged
        name = f"{run.name}-{identity}"
        self._run: Any = trackio.init(
            project=PROJECT, name=name, resume="allow", config=dict(run.hyperparameters), embed=False
        )

    def scalars(self, metrics: Mapping[str, float], step: int, wall_time: float) -> None:
        """Metrics of a step, unless they were shown before the run was interrupted."""
        if (step, frozenset(metrics)) not in self._logged:
            self._run.log(dict(metrics), step=step)

    def image(self, tag: str, pixels: NDArray[np.uint8], step: int) -> None:
        """A picture, (height, width, 3)."""
        self._run.log({tag: self._trackio.Image(pixels)}, step=step)

    def video(self, tag: str, gif: Path, step: int) -> None:
        """An animated GIF."""
        self._run.log({tag: self._trackio.Video(str(gif), format="gif")}, step=step)

    def histogram(self, tag: str, values: NDArray[np.floating[Any]], step: int) -> None:
        """Numbers of any shape."""
        self._run.log({tag: self._trackio.Histogram(values.ravel())}, step=step)

    def finished(self, results: Mapping[str, float]) -> None:
        """Nothing: the last points are the results."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _identity(run: RunInfo, name: str) -> tuple[str, bool]:
    """What a service knows the run by, kept for a run that goes on, new for one that starts afresh; and which it is."""
    path = run.run_dir / name
    is_new = run.purge_step is None or not path.exists()
    if is_new:
        write_file(path, lambda aside: aside.write_text(uuid.uuid4().hex[:8]))
    return path.read_text().strip(), is_new
