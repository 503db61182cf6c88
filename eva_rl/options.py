"""What every typed option is made of: a default, its help and its range, in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields
from typing import Any, ClassVar

from eva_rl.errors import UnknownNameError, UserError

MANY = 10**9
"""The upper end of a count that has no other."""
FLOAT32, BFLOAT16 = "float32", "bfloat16"
PRECISIONS = (FLOAT32, BFLOAT16)
COMPILE_MODES = ("none", "default", "reduce-overhead")
"""Of torch.compile."""


def option(
    default: Any,
    text: str,
    *,
    above: float | None = None,
    low: float | None = None,
    high: float | None = None,
    choices: Iterable[str] = (),
) -> Any:
    """A dataclass field with its default, the line that ``--help`` shows for it, and its range.

    :class:`Options` checks the range. ``None`` is in every range; infinity and NaN are in none.

    Args:
        default: The default.
        text: The help line.
        above: Values have to be greater than this.
        low: The smallest value allowed.
        high: The largest value allowed.
        choices: The names allowed.
    """
    bounds = {"above": above, "low": low, "high": high, "choices": tuple(choices)}
    metadata = {"help": text, "bounds": bounds}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def group(kind: Callable[[], Any], text: str) -> Any:
    """A dataclass field that holds a group of options."""
    return field(default_factory=kind, metadata={"help": text})


class Options:
    """Base of the option dataclasses: checks the range of every :func:`option` when it is made.

    Raises:
        UserError: A value is out of its range, infinite or not a number.
    """

    PREFIX: ClassVar[str] = ""
    """Where the options stand on the command line, for messages: ``algo.``."""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            if "bounds" in f.metadata:
                _check(self.PREFIX + f.name, getattr(self, f.name), f.metadata["bounds"])


def _check(name: str, value: Any, bounds: Mapping[str, Any]) -> None:
    if bounds["choices"] and value is not None:
        one_of(bounds["choices"], **{name: value})
    if isinstance(value, int | float) and not isinstance(value, bool):
        _check_number(name, value, bounds["above"], bounds["low"], bounds["high"])


def _check_number(name: str, value: float, above: float | None, low: float | None, high: float | None) -> None:
    if not math.isfinite(value):
        raise UserError(f"{name}={value}: expected a finite number.")
    if above is not None and not value > above:
        raise UserError(f"{name}={value}: expected a number above {above:g}.")
    if low is not None and high is not None:
        between(low, high, **{name: value})
    elif low is not None and value < low:
        raise UserError(f"{name}={value}: expected at least {low:g}.")
    elif high is not None and value > high:
        raise UserError(f"{name}={value}: expected at most {high:g}.")


def positive(**values: float) -> None:
    """Raise unless all values are finite and above zero.

    Raises:
        UserError: Naming the first that is not.
    """
    for name, value in values.items():
        if not 0 < value < math.inf:
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
