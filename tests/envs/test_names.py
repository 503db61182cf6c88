"""Names of tasks with options: what is written is read again, and what makes no sense is answered."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eva_rl.envs.names import goal_index, goal_of, split_options, task_list, value_of_text, with_options
from eva_rl.errors import UserError

PLAIN = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    PLAIN | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5
)
KEYS = st.text(min_size=1).filter(lambda key: key != "goal")


@given(st.dictionaries(KEYS, VALUES, min_size=1))
def test_any_options_survive_their_name(options: dict[str, Any]) -> None:
    name = with_options("module:Own-v0", options)
    assert split_options(name) == ("module:Own-v0", options)
    assert "+" not in name
    assert name == with_options("module:Own-v0", dict(reversed(options.items())))


def test_each_of_joined_tasks_gets_the_options() -> None:
    assert with_options("a-v1+b-v1?x=1", {"y": [1, 2]}) == "a-v1?y=%5B1%2C%202%5D+b-v1?x=1&y=%5B1%2C%202%5D"
    assert with_options("a+b", {}, None) == "a+b"
    assert with_options("push-v3", goal=7) == "push-v3?goal=7"
    assert with_options("push-v3", {"reward": "sparse"}, "index:7@42") == "push-v3?goal=index:7@42&reward=sparse"


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("7.0", 7.0), ("true", True), ("null", None), ("[1]", [1]), ("True", "True"), ("7x", "7x"), ("", "")],
)
def test_values_are_json_or_text(text: str, value: Any) -> None:
    assert value_of_text(text) == value
    assert type(value_of_text(text)) is type(value)


@pytest.mark.parametrize("text", ["7", "true", "null", "[1]", '"quoted"', "1e3"])
def test_text_that_looks_like_json_stays_text(text: str) -> None:
    assert split_options(with_options("Own-v0", {"key": text}))[1] == {"key": text}


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", {"deep": [object()]}])
def test_values_that_are_no_json_are_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"env\.kwargs\.robot is of type .*: expected numbers, texts"):
        with_options("Own-v0", {"robot": value})


def test_an_option_without_a_value_is_refused() -> None:
    with pytest.raises(UserError, match="found 'goal' without a value"):
        split_options("push-v3?reward=sparse&goal")
    assert split_options("push-v3?goal=") == ("push-v3", {"goal": ""})
    assert split_options("push-v3?&a=b=c&") == ("push-v3", {"a": "b=c"})


@pytest.mark.parametrize(
    ("given_", "goal"),
    [(0, 0), (10**12, 10**12), ("index:0", "index:0"), ("index:49@0", "index:49"), ("index:007@042", "index:7@42")],
)
def test_goals(given_: Any, goal: int | str) -> None:
    assert goal_of(given_) == goal


@pytest.mark.parametrize(
    "bad",
    [-1, 1.0, True, None, "7", "index:50", "index:-1", "index:1@", "index:1@-2", "index:", "seed:3", [1], "INDEX:1"],
)
def test_no_goals(bad: Any) -> None:
    with pytest.raises(UserError, match="expected the seed of a goal") as caught:
        goal_of(bad)
    assert f"env.goal={bad}:" in str(caught.value)


def test_indices_of_goals() -> None:
    assert goal_index("index:7") == (7, 0)
    assert goal_index("index:7@42") == (7, 42)
    assert goal_index(7) is goal_index("7") is goal_index("index:9999999999") is None


def test_every_task_is_listed_once() -> None:
    assert len(task_list()) == len(set(task_list())) == 61
