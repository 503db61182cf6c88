from __future__ import annotations

import pytest

from eva_rl.errors import counted, shown_number


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(0, "task", "0 tasks"), (1, "task", "1 task"), (2, "batch", "2 batches"), (5000, "env step", "5000 env steps")],
)
def test_one_is_singular(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1234.56, "1234.6"), (-8.2, "-8.2"), (-0.0083, "-0.0083"), (0.5449, "0.545"), (0.0, "0.0")]
)
def test_small_numbers_keep_their_digits(value: float, text: str) -> None:
    """They were shown as 0.0."""
    assert shown_number(value) == text
