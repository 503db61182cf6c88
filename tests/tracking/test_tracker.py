from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eva_rl.tracking import Tracker
from eva_rl.tracking.figures import pixels, rank_figure, spectrum_figure
from eva_rl.tracking.tracker import read_metrics


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tb"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_resumed_run_has_no_point_twice(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        for step in range(1, 6):
            tracker.log({"train/loss": step}, step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')  # the crash came while writing
    with Tracker(tmp_path, resume=3) as tracker:
        for step in range(4, 7):
            tracker.log({"train/loss": 10 * step}, step)
    expected = [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]
    assert [(row["step"], row["train/loss"]) for row in read_metrics(tmp_path)] == expected
    assert scalars(tmp_path, "train/loss") == expected


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.log({"a": math.nan, "b": 1.0}, 1)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: 1 / 0)
    assert row["a"] is None
    assert row["b"] == 1


def test_pictures_show_what_they_are_given(tmp_path: Path) -> None:
    ranks = {"blocks.0.attention.q_proj": 0, "blocks.0.mlp.up_proj": 7, "blocks.1.mlp.up_proj": 3}
    figure = rank_figure(ranks)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(texts) == ["0", "3", "7"], "a layer that is not a target has no number"
    lines = spectrum_figure({"blocks.0.mlp.up_proj": [0.5, 0.25]}).axes[0].lines
    np.testing.assert_allclose(lines[0].get_ydata(), [0.5, 0.75])
    with Tracker(tmp_path) as tracker:
        tracker.figure("eva/ranks", figure, 0)
    assert (tmp_path / "figures" / "eva_ranks.png").read_bytes().startswith(b"\x89PNG")
    assert pixels(figure).shape[2] == 3
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert events.Tags()["images"] == ["eva/ranks"]
