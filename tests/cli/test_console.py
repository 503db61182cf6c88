from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eva_rl import doctor
from eva_rl.cli import console as console_module
from eva_rl.cli.command import run_command
from eva_rl.cli.console import (
    LINE_SECONDS,
    OF_ENV_STEPS,
    LineProgress,
    TrainingProgress,
    counting_progress,
    say,
    training_progress,
)
from eva_rl.finetune import command  # noqa: F401 - registers the command


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
    progress = LineProgress("Training", 100, clock=lambda: now)
    for step in range(1, 101):
        now += LINE_SECONDS / 10
        progress.show(step)
    assert len(capsys.readouterr().err.splitlines()) == 1 + 10


def test_a_terminal_gets_whole_words_and_a_log_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/" + "long/" * 20
    text = f"[red]Error:[/] {'some words ' * 12}and the path {path} stays whole"
    for is_terminal in (True, False):
        printed = StringIO()
        own = Console(file=printed, force_terminal=is_terminal, width=80, highlight=False, color_system=None)
        monkeypatch.setattr(console_module, "console", own)
        say(text, markup=True)
        lines = printed.getvalue().splitlines()
        assert path in " ".join(lines)
        if is_terminal:
            assert all(len(line) <= 80 or line == path for line in lines)
            assert all(word in {"Error:", "some", "words", "and", "the", "path", path, "stays", "whole"}
                       for line in lines for word in line.split())  # fmt: skip
        else:
            assert len(lines) == 1


def interrupted(
    number: signal.Signals, name: str = "doctor", typed: Sequence[str] = ("seconds=0.1",), **options: Any
) -> object:
    """What comes after a command, in a program that calls one and gets a signal in it, once its folder is there."""

    def main(config: Any) -> None:
        if name == "finetune":
            Path(config.run_dir).mkdir(parents=True)
        os.kill(os.getpid(), number)
        time.sleep(10)

    return run_command(name, main, doctor.HELP, typed, **options)


def test_sigterm_ends_the_program_that_called_a_command_and_ctrl_c_the_command() -> None:
    assert interrupted(signal.SIGINT) == 130
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        interrupted(signal.SIGTERM)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interruption_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was typed goes on; a folder that was made for the run is named; what leaves no checkpoint does not go on."""
    monkeypatch.chdir(tmp_path)
    again = {"multirun": "eva_rl.launch.multirun", "continues": True}
    assert interrupted(signal.SIGINT, "finetune", ["env=push-v3"], **again) == 130
    (made,) = (tmp_path / "runs").iterdir()
    said = capsys.readouterr().err
    assert said.endswith(
        f" Type the same command with run_dir=runs/{made.name} to continue from the last checkpoint, or from the "
        "start where there is none yet.\n"
    )
    for number, typed in enumerate((["run_dir=mine0"], ["--run_dir=mine1"], ["--run-dir", "mine2"])):
        assert interrupted(signal.SIGINT, "finetune", ["env=push-v3", *typed], **again) == 130
        assert "Type the same command again" in capsys.readouterr().err
        assert (tmp_path / f"mine{number}").is_dir()
    assert interrupted(signal.SIGINT) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_a_bar_of_env_steps_leaves_validation_out() -> None:
    """The axis counts it, so that the bar ended at 460 of 240."""
    shown: list[int] = []

    class Bar:
        def show(self, completed: int, shown_text: str = "") -> None:
            shown.append(completed)

    log = TrainingProgress(Bar(), OF_ENV_STEPS).also(lambda *_: None)
    log({"time/env_steps": 60, "time/env_steps_played": 100}, 100)
    log({"validation/success_rate": 0.5}, 160)
    log({"time/total_timesteps": 120}, 220)
    assert shown == [60, 60, 120]
