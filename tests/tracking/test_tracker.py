from __future__ import annotations

import json
import math
import re
import sqlite3
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn

from eva_rl.errors import UserError
from eva_rl.rollouts.video import write_video
from eva_rl.tracking import Resume, Tracker, check_trackers
from eva_rl.tracking.figures import overview_figure, pixels, rank_figure, spectrum_figure
from eva_rl.tracking.layers import layer_norms, short_name
from eva_rl.tracking.tensorboard import LAYOUT
from eva_rl.tracking.tracker import PAUSE, NullTracker, open_tracker, read_metrics


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tb"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def wait_for_the_next_second() -> None:
    """TensorBoard reads files by name, which tells the second and then a number that is compared as text."""
    time.sleep(1.01 - time.time() % 1)


def test_a_resumed_run_has_no_point_twice(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        for step in range(1, 6):
            tracker.log({"train/loss": step}, step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')  # the crash came while writing
    wait_for_the_next_second()
    with Tracker(tmp_path, resume=Resume(3)) as tracker:
        for step in range(4, 7):
            tracker.log({"train/loss": 10 * step}, step)
    expected = [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]
    assert [(row["step"], row["train/loss"]) for row in read_metrics(tmp_path)] == expected
    assert scalars(tmp_path, "train/loss") == expected
    assert [row.get(PAUSE, 0) > 0 for row in read_metrics(tmp_path)] == [False] * 3 + [True] + [False] * 2


def test_a_tracker_that_is_named_later_shows_the_whole_run(tmp_path: Path) -> None:
    with Tracker(tmp_path, trackers=()) as tracker:
        for step in range(1, 4):
            tracker.log({"train/loss": step}, step)
    with Tracker(tmp_path, resume=Resume(2), hyperparameters={"seed": 3}) as tracker:
        tracker.log({"train/loss": 30}, 3)
    assert scalars(tmp_path, "train/loss") == [(1, 1), (2, 2), (3, 30)]
    assert hparams_of(tmp_path)["seed"] == 3


def test_a_run_that_starts_afresh_shows_nothing_of_its_first_start(tmp_path: Path) -> None:
    for value in (1.0, 2.0):  # the first was killed before its first checkpoint
        with Tracker(tmp_path) as tracker:
            tracker.log({"eva/rows": value}, 0)
    assert [row["eva/rows"] for row in read_metrics(tmp_path)] == [2]
    assert scalars(tmp_path, "eva/rows") == [(0, 2)]


def test_the_last_point_is_logged_once(tmp_path: Path) -> None:
    """A run that is killed after it resumes from its last step, and has the point already."""
    for resume in (None, Resume(6), Resume(6)):
        wait_for_the_next_second()
        with Tracker(tmp_path, resume) as tracker:
            tracker.log_once({"eval/mean_reward": 4.0}, 6)
            tracker.log_once({"eval/mean_reward": 4.0}, 6)
            tracker.log_once({"eval/mean_reward": 5.0}, 7)
    assert [(row["step"], row["eval/mean_reward"]) for row in read_metrics(tmp_path)] == [(6, 4), (7, 5)]
    assert scalars(tmp_path, "eval/mean_reward") == [(6, 4), (7, 5)]


def test_a_killed_run_has_shown_all_that_it_recorded(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log({"train/loss": 1.0}, 1)
    assert scalars(tmp_path, "train/loss") == [(1, 1)], "written without being closed"
    tracker.close()


def test_metrics_of_earlier_versions_are_read_under_their_new_names(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "wall_time": 1.0, "eva/directions_aimed": 2.0}\n')
    with Tracker(tmp_path, resume=Resume(3)) as tracker:
        tracker.log({"eva/directions_reinitialised": 5.0}, 6)
    assert [row["eva/directions_reinitialised"] for row in read_metrics(tmp_path)] == [2, 5]
    assert "directions_aimed" not in (tmp_path / "metrics.jsonl").read_text()


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
        tracker.figure("eva/ranks", lambda: figure, 0)
    assert (tmp_path / "figures" / "eva_ranks.png").read_bytes().startswith(b"\x89PNG")
    assert pixels(figure).shape[2] == 3
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert events.Tags()["images"] == ["eva/ranks"]


def test_a_run_of_two_phases_resumes_in_either(tmp_path: Path) -> None:
    """Cloning counts gradient steps, what follows env steps: neither forgets points of the other."""

    def record(tracker: Tracker, cloning: range, online: range) -> None:
        for step in cloning:
            tracker.log({"bc/train/loss": step}, step)
        for step in online:
            tracker.log({"train/loss": step}, step)

    with Tracker(tmp_path) as tracker:
        tracker.log({"eval/success_rate": 0}, 0)
        record(tracker, range(1, 9), range(2, 7, 2))
    wait_for_the_next_second()
    with Tracker(tmp_path, Resume(4)) as tracker:
        record(tracker, range(0), range(6, 9, 2))
    assert scalars(tmp_path, "bc/train/loss") == [(step, step) for step in range(1, 9)]
    assert scalars(tmp_path, "train/loss") == [(step, step) for step in range(2, 9, 2)]
    wait_for_the_next_second()
    with Tracker(tmp_path, Resume(5, cloning=True)) as tracker:
        record(tracker, range(6, 9), range(2, 5, 2))
    expected = [(step, step) for step in range(1, 9)]
    assert scalars(tmp_path, "bc/train/loss") == expected
    assert [(r["step"], r["bc/train/loss"]) for r in read_metrics(tmp_path) if "bc/train/loss" in r] == expected
    assert scalars(tmp_path, "train/loss") == [(2, 2), (4, 4)]
    assert scalars(tmp_path, "eval/success_rate") == [(0, 0)]


def test_norms_of_layers(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1))
    network[1].requires_grad_(False)
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[3.0, 4.0]]))
    network(torch.tensor([[0.0, 2.0]])).sum().backward()
    expected = abs(float(network[1].weight)) * 2
    assert layer_norms(network) == {
        "layers/weight_norm/0": pytest.approx(5),
        "layers/gradient_norm/0": pytest.approx(expected),
    }
    assert short_name("blocks.0.attention.q_proj.lora_A.default.weight") == "blocks.0.attention.q_proj.A"
    with Tracker(tmp_path) as tracker:
        tracker.watch(network, 1000)
        for step in range(1, 1001):
            tracker.log({"train/loss": 0.0}, step)
            tracker.log({"validation/success_rate": 0.0}, step)
    seen = [row["step"] for row in read_metrics(tmp_path) if "layers/weight_norm/0" in row]
    assert seen == [1, *range(20, 1001, 20)]


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    """The plugins' own data: the table of runs, the dashboard, a GIF with its size, a histogram."""
    gif = tmp_path / "film.gif"
    write_video(gif, [np.full((20, 30, 3), shade, np.uint8) for shade in (0, 120, 240)])
    with Tracker(tmp_path, hyperparameters={"rank": 8, "env": "reach", "nothing": None}) as tracker:
        tracker.log({"eval/success_rate": 0.5}, 3)
        tracker.video("film", gif, 3)
        tracker.histogram("actions", np.arange(5.0), 3)
        tracker.finished({"eval/success_rate": 0.5})
    assert [path.name for path in (tmp_path / "tb").iterdir() if path.is_dir()] == [], "one TensorBoard run"
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    (image,) = events.Images("film")
    assert (image.height, image.width, image.encoded_image_string) == (20, 30, gif.read_bytes())
    assert events.Histograms("actions")[0].histogram_value.max == 4
    begun = HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    ).session_start_info.hparams
    assert (begun["rank"].number_value, begun["env"].string_value, "nothing" in begun) == (8, "reach", False)
    assert "_hparams_/session_end_info" in events.summary_metadata
    assert "custom_scalars__config__" in events.summary_metadata


