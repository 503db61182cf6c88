"""Errors that a user can act on, and helpers for their messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what was given: commands print it without a traceback and exit with status 2.

    The message says what was given, what was expected and what to type next.
    """


class TerminatedError(KeyboardInterrupt):
    """SIGTERM: handled like Ctrl-C, but a command that it ends also ends the program that called it."""


class EnvironmentFailedError(UserError):
    """An environment raised, gave what no environment may give, or its process died.

    Args:
        env_id: The environment.
        where: The env step and the episode.
        cause: What happened.
    """

    def __init__(self, env_id: str, where: str, cause: str) -> None:
        super().__init__(f"The environment {env_id} failed {where}: {cause}.")
        self.args = (env_id, where, cause)  # what a copy in another process is made from
        self.cause = cause

    def saved(self) -> EnvironmentFailedError:
        """The same error of a run whose progress is saved."""
        env_id, where, cause = self.args
        more = "what was learned before is saved, and the same command with the same run_dir= continues from there"
        return type(self)(env_id, where, f"{cause}; {more}")

    def __str__(self) -> str:
        env_id, where, cause = self.args
        return f"The environment {env_id} failed {where}: {cause}."


class ActionNotFiniteError(EnvironmentFailedError):
    """An environment was given an action that is infinite or not a number: the policy's training has diverged."""


def check_dimensions(what: str, own: tuple[int, int], expects: str, expected: tuple[int, int], advice: str) -> None:
    """Raise unless observations and actions have the sizes that something expects.

    Args:
        what: Whose they are.
        own: Numbers in an observation and in an action.
        expects: What expects others, with its verb: ``the policy takes``.
        expected: Which.
        advice: What to type next.

    Raises:
        UserError: Naming both.
    """
    if own != expected:
        raise UserError(
            f"{what} has {own[0]} numbers in an observation and {own[1]} in an action; {expects} {expected[0]} and "
            f"{expected[1]}. {advice}"
        )


class UnknownNameError(UserError):
    """A name that is not among the known ones.

    Args:
        kind: What the name stands for, for instance "task".
        name: The name that was given.
        known: Every name that would have been accepted.
        hint: What to type to see the known names or to do otherwise.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        known = list(known)
        close = close_matches(name, known)
        if close:
            expected = "Did you mean " + " or ".join(repr(match) for match in close) + "?"
        else:
            listed = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
            expected = f"Known: {listed}." if known else "There are none."
        super().__init__(f"Unknown {kind} {name!r}. {expected} {hint}".strip())


def close_matches(name: str, known: Iterable[str]) -> list[str]:
    """The three names at most that a misspelt one may stand for, the closest first; capitals do not count."""
    plain = {one.lower(): one for one in reversed(list(known))}
    return [plain[one] for one in difflib.get_close_matches(name.lower(), reversed(plain), n=3, cutoff=0.5)]


def shown_number(value: float) -> str:
    """A number for a table: with one decimal, or with three significant digits where it is below 1."""
    return f"{value:.1f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"


def counted(number: int, noun: str) -> str:
    """``1 task``, ``2 tasks``, ``2 batches``."""
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('ch') else 's'}"
