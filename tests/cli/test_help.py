from __future__ import annotations

from pathlib import Path

import pytest

from eva_rl import evaluate
from eva_rl.cli.help import groups_of
from eva_rl.cli.parsing import parse
from eva_rl.finetune import command as finetune

ROOT = Path(__file__).parent.parent.parent


def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str, width: int = 80) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    assert finetune.main([*argv, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 120])
def test_help_begins_with_examples_and_short_keys(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(capsys, monkeypatch, width=width)
    order = ["Examples:", "\n  env=metaworld/push-v3", "\n  adapter=eva", "\ngeneral", "\nenv  the new task", "\nTasks"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    options = text[places[1] : places[-1]].splitlines()
    assert max(map(len, options)) <= width, "nothing is wrapped by the terminal"


def test_every_key_is_shown_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(capsys, monkeypatch)
    config = parse("finetune", [])
    hidden = {"env.id", "data.source", "policy.path", "adapter.method", "algo.name"}
    for _, _, rows in groups_of(config, {}):
        for key, default, help_text in rows:
            assert help_text, f"{key} is not explained"
            assert key in hidden or f"  {key}={default}" in text


def test_help_shows_the_options_of_the_algorithm_that_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\n  algo.env_steps=" not in help_of(capsys, monkeypatch)
    assert "\n  algo.env_steps=" in help_of(capsys, monkeypatch, "algo=odt")


def test_help_of_a_command_without_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--help"]) == 0
    assert "video=false" in capsys.readouterr().out
