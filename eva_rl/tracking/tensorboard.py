"""TensorBoard: scalars, pictures, videos, histograms, hyperparameters, and a dashboard that opens in a useful state."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from eva_rl.tracking.sinks import RunInfo

TABLE = (
    "eval/success_rate",
    "eval_before/success_rate",
    "eval/mean_reward",
    "eval_before/mean_reward",
    "validation/success_rate",
    "train/loss",
)
"""Metrics beside the hyperparameters."""
LAYOUT: dict[str, dict[str, list[Any]]] = {
    "Success rate": {
        "Success rate, validation, while training": ["Margin", ["validation/success_rate"] * 3],
        "Success rate, held out, before and after": ["Margin", ["eval/success_rate"] * 3],
        "Success rate, rollouts while learning": ["Multiline", ["^rollout/success_rate$"]],
    },
    "Return": {
        "Return, validation, while training": ["Margin", ["validation/mean_reward"] * 3],
        "Return, held out, before and after": ["Margin", ["eval/mean_reward"] * 3],
        "Return, rollouts while learning": ["Multiline", ["^rollout/ep_rew_mean$"]],
    },
    "Training": {
        "Loss": ["Margin", ["train/loss"] * 3],
        "Loss, cloning before": ["Margin", ["bc/train/loss"] * 3],
        "Losses": ["Multiline", ["(bc/)?train/.+_loss$"]],
        "Gradient norm before clipping": ["Margin", ["train/gradient_norm"] * 3],
        "Gradient norm before clipping, cloning before": ["Margin", ["bc/train/gradient_norm"] * 3],
        "Learning rate": ["Margin", ["train/learning_rate"] * 3],
        "Learning rate, cloning before": ["Margin", ["bc/train/learning_rate"] * 3],
        "Speed": ["Multiline", ["(bc/)?time/(updates_per_second|fps)"]],
    },
    "Layers": {
        "Weight norm: A": ["Multiline", [r"layers/weight_norm/.*\.A$"]],
        "Weight norm: B": ["Multiline", [r"layers/weight_norm/.*\.B$"]],
        "Gradient norm: A": ["Multiline", [r"layers/gradient_norm/.*\.A$"]],
        "Gradient norm: B": ["Multiline", [r"layers/gradient_norm/.*\.B$"]],
        "Weight norm: others": ["Multiline", [r"layers/weight_norm/(?!.*\.[AB]$)"]],
        "Gradient norm: others": ["Multiline", [r"layers/gradient_norm/(?!.*\.[AB]$)"]],
    },
}
"""Charts of the Custom Scalars tab: title, kind, regular expressions of tags (Multiline) or value and bounds (Margin).

TensorBoard's axes leave out the lowest and the highest twentieth of a chart's values, of two points both. A margin of
zero width counts each point three times, so that up to 13 points stay inside; 200 gradient steps make 11. Where
all values are one, the axis still goes to 2: TensorBoard takes no bounds.
"""


EVENTS = "events.out.tfevents.*"


class TensorBoardSink:
    """Writes ``tb/`` of a run directory; all of a run lies in one TensorBoard run.

    Args:
        run: The run.
    """

    def __init__(self, run: RunInfo) -> None:
        folder = run.run_dir / "tb"
        if run.purge_step is None:  # what a run that was killed before its first checkpoint left would be shown twice
            for events in folder.glob(EVENTS):
                events.unlink()
        self.is_new = not any(folder.glob(EVENTS))
        self._writer = SummaryWriter(str(folder), purge_step=None if self.is_new else run.purge_step)
        values = {key: value for key, value in run.hyperparameters.items() if value is not None}
        experiment, begun, self._ended = hparams(  # type: ignore[no-untyped-call]
            values, dict.fromkeys(TABLE, 0.0)
        )
        self._layout: dict[str, dict[str, list[Any]]] = {}
        self._tags: set[str] = set()
        if self.is_new:
            self._add(experiment)
            self._add(begun)
        self._show_charts(tag for _, tags in run.logged for tag in tags)

    def scalars(self, metrics: Mapping[str, float], step: int, wall_time: float) -> None:
        """Metrics of a step."""
        self._show_charts(metrics)
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step, wall_time)
        self._writer.flush()  # what metrics.jsonl holds is not logged again after a crash

    def image(self, tag: str, pixels: NDArray[np.uint8], step: int) -> None:
        """A picture, (height, width, 3)."""
        self._writer.add_image(tag, pixels, step, dataformats="HWC")

    def video(self, tag: str, gif: Path, step: int) -> None:
        """An animated GIF, which TensorBoard plays among the images; the bytes of the file are shown as they are."""
        content = gif.read_bytes()
        width, height = struct.unpack("<HH", content[6:10])  # GIF89a, section 18: the logical screen
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
        self._add(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def histogram(self, tag: str, values: NDArray[np.floating[Any]], step: int) -> None:
        """Numbers of any shape."""
        self._writer.add_histogram(tag, values, step)

    def finished(self, results: Mapping[str, float]) -> None:
        """Mark the run as finished; its results are the last points of its scalars."""
        self._add(self._ended)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()

    def _show_charts(self, tags: Iterable[str]) -> None:
        """Add the charts of tags that were not seen before: a chart that stays empty is not shown."""
        if new := set(tags) - self._tags:
            self._tags |= new
            layout = layout_of(self._tags)
            if layout != self._layout:
                self._layout = layout
                self._writer.add_custom_scalars(layout)  # TensorBoard reads a run's last layout

    def _add(self, summary: Summary, step: int = 0) -> None:
        writer: Any = self._writer.file_writer
        writer.add_summary(summary, step)


def layout_of(tags: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """The charts of :data:`LAYOUT` that show at least one of these tags."""
    known = list(tags)
    shown = {
        category: {title: chart for title, chart in charts.items() if _shows(chart[0], chart[1], known)}
        for category, charts in LAYOUT.items()
    }
    return {category: charts for category, charts in shown.items() if charts}


def _shows(kind: str, names: Iterable[str], tags: Iterable[str]) -> bool:
    if kind == "Margin":
        return set(names) <= set(tags)
    return any(re.search(pattern, tag) for pattern in names for tag in tags)