def hparams_of(run_dir: Path) -> dict[str, float]:
    """The settings that are numbers in TensorBoard's table of runs."""
    events = EventAccumulator(str(run_dir / "tb"))
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    begun = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: value.number_value for name, value in begun.items()}


def charts(run_dir: Path) -> dict[str, list[str]]:
    """Titles of the dashboard's charts by category, as TensorBoard reads them: a run's last layout."""
    events = EventAccumulator(str(run_dir / "tb"))
    events.Reload()
    content = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    layout = Layout.FromString(content)
    return {category.title: [chart.title for chart in category.chart] for category in layout.category}


def test_the_dashboard_has_no_chart_that_stays_empty(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.log({"eval/mean_reward": 100.0}, 0)
        assert charts(tmp_path) == {"Return": ["Return, held out, before and after"]}
        tracker.log({"train/loss": 0.5}, 5)
    expected = {"Return": ["Return, held out, before and after"], "Training": ["Loss"]}
    assert charts(tmp_path) == expected
    wait_for_the_next_second()
    with Tracker(tmp_path, resume=Resume(5)) as tracker:
        assert charts(tmp_path) == expected, "a run that goes on shows what it has"
        tracker.log({"rollout/success_rate": 0.5}, 6)
    assert charts(tmp_path) == {"Success rate": ["Success rate, rollouts while learning"], **expected}
    for kind, tags in (chart for category in LAYOUT.values() for chart in category.values()):
        assert kind == "Margin" or re.compile(*tags), "one regular expression each"


def test_a_run_of_defaults_is_seen_whole() -> None:
    """The loss, its gradient and the learning rate of 11 points, the first of which is far above the others."""
    points = [1.0, *np.linspace(0.1, 0.01, 10)]
    for title in ("Loss", "Gradient norm before clipping", "Learning rate"):
        kind, tags = LAYOUT["Training"][title]
        assert kind == "Margin"
        low, high = np.quantile(points * len(tags), [0.05, 0.95])
        assert low == min(points)
        assert high == max(points)


def test_both_ends_of_two_points_are_inside_the_axis() -> None:
    """TensorBoard's "Ignore outliers" takes the axis from the values between the quantiles .05 and .95."""
    points = [535.0, 1485.0]
    kind, tags = LAYOUT["Return"]["Return, held out, before and after"]
    assert (kind, set(tags)) == ("Margin", {"eval/mean_reward"})
    for repeats, inside in ((1, set()), (len(tags), set(points))):
        values = points * repeats
        low, high = np.quantile(values, [0.05, 0.95])
        assert {value for value in values if low <= value <= high} == inside


@pytest.mark.filterwarnings("error")
def test_a_loss_of_zero_is_drawn_without_a_warning() -> None:
    for losses in ([0.0, 0.0], [0.5, 0.0], [-1.0, -2.0]):
        rows = [{"step": step, "train/loss": loss, "eval/success_rate": 1.0} for step, loss in enumerate(losses)]
        figure = overview_figure(rows)
        assert figure is not None
        pixels(figure)
        assert list(figure.axes[1].lines[0].get_ydata()) == losses


def test_a_tracker_that_is_unknown_or_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="wandb"):
        check_trackers(("wandbb",))
    monkeypatch.setitem(sys.modules, "trackio", None)  # as Python marks what cannot be imported
    with pytest.raises(UserError, match=r"pip install 'eva-rl\[trackio\]'"):
        check_trackers(("tensorboard", "trackio"))


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs pip install 'eva-rl[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with Tracker(tmp_path, None, ("wandb",), {"rank": 8}) as tracker:
        tracker.log({"train/loss": 0.25}, 1)
        tracker.histogram("actions", np.arange(5.0), 1)
        tracker.finished({"eval/success_rate": 0.5})
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = written.read_bytes()
    assert b"train/loss" in content
    assert b"eval/success_rate" in content


