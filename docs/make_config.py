"""Writes docs/config.md, every key of every command: ``python docs/make_config.py``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from eva_rl.__main__ import command_module
from eva_rl.cli import parsing
from eva_rl.cli.keys import Key, defaults_of, groups_of

Keys = Sequence[Key]
HERE = Path(__file__).parent
OUT = HERE / "config.md"
HEAD = """# Every key

Generated from the option dataclasses by `python docs/make_config.py`. Keys are typed as `key=value`
after the command; `python -m eva_rl.finetune --help` shows the same. `null` is no value, `[a,b]` a list; a run keeps
its resolved settings in `config.yaml`.
"""


def commands() -> list[str]:
    """The commands, the main one first."""
    names = sorted(path.stem for path in (HERE.parent / "configs").glob("*.yaml"))
    return sorted(names, key=lambda name: name != "finetune")


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(line for name in commands() for line in _command(name))]).rstrip() + "\n"


def _command(name: str) -> Iterator[str]:
    module = command_module(name)
    about = module.HELP.strip().split("\n\n")[0].replace("\n", " ")
    yield f"## {name}\n\n`python -m eva_rl.{name}`: {about}\n"
    choices = parsing.COMMANDS[name].choices
    short = {key: short for short, key in parsing.SHORT_KEYS.items()}
    for part in groups_of(defaults_of(parsing.COMMANDS[name].schema), {}):
        if part.name not in choices:
            yield from _table(
                f"{name}: {part.name}" if part.name else "", part.text and f"{part.text}.", part.keys, short
            )
    for group, options in choices.items():
        seen: dict[frozenset[str], tuple[str, Keys]] = {}
        for option_name, option in options.items():
            yield from _choice(name, group, option_name, option, seen)


def _choice(
    command_name: str, group: str, name: str, option: Any, seen: dict[frozenset[str], tuple[str, Keys]]
) -> Iterator[str]:
    """Tables of a choice; of one that has the keys of an earlier one, only what differs."""
    about = (type(option).__doc__ or "").strip().splitlines()[0]
    for index, part in enumerate(groups_of(option, {}, group)):
        label = f"{group}={name}" + ("" if index == 0 else f", {part.name}")
        kept = [key for key in part.keys if not (key.name.startswith(f"{group}.") and key.name.endswith(".name"))]
        before, known = seen.setdefault(frozenset(key.name for key in kept), (label, kept))
        differing = kept if before == label else [key for key in kept if key not in known]
        again = "" if before == label else f" As `{before}`" + (", but for:" if differing else ".")
        yield from _table(
            f"{command_name}: {label}", (about if index == 0 else part.text).rstrip(".") + "." + again, differing
        )


def _table(heading: str, about: str, keys: Keys, short: Mapping[str, str] = MappingProxyType({})) -> Iterator[str]:
    if not keys and not about:
        return
    if heading:
        yield f"### {heading}\n"
    if about:
        yield f"{about[0].upper()}{about[1:]}\n"
    if not keys:
        return
    yield "| key | default | meaning |\n|---|---|---|"
    for key in keys:
        names = f"`{short[key.name]}`, `{key.name}`" if key.name in short else f"`{key.name}`"
        yield f"| {names} | `{key.shown}` | {_cell(key.text)} |"
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


if __name__ == "__main__":
    OUT.write_text(page())
    sys.stdout.write(f"{OUT}\n")
