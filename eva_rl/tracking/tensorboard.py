"""TensorBoard: scalars, pictures, videos, histograms, hyperparameters, and a dashboard that opens in a useful state."""

from __future__ import annotations

import struct
from collections.abc import Mapping
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
LAYOUT = {
    "Result": {
        "Success rate, held out, before and after": ["Multiline", ["^eval/success_rate"]],
        "Success rate, validation, while training": ["Multiline", ["^validation/success_rate"]],
        "Success rate, rollouts while learning": ["Multiline", ["^rollout/success_rate"]],
        "Return, held out, before and after": ["Multiline", ["^eval/mean_reward"]],
        "Return, validation, while training": ["Multiline", ["^validation/mean_reward"]],
        "Return, rollouts while learning": ["Multiline", ["^rollout/ep_rew_mean"]],
    },
    "Training": {
        "Loss": ["Multiline", ["(bc/)?train/.*loss$"]],
        "Gradient norm before clipping": ["Multiline", ["(bc/)?train/gradient_norm"]],
        "Learning rate": ["Multiline", ["(bc/)?train/learning_rate"]],
        "Speed": ["Multiline", ["(bc/)?time/(updates_per_second|fps)"]],
    },
    "Layers": {
        "Weight norm: A": ["Multiline", [r"layers/weight_norm/.*\.A$"]],
        "Weight norm: B": ["Multiline", [r"layers/weight_norm/.*\.B$"]],
        "Gradient norm: A": ["Multiline", [r"layers/gradient_norm/.*\.A$"]],
        "Gradient norm: B": ["Multiline", [r"layers/gradient_norm/.*\.B$"]],
        "Weight norm: others": ["Multiline", [r"layers/weight_norm/.*[^.].$"]],
        "Gradient norm: others": ["Multiline", [r"layers/gradient_norm/.*[^.].$"]],
    },
}
"""Charts of the Custom Scalars tab: title, kind, regular expressions of tags."""


class TensorBoardSink:
    """Writes ``tb/`` of a run directory; all of a run lies in one TensorBoard run.

    Args:
        run: The run.
    """

    def __init__(self, run: RunInfo) -> None:
        folder = run.run_dir / "tb"
        if run.purge_step is None:  # what a run that was killed before its first checkpoint left would be shown twice
            for events in folder.glob("events.out.tfevents.*"):
                events.unlink()
        self._writer = SummaryWriter(str(folder), purge_step=run.purge_step)
        values = {key: value for key, value in run.hyperparameters.items() if value is not None}
        experiment, begun, self._ended = hparams(  # type: ignore[no-untyped-call]
            values, dict.fromkeys(TABLE, 0.0)
        )
        if run.purge_step is None:
            self._writer.add_custom_scalars(LAYOUT)
            self._add(experiment)
            self._add(begun)

    def scalars(self, metrics: Mapping[str, float], step: int, wall_time: float) -> None:
        """Metrics of a step."""
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

    def _add(self, summary: Summary, step: int = 0) -> None:
        writer: Any = self._writer.file_writer
        writer.add_summary(summary, step)
