"""From the text of a value to its type: numbers, switches, lists and tables; text is never taken apart."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from eva_rl.errors import UserError

SWITCHES = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list such as [a,b]",
    dict: "a table such as {name:value}",
}
INTERPOLATION = "${"
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
PAIR = re.compile(rf"(?P<name>{QUOTED.pattern}|[^:]*)\s*:(?P<value>.*)", re.DOTALL)
WHOLE = re.compile(r"[+-]?\d+")
FRACTION = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")
TOKEN = re.compile(rf"{QUOTED.pattern}|.", re.DOTALL)
CONSTANTS = {"true": True, "false": False, "null": None}


def value_of(key: str, kind: Any, text: str) -> Any:
    """The value that was typed for a key.

    Args:
        key: For the message.
        kind: Its type: str, int, float, bool, ``float | str``, ``list[...]``, ``dict[str, ...]``, each perhaps
            ``| None``, or Any.
        text: As typed; ``${other.key}`` is left for OmegaConf to resolve.

    Raises:
        UserError: The text is no value of that type.
    """
    kinds = [one for one in _alternatives(kind) if one is not NoneType]
    optional = NoneType in _alternatives(kind)
    if optional and text == "null":
        return None
    try:
        return _converted(key, kinds[0], text)
    except ValueError as error:
        if str in kinds[1:]:
            return unquoted(text)
        expected = EXPECTED[get_origin(kinds[0]) or kinds[0]] + (" or null" if optional else "")
        raise UserError(f"{key}={text}: expected {expected}.") from error


def is_number(kind: Any) -> bool:
    """Whether a type is float, perhaps among others: YAML takes ``1e-5`` for text."""
    return float in _alternatives(kind)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _converted(key: str, kind: Any, text: str) -> Any:
    origin = get_origin(kind) or kind
    if origin in (int, float, bool) and INTERPOLATION in text:
        return text
    if origin is list:
        return [value_of(key, get_args(kind)[0], entry) for entry in split_list(text)]
    if origin is dict:
        return {name: value_of(f"{key}.{name}", get_args(kind)[1], entry) for name, entry in _pairs(text)}
    readers: dict[Any, Callable[[str], Any]] = {int: _whole, float: float, bool: _switch, Any: _any}
    return readers.get(origin, unquoted)(text)


def _any(text: str) -> Any:
    """A list, a table, a number, true, false, null, or text; what is quoted is text."""
    if text.startswith("[") and text.endswith("]"):
        return [_any(entry) for entry in split_list(text)]
    if text.startswith("{") and text.endswith("}"):
        return {name: _any(entry) for name, entry in _pairs(text)}
    if text in CONSTANTS:
        return CONSTANTS[text]
    if WHOLE.fullmatch(text):
        return int(text)
    return float(text) if FRACTION.fullmatch(text) else unquoted(text)


def _whole(text: str) -> int:
    if re.fullmatch(r"[+-]?[\d_]+", text):
        return int(text)
    number = float(text)  # 1e6
    if not math.isfinite(number) or number != int(number):
        raise ValueError(text)
    return int(number)


def _switch(text: str) -> bool:
    if text.lower() not in SWITCHES:
        raise ValueError(text)
    return SWITCHES[text.lower()]


def unquoted(text: str) -> str:
    """Text without the quotes around the whole of it."""
    if QUOTED.fullmatch(text):
        return re.sub(r"\\([\\'\"])", r"\1", text[1:-1])
    return text


def quoted(text: str) -> str:
    """Text that :func:`unquoted` and Hydra's grammar read as it is."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def as_word(value: Any) -> str:
    """A Python value as the text that :func:`value_of` makes the same value of: text is quoted where it has to be."""
    if isinstance(value, str | Path):
        text = str(value)
        mistaken = text in ("", "null") or INTERPOLATION in text or QUOTED.fullmatch(text)
        return quoted(literal(text)) if mistaken else text
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{quoted(str(name))}:{_as_entry(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_as_entry(entry) for entry in value) + "]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _as_entry(value: Any) -> str:
    """As :func:`as_word`, of a list's or a table's entry: text is quoted where it might be taken for something else."""
    if isinstance(value, str | Path) and (
        re.search(r"""[\s,:'"\[\]{}\\]""", str(value)) or _any(str(value)) != str(value)
    ):
        return quoted(literal(str(value)))
    return as_word(value)


def split_list(text: str) -> list[str]:
    """Entries of ``[a=1,b=[2,3]]`` or ``a,b``: commas inside of brackets or quotes do not separate."""
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    entries, depth = [""], 0
    for token in (found[0] for found in TOKEN.finditer(inner)):
        depth = max(0, depth + (token in "[{") - (token in "]}"))
        if token == "," and depth == 0:
            entries.append("")
        else:
            entries[-1] += token
    return [entry.strip() for entry in entries if entry]


def _pairs(text: str) -> list[tuple[str, str]]:
    if not (text.startswith("{") and text.endswith("}")):
        raise ValueError(text)
    found = [PAIR.fullmatch(entry) for entry in split_list(f"[{text[1:-1]}]")]
    if not all(found):
        raise ValueError(text)
    return [(unquoted(pair["name"].strip()), pair["value"].strip()) for pair in found if pair]


def literal(value: Any) -> Any:
    """A value that OmegaConf takes as it is: what looks like an interpolation in it stays text."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    if isinstance(value, list):
        return [literal(entry) for entry in value]
    return {key: literal(entry) for key, entry in value.items()} if isinstance(value, dict) else value
