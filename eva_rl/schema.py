"""What a JSON file may hold: one table per file, checked before anything is made of it.

A table is built from the classes below, and :meth:`Check.of` holds a value against it::

    RECORD = Record({"step": Integer(0), "sha256": Text(DIGEST)}, optional={"note": Text()})
    record = RECORD.of(json.loads(text), "run/state.json")

Every refusal names the file, the key, what was given and what was expected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from eva_rl.errors import UserError

LARGEST = 1e30
"""Largest magnitude of a number that takes part in computations: its square root and inverse stay in float32."""
DEEPEST = 50
"""Deepest nesting of a value that no table describes."""
DIGEST = r"[0-9a-f]{64}"
"""SHA-256 in hexadecimal."""


class SchemaError(UserError):
    """A JSON value that its table does not admit.

    Args:
        where: The file.
        key: Path of the value in it, "" for the whole.
        given: The value.
        expected: In words.
    """

    def __init__(self, where: str, key: str, given: Any, expected: str) -> None:
        self.key, self.expected = key, expected
        subject = f"{where}: {key}" if key else where
        super().__init__(f"{subject} is {_shown(given)}; expected {expected}.")


class Check(Protocol):
    """Admits some JSON values."""

    @property
    def expected(self) -> str:
        """What it admits, in words."""

    def of(self, value: Any, where: str, key: str = "") -> Any:
        """Return the value if it is admitted.

        Args:
            value: As ``json.loads`` gives it.
            where: The file, for the message.
            key: Path of the value in it, for the message.

        Raises:
            SchemaError: It is not.
        """


@dataclass(frozen=True)
class Number:
    """A finite number in [low, high]; above ``low`` where ``above``."""

    low: float = -LARGEST
    high: float = LARGEST
    above: bool = False
    expected: str = field(init=False, default="")

    def __post_init__(self) -> None:
        object.__setattr__(self, "expected", _bounds("a number", self.low, self.high, self.above))

    def of(self, value: Any, where: str, key: str = "") -> float:
        """See :meth:`Check.of`."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self._admits(value):
            raise SchemaError(where, key, value, self.expected)
        return value

    def _admits(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high  # false for NaN


@dataclass(frozen=True)
class Integer:
    """A whole number in [low, high]."""

    low: int = -(2**53)
    high: int = 2**53
    expected: str = field(init=False, default="")

    def __post_init__(self) -> None:
        object.__setattr__(self, "expected", _bounds("a whole number", self.low, self.high))

    def of(self, value: Any, where: str, key: str = "") -> int:
        """See :meth:`Check.of`."""
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise SchemaError(where, key, value, self.expected)
        return value


@dataclass(frozen=True)
class Text:
    """A string; one that ``pattern`` matches as a whole, described by ``meaning``, where there is one."""

    pattern: str = ""
    meaning: str = "a string"
    longest: int = 10_000

    @property
    def expected(self) -> str:
        """What is admitted."""
        return self.meaning if self.meaning != "a string" or not self.pattern else f"a string like {self.pattern}"

    def of(self, value: Any, where: str, key: str = "") -> str:
        """See :meth:`Check.of`."""
        if not isinstance(value, str) or len(value) > self.longest or not _encodes(value):
            raise SchemaError(where, key, value, self.expected)
        if self.pattern and not re.fullmatch(self.pattern, value):
            raise SchemaError(where, key, value, self.expected)
        return value


@dataclass(frozen=True)
class OneOf:
    """One of some constants: strings, numbers, booleans or null, compared with their type."""

    values: tuple[str | int | float | bool | None, ...]

    @property
    def expected(self) -> str:
        """What is admitted."""
        return " or ".join(_shown(value) for value in self.values)

    def of(self, value: Any, where: str, key: str = "") -> Any:
        """See :meth:`Check.of`."""
        if not any(type(value) is type(known) and value == known for known in self.values):
            raise SchemaError(where, key, value, self.expected)
        return value


@dataclass(frozen=True)
class Boolean:
    """True or false."""

    expected: str = "true or false"

    def of(self, value: Any, where: str, key: str = "") -> bool:
        """See :meth:`Check.of`."""
        if not isinstance(value, bool):
            raise SchemaError(where, key, value, self.expected)
        return value


@dataclass(frozen=True)
class NotMeasured:
    """Null or NaN, in place of a number that was not measured."""

    expected: str = "null or NaN where it was not measured"

    def of(self, value: Any, where: str, key: str = "") -> float | None:
        """See :meth:`Check.of`."""
        if value is not None and not (isinstance(value, float) and math.isnan(value)):
            raise SchemaError(where, key, value, self.expected)
        return value


@dataclass(frozen=True)
class Optional:
    """Null, or what ``inner`` admits."""

    inner: Check

    @property
    def expected(self) -> str:
        """What is admitted."""
        return f"{self.inner.expected}, or null"

    def of(self, value: Any, where: str, key: str = "") -> Any:
        """See :meth:`Check.of`."""
        if value is None:
            return None
        try:
            return self.inner.of(value, where, key)
        except SchemaError as error:
            raise error if error.key != key else SchemaError(where, key, value, self.expected) from None


@dataclass(frozen=True)
class Either:
    """What one of several checks admits; the last one's refusal is reported."""

    checks: tuple[Check, ...]

    @property
    def expected(self) -> str:
        """What is admitted."""
        return ", or ".join(check.expected for check in self.checks)

    def of(self, value: Any, where: str, key: str = "") -> Any:
        """See :meth:`Check.of`."""
        for check in self.checks:
            try:
                return check.of(value, where, key)
            except SchemaError as error:
                inner = error
        raise inner if inner.key != key else SchemaError(where, key, value, self.expected)


@dataclass(frozen=True)
class ListOf:
    """A list of ``least`` to ``most`` items."""

    item: Check
    least: int = 0
    most: int = 10**7

    @property
    def expected(self) -> str:
        """What is admitted."""
        return f"a list, each item {self.item.expected}"

    def of(self, value: Any, where: str, key: str = "") -> list[Any]:
        """See :meth:`Check.of`."""
        if not isinstance(value, list):
            raise SchemaError(where, key, value, self.expected)
        if not self.least <= len(value) <= self.most:
            raise SchemaError(where, key, value, _bounds("a list of", self.least, self.most) + " items")
        return [self.item.of(item, where, f"{key}[{index}]") for index, item in enumerate(value)]


@dataclass(frozen=True)
class MapOf:
    """An object with any keys that ``name`` admits, all of whose values ``value`` admits."""

    value: Check
    name: Text = field(default_factory=Text)

    @property
    def expected(self) -> str:
        """What is admitted."""
        return f"an object, each value {self.value.expected}"

    def of(self, value: Any, where: str, key: str = "") -> dict[str, Any]:
        """See :meth:`Check.of`."""
        if not isinstance(value, Mapping):
            raise SchemaError(where, key, value, self.expected)
        for name in value:
            self.name.of(name, where, f"a key of {key}" if key else "a key")
        return {name: self.value.of(item, where, _join(key, name)) for name, item in value.items()}


@dataclass(frozen=True)
class Record:
    """An object with certain keys.

    Attributes:
        required: Checks of the keys that have to be there.
        optional: Checks of those that may be.
        others: Whether further keys are let through, unchecked but for their depth; false refuses them.
    """

    required: Mapping[str, Check]
    optional: Mapping[str, Check] = field(default_factory=dict)
    others: bool = False
    expected: str = field(init=False, default="an object")

    def of(self, value: Any, where: str, key: str = "") -> dict[str, Any]:
        """See :meth:`Check.of`."""
        if not isinstance(value, Mapping):
            raise SchemaError(where, key, value, f"an object with {', '.join(self.required) or 'keys'}")
        if missing := [name for name in self.required if name not in value]:
            raise UserError(f"{_subject(where, key)} lacks {', '.join(missing[:5])}: it is another file, or damaged.")
        known = {**self.required, **self.optional}
        if not self.others and (unknown := [str(name) for name in value if name not in known]):
            raise UserError(
                f"{_subject(where, key)} holds {', '.join(map(_shown, unknown[:3]))}; expected only "
                f"{', '.join(known)}. It is damaged, or of a newer version."
            )
        rest = Anything()
        return {name: known.get(name, rest).of(item, where, _join(key, name)) for name, item in value.items()}


@dataclass(frozen=True)
class Anything:
    """Any value that can be written as text and is not nested too deeply."""

    expected: str = f"a value nested at most {DEEPEST} deep"

    def of(self, value: Any, where: str, key: str = "") -> Any:
        """See :meth:`Check.of`."""
        level = [value]
        for _ in range(DEEPEST):
            if any(isinstance(item, str) and not _encodes(item) for item in level):
                raise SchemaError(where, key, value, "Unicode text")
            level = [inner for item in level for inner in _inside(item)]
            if not level:
                return value
        raise SchemaError(where, key, value, self.expected)


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value
        yield from value.values()
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield from value


def _encodes(text: str) -> bool:
    """Whether a string is text: JSON admits halves of surrogate pairs, which nothing can print."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bounds(kind: str, low: float, high: float, above: bool = False) -> str:
    lowest = "" if math.isinf(low) or low in {-LARGEST, -(2**53)} else f"above {low:g}" if above else f"{low:g}"
    highest = "" if math.isinf(high) or high in {LARGEST, 2**53, 10**7} else f"{high:g}"
    if lowest and highest:
        return f"{kind} {lowest} {'and at most' if above else 'to'} {highest}"
    if lowest:
        return f"{kind} {lowest}" if above else f"{kind} of at least {lowest}"
    return f"{kind} of at most {highest}" if highest else f"a finite{kind.removeprefix('a')}"


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else str(name)


def _subject(where: str, key: str) -> str:
    return f"{where}: {key}" if key else where


def _shown(value: Any) -> str:
    """A value as JSON would have it, short and on one line."""
    if isinstance(value, Mapping):
        return "an object" if value else "{}"
    if isinstance(value, list):
        return f"a list of {len(value)} items"
    if isinstance(value, str):
        text = ascii(value) if not value.isprintable() else repr(value)
        return text if len(text) <= 60 else text[:57] + "...'"
    if isinstance(value, int) and abs(value) > 10**20:
        return "a number of too many digits"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
