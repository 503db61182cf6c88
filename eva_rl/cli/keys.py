"""The keys of a command: name, default, help and type of each, read from its config dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import partial
from typing import Any, get_type_hints


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        name: As it is typed, for instance ``adapter.rank``.
        default: What it begins with.
        text: The line that ``--help`` shows.
        kind: Its type.
    """

    name: str
    default: Any
    text: str
    kind: Any

    @property
    def shown(self) -> str:
        """The default as it is typed."""
        return as_typed(self.default)


@dataclass(frozen=True)
class KeyGroup:
    """Keys that belong together.

    Attributes:
        name: Dotted name; empty for the keys of the command itself.
        text: What they are about.
        keys: The keys.
    """

    name: str
    text: str
    keys: tuple[Key, ...]


def defaults_of(schema: type) -> Any:
    """A config with all defaults, unchecked: a command may ask for a key that has none."""
    instance: Any = object.__new__(schema)
    for f in fields(schema):
        setattr(instance, f.name, _default(f))
    return instance


def _default(f: Field[Any]) -> Any:
    """The default of a field, with those of its group left unchecked, too."""
    factory: Any = f.default_factory
    if factory is MISSING:
        return f.default
    if isinstance(factory, type) and is_dataclass(factory):
        return defaults_of(factory)
    if isinstance(factory, partial) and isinstance(factory.func, type) and is_dataclass(factory.func):
        made = defaults_of(factory.func)
        for key, value in factory.keywords.items():
            setattr(made, key, value)
        return made
    return factory()


def groups_of(instance: Any, chosen: Mapping[str, Any], prefix: str = "", text: str = "") -> Iterator[KeyGroup]:
    """The keys of a config, group by group; a command's own keys come before those that it shares with others.

    Args:
        instance: A config dataclass.
        chosen: For groups that are chosen by name, the options that are chosen.
        prefix: Dotted name of the group.
        text: What it is about.
    """
    kinds = get_type_hints(type(instance))
    ordered = sorted(fields(instance), key=lambda f: f.name not in inspect.get_annotations(type(instance)))
    inner = [f for f in ordered if is_dataclass(getattr(instance, f.name))]
    own = [f for f in ordered if f not in inner]
    yield KeyGroup(prefix, text, tuple(_key(prefix, f, getattr(instance, f.name), kinds[f.name]) for f in own))
    for f in inner:
        name = _join(prefix, f.name)
        value = chosen.get(name, getattr(instance, f.name))
        yield from groups_of(value, chosen, name, f.metadata.get("help", ""))


def _key(prefix: str, f: Field[Any], value: Any, kind: Any) -> Key:
    return Key(_join(prefix, f.name), value, f.metadata.get("help", ""), kind)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}".strip(".")


def as_typed(value: Any) -> str:
    """A default as help shows it; :func:`eva_rl.cli.values.as_word` is for values that are read again."""
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(str, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{entry}" for key, entry in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    return {None: "null", "": "''"}.get(value, str(value))
