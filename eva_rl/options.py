"""What every typed option is made of: a default, its help, and range checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

from eva_rl.errors import UnknownNameError, UserError


def option(default: Any, text: str) -> Any:
    """A dataclass field with a default and the line that ``--help`` shows for it."""
    return field(default=default, metadata={"help": text})


def group(kind: Callable[[], Any], text: str) -> Any:
    """A dataclass field that holds a group of options."""
    return field(default_factory=kind, metadata={"help": text})


def positive(**values: float) -> None:
    """Raise unless all values are above zero.

    Raises:
        UserError: Naming the first that is not.
    """
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{name.replace('__', '.')}={value}: expected a number above 0.")


def between(low: float, high: float, **values: float) -> None:
    """Raise unless all values lie within the bounds, which are included.

    Raises:
        UserError: Naming the first that does not.
    """
    for name, value in values.items():
        if not low <= value <= high:
            raise UserError(f"{name.replace('__', '.')}={value}: expected {low:g} to {high:g}.")


def one_of(known: tuple[str, ...], **values: str) -> None:
    """Raise unless all values are among the known ones.

    Raises:
        UnknownNameError: Naming the first that is not.
    """
    for name, value in values.items():
        if value not in known:
            raise UnknownNameError(name.replace("__", "."), value, known)
