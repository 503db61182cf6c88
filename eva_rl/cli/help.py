"""What ``--help`` shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Choices = Mapping[str, Mapping[str, object]]
"""For each group that is chosen by name, its options."""
KEY_WIDTH = 34


def print_help(
    name: str,
    schema: type,
    help_text: str,
    *,
    short_keys: Mapping[str, str],
    choices: Choices,
    overrides: Sequence[str] = (),
) -> None:
    """Show what a command does, its options by group with their defaults, and the tasks.

    Args:
        name: The command.
        schema: Dataclass of its config.
        help_text: What it does, with examples.
        short_keys: What a user may type for longer keys.
        choices: Options of the groups that are chosen by name.
        overrides: What was typed; a choice made there is the one that is shown.
    """
    out = Console(highlight=False)
    out.print(f"[bold]python -m eva_rl.{name}[/] [KEY=VALUE ...]\n\n{escape(help_text.strip())}", soft_wrap=True)
    instance = defaults_of(schema)
    chosen = {group: _chosen(group, options, overrides) for group, options in choices.items()}
    groups = list(groups_of(instance, {group: choices[group][name] for group, name in chosen.items()}))
    texts = {key: text for _, _, rows in groups for key, _, text in rows}
    defaults = {key: default for _, _, rows in groups for key, default, _ in rows}
    short = [(s, defaults[k], texts[k].replace(f"; same as {s}=", "")) for s, k in short_keys.items() if k in texts]
    short += [(g, c, "one of " + ", ".join(choices[g])) for g, c in chosen.items()]
    _section(out, "The keys to begin with", "", short)
    for title, text, rows in groups:
        hidden = {key for s, key in short_keys.items() if key in texts} | {f"{g}.name" for g in chosen}
        _section(out, title, text, [row for row in rows if row[0] not in hidden])
        if title in chosen and len(choices[title]) > 1:
            out.print(f"  These are the options of {title}={chosen[title]}; for those of another choice:")
            out.print(f"  python -m eva_rl.{name} {title}={list(choices[title])[-1]} --help", soft_wrap=True)
    _tasks(out)


def _chosen(group: str, options: Mapping[str, object], overrides: Sequence[str]) -> str:
    typed = [override.partition("=")[2] for override in overrides if override.startswith(f"{group}=")]
    return typed[-1] if typed and typed[-1] in options else next(iter(options))


def defaults_of(schema: type) -> Any:
    """A config with all defaults, unchecked: a command may ask for a key that has none."""
    instance: Any = object.__new__(schema)
    for f in fields(schema):
        made = f.default_factory() if f.default_factory is not MISSING else f.default
        setattr(instance, f.name, made)
    return instance


def groups_of(
    instance: Any, chosen: Mapping[str, Any], prefix: str = "", text: str = ""
) -> Iterator[tuple[str, str, list[tuple[str, Any, str]]]]:
    """Groups of options: dotted name, what it is about, and key, default and help of each option in it.

    Args:
        instance: A config dataclass.
        chosen: For groups that are chosen by name, what is chosen.
        prefix: Dotted name of the group.
        text: What it is about.
    """
    own: list[tuple[Field[Any], Any]] = []
    inner: list[tuple[Field[Any], Any]] = []
    for f in fields(instance):
        value = getattr(instance, f.name)
        (inner if is_dataclass(value) else own).append((f, value))
    rows = [(f"{prefix}.{f.name}".strip("."), _shown(value), f.metadata.get("help", "")) for f, value in own]
    yield prefix, text, rows
    for f, value in inner:
        key = f"{prefix}.{f.name}".strip(".")
        yield from groups_of(chosen.get(key, value), chosen, key, f.metadata.get("help", ""))


def _shown(value: Any) -> str:
    """A default as it is typed."""
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(str, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return {None: "null", "": "''"}.get(value, str(value)) if not isinstance(value, dict) else "{}"


def _section(out: Console, title: str, text: str, rows: Sequence[tuple[str, Any, str]]) -> None:
    if not rows:
        return
    out.print(f"\n[bold]{title or 'general'}[/]" + (f"  {escape(text)}" if text else ""))
    for key, default, line in rows:
        shown = f"  {key}=[cyan]{escape(str(default))}[/]"
        table = Table.grid(padding=(0, 2))
        table.add_column(width=KEY_WIDTH)
        table.add_column()
        if len(f"  {key}={default}") > KEY_WIDTH:
            out.print(shown, soft_wrap=True)
            shown = ""
        table.add_row(shown, escape(line))
        out.print(table)


def _tasks(out: Console) -> None:
    from eva_rl.envs import task_list

    out.print("\n[bold]Tasks[/] (env=)")
    out.print(f"  {', '.join(task_list())}\n  and every Gymnasium id, for instance Hopper-v5\n")
