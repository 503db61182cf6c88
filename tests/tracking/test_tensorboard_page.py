"""TensorBoard, served on loopback and opened in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from eva_rl.rollouts.video import write_video
from eva_rl.tracking import Tracker
from eva_rl.tracking.figures import rank_figure

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a TensorBoard that shows a small run."""
    film = tmp_path / "film.gif"
    write_video(film, [np.full((20, 30, 3), shade, np.uint8) for shade in (0, 240)])
    with Tracker(tmp_path / "run", hyperparameters={"adapter": "eva", "rank": 8}) as tracker:
        tracker.figure("eva/ranks", lambda: rank_figure({"blocks.0.mlp.up_proj": 7}), 0)
        for step in range(3):
            tracker.log({"eval/success_rate": step / 2, "train/loss": 1.0 - step / 4}, step)
        tracker.video("eval/before_and_after", film, 2)
        tracker.finished({})
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "run"), "--host", "127.0.0.1"]
    log = tmp_path / "tensorboard.log"
    with log.open("w") as out:
        server = subprocess.Popen([*command, "--port", "0"], stdout=out, stderr=subprocess.STDOUT)
    try:
        yield _address(server, log)
    finally:
        server.terminate()
        server.wait(30)


def _address(server: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(600):
        found = re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())
        if found:
            return found.group()
        try:
            server.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
        break
    raise AssertionError(f"TensorBoard did not start: {log.read_text()}")


def seen(address: str, tmp_path: Path) -> str:
    """The page's document after its scripts have run."""
    assert CHROMIUM is not None
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1600,4000",
        f"--user-data-dir={tmp_path / 'browser'}",
    ]
    command = [CHROMIUM, *options, "--virtual-time-budget=20000", "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
def test_tensorboard_opens_with_our_tags(address: str, tmp_path: Path) -> None:
    page = seen(f"{address}#timeseries", tmp_path)
    for tag in ("eva/ranks", "eval/success_rate", "eval/before_and_after"):
        assert tag in page
    assert "never/logged" not in page
    with urllib.request.urlopen(f"{address}data/plugin/custom_scalars/layout") as answer:
        layout = json.load(answer)
    assert [category["title"] for category in layout["category"]] == ["Success rate", "Training"], (
        "the run has no norms of layers"
    )
    with urllib.request.urlopen(f"{address}data/plugins_listing") as answer:
        plugins = json.load(answer)
    assert all(plugins[name]["enabled"] for name in ("scalars", "images", "custom_scalars", "hparams"))
