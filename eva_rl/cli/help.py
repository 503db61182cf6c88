"""What ``--help`` shows."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from eva_rl.cli.keys import Key, KeyGroup, defaults_of, groups_of
from eva_rl.cli.parsing import COMMANDS, SHORT_KEYS

KEY_WIDTH = 34
"""Columns of a key with its default, before the text."""
TASK_COLUMN = 14
MAX_WIDTH = 120
TASK_KEYS, POLICY_KEYS = {"env.id", "tasks"}, {"policy.path"}
"""Keys that take tasks, and policies."""


def print_help(name: str, help_text: str, words: Sequence[str] = ()) -> None:
    """Show what a command does, its keys by group with their defaults, and the tasks and policies that it takes.

    Args:
        name: The command.
        help_text: What it does, with examples.
        words: What was typed; an option of a group chosen there is the one that is shown.
    """
    width = min(shutil.get_terminal_size().columns, MAX_WIDTH)
    text = "\n".join(help_lines(name, help_text, words, width))
    sys.stdout.write(re.sub(r"\n{3,}", "\n\n", text) + "\n")


def help_lines(name: str, help_text: str, words: Sequence[str], width: int) -> Iterator[str]:
    """The lines of a command's help, none longer than ``width`` unless it is one word."""
    command = COMMANDS[name]
    chosen = {group: _chosen(group, options, words) for group, options in command.choices.items()}
    nodes = {group: command.choices[group][option] for group, option in chosen.items()}
    groups = list(groups_of(defaults_of(command.schema), nodes))
    keys = {key.name: key for group in groups for key in group.keys}
    short = {short: key for short, key in SHORT_KEYS.items() if key in keys}
    yield f"eva-rl {name} [KEY=VALUE ...]      (or: python -m eva_rl.{name})"
    yield ""
    yield from _prose(help_text, width)
    yield from _first_keys(command.choices, chosen, {s: keys[key] for s, key in short.items()}, width)
    names = (key for key in keys if key.partition(".")[0] in chosen and key.endswith(".name"))
    hidden = {*short.values(), *names}
    for group in groups:
        yield from _section(group, hidden, width)
        if group.name in chosen:
            yield from _other_options(name, group.name, chosen[group.name], command.choices[group.name], width)
    if TASK_KEYS & set(keys):
        several = "mt40" in " ".join([*(key.text for key in keys.values()), *(group.text for group in groups)])
        yield from _tasks("env=" if "env.id" in keys else "tasks=", width, several=several)
    if POLICY_KEYS & set(keys):
        yield from _policies(width)


def _chosen(group: str, options: Mapping[str, object], words: Sequence[str]) -> str:
    typed = [word.partition("=")[2] for word in words if word.lstrip("-").startswith(f"{group}=")]
    return typed[-1] if typed and typed[-1] in options else next(iter(options))


def _prose(text: str, width: int) -> Iterator[str]:
    """Paragraphs are filled; indented lines are commands, and are continued with a backslash."""
    for paragraph in text.strip("\n").split("\n\n"):
        plain: list[str] = []
        for line in paragraph.splitlines():
            if line.startswith("  "):
                yield from _filled(plain, width)
                plain = []
                yield from _command_line(line, width)
            else:
                plain.append(line)
        yield from _filled(plain, width)
        yield ""


def _filled(lines: Sequence[str], width: int) -> list[str]:
    return textwrap.wrap(" ".join(lines), width, break_on_hyphens=False)


def _command_line(line: str, width: int) -> Iterator[str]:
    pieces = textwrap.wrap(
        line.strip(), width - 4, initial_indent="  ", subsequent_indent="      ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    yield from [f"{piece} \\" for piece in pieces[:-1]] + pieces[-1:]


def _first_keys(
    choices: Mapping[str, Mapping[str, object]], chosen: Mapping[str, str], short: Mapping[str, Key], width: int
) -> Iterator[str]:
    if short or chosen:
        yield "The keys to begin with"
    for name, key in short.items():
        yield from _row(f"{name}={key.shown}", key.text.replace(f"; same as {name}=", ""), width)
    for group, option in chosen.items():
        yield from _row(f"{group}={option}", "one of " + ", ".join(choices[group]), width)


def _section(group: KeyGroup, hidden: set[str], width: int) -> Iterator[str]:
    keys = [key for key in group.keys if key.name not in hidden]
    if not keys:
        return
    yield ""
    yield from textwrap.wrap(f"{group.name or 'general'}: {group.text}".rstrip(": "), width, subsequent_indent="  ")
    for key in keys:
        yield from _row(f"{key.name}={key.shown}", key.text, width)


def _row(key: str, text: str, width: int, column: int = KEY_WIDTH) -> Iterator[str]:
    """A key and its text beside it, below it where the key is long."""
    beside = f"  {key:{column - 2}}"
    if len(key) + 2 >= column:
        yield beside.rstrip()
        beside = ""
    indent = " " * column
    yield from textwrap.wrap(beside + text, width, initial_indent="" if beside else indent, subsequent_indent=indent,
                             drop_whitespace=True, break_on_hyphens=False) if text else [beside.rstrip()]  # fmt: skip


def _other_options(name: str, group: str, option: str, options: Mapping[str, object], width: int) -> Iterator[str]:
    others = [other for other in options if other != option]
    if others:
        yield ""
        yield from textwrap.wrap(
            f"These are the keys of {group}={option}. Those of the others: eva-rl {name} {group}={others[0]} --help",
            width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False,
        )  # fmt: skip


def _tasks(key: str, width: int, *, several: bool) -> Iterator[str]:
    from eva_rl.envs.names import CW10, METAWORLD_TASKS, MT40, MUJOCO_TASKS, MUJOCO_VERSION

    def plain(tasks: Sequence[str]) -> str:
        return ", ".join(task.removeprefix("metaworld/") for task in tasks)

    rows = {
        "Meta-World": plain(METAWORLD_TASKS),
        "MuJoCo": ", ".join(f"{name}-{MUJOCO_VERSION}" for name in MUJOCO_TASKS.values()),
        "others": "every Gymnasium id with Box observations and actions",
    }
    groups = {
        "cw10": f"Continual World: {plain(CW10)}",
        "mt40": f"the other {len(MT40)} tasks of Meta-World",
        "mt50": f"all {len(METAWORLD_TASKS)} tasks of Meta-World",
        "Meta-World's": "mt10, mt25, ml10, ml25, ml45; the ml ones also with -train or -test",
    }
    yield from ("", f"Tasks ({key})")
    for name, text in {**rows, **(groups if several else {})}.items():
        yield from _row(name, text, width, TASK_COLUMN)


def _policies(width: int) -> Iterator[str]:
    yield from ("", "Shipped policies (policy=)")
    for name, text in shipped().items():
        yield from _row(name, text, width, TASK_COLUMN)


def shipped() -> dict[str, str]:
    """Names of the shipped policies, and what each was trained on."""
    spec = find_spec("eva_rl.agents")
    folders = Path(spec.origin).parent / "pretrained" if spec and spec.origin else Path()
    return {path.parent.name: _about(path) for path in sorted(folders.glob("*/policy.json"))}


def _about(path: Path) -> str:
    metadata = json.loads(path.read_text()).get("metadata", {})
    tasks = [re.sub("^metaworld/", "", task) for task in metadata.get("pretrained_on", [])]
    listed = f"{len(tasks)} tasks of Meta-World" if len(tasks) > 3 else ", ".join(tasks)
    return f"pretrained on {listed}" if tasks else "a pretrained policy"
