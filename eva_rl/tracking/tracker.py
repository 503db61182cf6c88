"""Metrics to ``metrics.jsonl`` and TensorBoard, under the same keys."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from eva_rl.files import write_file
from eva_rl.tracking.figures import pixels

METRICS_FILE = "metrics.jsonl"
WALL_TIME = "wall_time"


class Tracker:
    """Writes metrics of one run; a resumed run continues both records without duplicated points.

    Args:
        run_dir: The run directory.
        resume_step: Points after this gradient step are removed; None starts afresh.
    """

    def __init__(self, run_dir: Path, resume_step: int | None = None) -> None:
        self.path = run_dir / METRICS_FILE
        run_dir.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            self.path.write_text("")
        else:
            _forget_after(self.path, resume_step)
        purge = None if resume_step is None else resume_step + 1
        self.writer = SummaryWriter(str(run_dir / "tb"), purge_step=purge)
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics at a gradient step; the file is flushed, so that a crash loses nothing logged."""
        row: dict[str, Any] = {"step": step, WALL_TIME: time.time()}
        for key, value in metrics.items():
            number = float(value)
            row[key] = number if math.isfinite(number) else None
            self.writer.add_scalar(key, number, step)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Show a figure in TensorBoard and keep it as ``figures/<tag>.png``."""
        path = self.path.parent / "figures" / f"{tag.replace('/', '_')}.png"
        write_file(path, lambda aside: figure.savefig(aside, dpi=120, format="png"))
        self.writer.add_image(tag, pixels(figure), step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        self.writer.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of ``metrics.jsonl``; a last line cut off by a crash is left out."""
    rows = []
    path = run_dir / METRICS_FILE
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _forget_after(path: Path, step: int) -> None:
    kept = [row for row in read_metrics(path.parent) if row["step"] <= step]
    write_file(path, lambda aside: aside.write_text("".join(json.dumps(row) + "\n" for row in kept)))
