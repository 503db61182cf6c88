from __future__ import annotations

import pytest

from eva_rl.cli.console import LINE_SECONDS, LineProgress, counting_progress, training_progress


def test_a_log_gets_a_line_a_phase(capsys: pytest.CaptureFixture[str]) -> None:
    with counting_progress("Before  ", 3) as advance:
        for _ in range(3):
            advance(None)
    with training_progress(10) as bar:
        bar.also(lambda metrics, step: None)({"train/loss": 0.5}, 10)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" s")[0] for line in lines[:2]] == ["Before: 0 of 3", "Before: 3 of 3, 0"]
    assert lines[3].startswith("Training (gradient steps): 10 of 10, 0 s  loss 0.5000")
    assert len(lines) == 4


def test_a_log_gets_a_line_each_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    progress = LineProgress("Training", 100, lambda: now)
    for step in range(1, 101):
        now += LINE_SECONDS / 10
        progress.show(step)
    assert len(capsys.readouterr().err.splitlines()) == 1 + 10
