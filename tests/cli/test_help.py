from __future__ import annotations

import re

import pytest

from eva_rl.__main__ import COMMANDS, command_module
from eva_rl.cli import parsing
from eva_rl.cli.help import shipped
from eva_rl.cli.keys import defaults_of, groups_of


def help_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, *words: str, width: int = 80
) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    assert command_module(name).main([*words, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_line_is_wider_than_the_terminal(
    name: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(capsys, monkeypatch, name, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "\n\n\n" not in text
    for line, after in zip(text.splitlines(), text.splitlines()[1:], strict=False):
        if line.endswith("\\"):
            assert after.startswith("      "), "a continued example can be copied as it stands"


def test_help_begins_with_examples_and_short_keys(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(capsys, monkeypatch, "finetune")
    order = ["Examples:", "\n  env=metaworld/push-v3", "\n  adapter=eva", "\ngeneral", "\nenv: the new task", "\nTasks"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_key_is_shown_with_its_default(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(capsys, monkeypatch, name)
    hidden = {*parsing.SHORT_KEYS.values(), *(f"{group}.name" for group in parsing.COMMANDS[name].choices)}
    nodes = {group: next(iter(options.values())) for group, options in parsing.COMMANDS[name].choices.items()}
    for group in groups_of(defaults_of(parsing.COMMANDS[name].schema), nodes):
        for key in group.keys:
            assert key.text, f"{key.name} is not explained"
            assert key.name in hidden or f"  {key.name}={key.shown}" in text


def test_help_shows_the_keys_of_the_algorithm_that_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\n  algo.env_steps=" not in help_of(capsys, monkeypatch, "finetune")
    named = help_of(capsys, monkeypatch, "finetune", "algo=odt")
    assert "\n  algo.env_steps=" in named
    assert "algo=odt --help" not in named, "a pointer to itself"


@pytest.mark.parametrize("name", COMMANDS)
def test_tasks_and_policies_are_listed_where_they_are_taken(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(capsys, monkeypatch, name)
    keys = parsing.known_keys(name, parsing.first_options(name))
    assert ("\nTasks (" in text) == bool({"env.id", "tasks"} & set(keys))
    assert ("\nShipped policies" in text) == ("policy.path" in keys)
    assert ("  cw10 " in text) == (name in {"benchmark", "evaluate", "pretrain"})
    for policy in shipped() if "policy.path" in keys else ():
        assert re.search(rf"^  {policy} +pretrained on", text, re.M)


def test_own_keys_come_before_shared_ones(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_of(capsys, monkeypatch, "benchmark")
    places = [text.index(f"\n  {key}=") for key in ("tasks", "seeds", "launcher", "partition")]
    assert places == sorted(places)


def test_every_key_that_a_text_names_exists() -> None:
    """``bc.updates=0`` in the text of ``algo.bc`` was no key that can be typed."""
    texts, known = {}, set()
    for name in COMMANDS:
        command_module(name)
        command = parsing.COMMANDS[name]
        options = max((len(choices) for choices in command.choices.values()), default=1)
        for index in range(options):
            nodes = {group: list(several.values())[index % len(several)] for group, several in command.choices.items()}
            for group in groups_of(defaults_of(command.schema), nodes):
                texts |= {group.name: group.text} | {key.name: key.text for key in group.keys}
                known |= {key.name for key in group.keys}
    named = {key for text in texts.values() for key in re.findall(r"\b((?:[a-z_]+\.)+[a-z_]+)=", text)}
    assert "algo.bc.updates" in named
    assert {key.removeprefix("finetune.") for key in named} <= known
