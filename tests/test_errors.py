from __future__ import annotations

import pytest

from eva_rl.errors import counted


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(0, "task", "0 tasks"), (1, "task", "1 task"), (2, "batch", "2 batches"), (5000, "env step", "5000 env steps")],
)
def test_one_is_singular(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text