@pytest.mark.slow
def test_trackio_keeps_the_points_of_a_resumed_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="needs pip install 'eva-rl[trackio]'")
    code = """
import sys
from pathlib import Path
from eva_rl.tracking import Tracker
with Tracker(Path(sys.argv[1]), int(sys.argv[2]) or None, ("trackio",), {"rank": 8}) as tracker:
    for step in range(int(sys.argv[2]) + 1, int(sys.argv[3]) + 1):
        tracker.log({"train/loss": step}, step)
"""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for first, last in ((0, 4), (2, 6)):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run"), str(first), str(last)], check=True, timeout=120
        )
    (database,) = (tmp_path / "trackio").glob("eva-rl*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
    assert [(step, json.loads(metrics)["train/loss"]) for step, metrics in rows] == [(s, s) for s in range(1, 7)]


def test_nothing_is_drawn_where_nobody_is_shown_it(tmp_path: Path) -> None:
    with Tracker(tmp_path, trackers=()) as tracker:
        tracker.log({"eval/success_rate": 0.2}, 0)
        tracker.figure("eva/ranks", lambda: pytest.fail("drawn"), 0)
        tracker.finished({})
    assert not (tmp_path / "figures").exists()


def test_a_finished_run_gets_an_overview(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.log({"eval/success_rate": 0.2}, 0)
        tracker.log({"train/loss": 0.5, "validation/success_rate": 0.4}, 5)
        tracker.log({"train/loss": 0.1, "validation/success_rate": 1.0, "eval/success_rate": 1.0}, 10)
        tracker.finished({})
    assert (tmp_path / "figures" / "overview.png").stat().st_size > 1000
    figure = overview_figure(read_metrics(tmp_path))
    assert figure is not None
    success, loss = figure.axes
    low, high = success.get_ylim()
    assert low < 0
    assert 1 < high < 1.1, "no room for a success rate beyond 1"
    assert success.get_xlim()[0] < 0, "the point before training is inside"
    assert {text.get_text() for text in success.get_legend().get_texts()} == {
        "held out, before and after", "validation, while training",
    }  # fmt: skip
    assert list(loss.lines[0].get_ydata()) == [0.5, 0.1]
    assert overview_figure([{"step": 1, "train/loss": 1.0}]) is None


def test_what_does_not_write_takes_every_call(tmp_path: Path) -> None:
    """Other processes than the first get it; a method that it inherited would look for a file."""
    own = {name for name, member in vars(Tracker).items() if callable(member) and not name.startswith("_")}
    assert own <= set(vars(NullTracker)), "each public method is overridden"
    with open_tracker(tmp_path / "run", None, writes=False) as tracker:
        tracker.log_once({"train/loss": 1.0}, 3)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, trackers=())
    tracker._file.close()
    tracker._file = Path("/dev/full").open("w")  # noqa: SIM115 - the tracker closes it
    with pytest.raises(UserError, match=r"metrics\.jsonl could not be written: .*No space left.*Free some space"):
        tracker.log({"train/loss": 1.0}, 1)
    with pytest.raises(UserError, match="could not be written"):
        tracker.close()


def test_a_disk_that_a_tracker_finds_full_is_one_message_too(tmp_path: Path) -> None:
    """TensorBoard's files grow faster than the record, and ended the run with two tracebacks."""

    class Full:
        def __getattr__(self, name: str) -> Any:
            raise OSError(28, "No space left on device")

    tracker = Tracker(tmp_path, trackers=())
    tracker._sinks = [Full()]
    for what in (
        partial(tracker.log, {"train/loss": 1.0}, 1),
        partial(tracker.histogram, "a", np.zeros(3), 1),
        partial(tracker.video, "a", tmp_path, 1),
        tracker.close,
    ):
        with pytest.raises(UserError, match=r"could not be written: .*No space left.*Free some space"):
            what()
