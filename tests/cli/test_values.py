"""Typed text and its type: what each kind takes, and what is said of everything else."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from eva_rl.cli.values import as_word, is_number, literal, quoted, split_list, unquoted, value_of
from eva_rl.errors import UserError


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "7", 7),
        (int, "-3", -3),
        (int, "1e6", 1_000_000),
        (int, "2.0", 2),
        (int, "1_000", 1000),
        (int, str(2**62 + 1), 2**62 + 1),
        (int | None, "null", None),
        (float, "1e-4", 1e-4),
        (float, "7", 7.0),
        (float, "-inf", -math.inf),
        (bool, "TRUE", True),
        (bool, "off", False),
        (bool, "0", False),
        (str, "null", "null"),
        (str | None, "null", None),
        (str, "'a b'", "a b"),
        (str, "'a' and 'b'", "'a' and 'b'"),
        (str, "", ""),
        (float | str, "auto", "auto"),
        (float | str, "3", 3.0),
        (list[int], "[1, 2,3]", [1, 2, 3]),
        (list[int], "4", [4]),
        (list[str], "[]", []),
        (list[str], "[a,'b,c',\"d]\"]", ["a", "b,c", "d]"]),
        (dict[str, int], "{a:1,'b c':2}", {"a": 1, "b c": 2}),
        (dict[str, int], "{}", {}),
        (dict[str, Any], "{a:1,b:x,c:[1,y]}", {"a": 1, "b": "x", "c": [1, "y"]}),
        (dict[str, float], "{q_proj:.5}", {"q_proj": 0.5}),
        (dict[str, Any], "{range:[0.7,2.5],m:[[.1,2e-3],[3,-4]]}", {"range": [0.7, 2.5], "m": [[0.1, 2e-3], [3, -4]]}),
        (
            dict[str, Any],
            "{a:true,b:null,c:'9',d:{e:[1]},f:1.2.3}",
            {"a": True, "b": None, "c": "9", "d": {"e": [1]}, "f": "1.2.3"},
        ),
        (int, "${seed}", "${seed}"),
    ],
)
def test_values(kind: Any, text: str, value: Any) -> None:
    found = value_of("key", kind, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (int, "1.5", "expected a whole number."),
        (int, "inf", "expected a whole number."),
        (int, "nan", "expected a whole number."),
        (int, "null", "expected a whole number."),
        (int, "", "expected a whole number."),
        (int | None, "none", "expected a whole number or null."),
        (float, "1,5", "expected a number."),
        (float, "'1'", "expected a number."),
        (bool, "2", "expected true or false."),
        (bool, "", "expected true or false."),
        (dict[str, int], "a:1", "expected a table such as {name:value}."),
        (dict[str, int], "{a}", "expected a table such as {name:value}."),
    ],
)
def test_no_values(kind: Any, text: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        value_of("algo.key", kind, text)
    assert str(caught.value) == f"algo.key={text}: {expected}"


def test_a_wrong_entry_is_named_by_its_own_key() -> None:
    with pytest.raises(UserError, match=r"^caps\.q_proj=x: expected a whole number\.$"):
        value_of("caps", dict[str, int], "{k_proj:1,q_proj:x}")
    with pytest.raises(UserError, match="x: expected a whole number"):
        value_of("seeds", list[int], "[1,x]")


def test_which_types_are_numbers() -> None:
    assert is_number(float)
    assert is_number(float | str)
    assert is_number(float | None)
    assert not is_number(int)
    assert not is_number(list[float])


@given(st.text())
def test_quotes_are_undone(text: str) -> None:
    assert unquoted(quoted(text)) == text


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("a,b", ["a", "b"]),
        ("[a=1,b=[2,3],c={d:4,e:5}]", ["a=1", "b=[2,3]", "c={d:4,e:5}"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("a=[[1,2],[3,4]],b={a:[5,6]}", ["a=[[1,2],[3,4]]", "b={a:[5,6]}"]),
        ('"a\\",b",c', ['"a\\",b"', "c"]),
        (" a , b ", ["a", "b"]),
        ("", []),
    ],
)
def test_commas_in_brackets_or_quotes_do_not_separate(text: str, entries: list[str]) -> None:
    assert split_list(text) == entries


@given(st.text(st.sampled_from(list("ab\\${}:.,"))))
def test_text_stays_text_in_omegaconf(text: str) -> None:
    config = OmegaConf.create({"a": literal(text), "b": literal([{"c": text}])})
    assert config.a == text
    assert config.b[0].c == text


def read_back(kind: Any, value: Any) -> Any:
    """What a command makes of a Python value."""
    made = OmegaConf.create({"key": None})
    OmegaConf.update(made, "key", value_of("key", kind, as_word(value)))
    found = OmegaConf.to_container(made, resolve=True)
    assert isinstance(found, dict)
    return found["key"]


ODD = st.text(alphabet="ab ,:'\"[]{}$\\é1")


@given(st.one_of(ODD, st.text()))
def test_text_given_in_python_comes_back(text: str) -> None:
    """None of it is taken for quotes or for another key: ``'q'`` became ``q``, and ``runs/${x}`` an error."""
    assert read_back(str, text) == text
    assert read_back(str | None, text) == text


@given(st.lists(ODD), st.dictionaries(ODD, ODD))
def test_lists_and_tables_of_text_given_in_python_come_back(entries: list[str], table: dict[str, str]) -> None:
    assert read_back(list[str], entries) == entries
    assert read_back(dict[str, str], table) == table


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, 1),
        (bool, True),
        (bool, False),
        (float, 1e-4),
        (int | None, None),
        (list[int], [0, 1]),
        (dict[str, int], {"a": 1}),
        (dict[str, Any], {"a": [0.7, 2.5, 1e-5], "b": [True, None], "c": {"d": [[1, 2.0], []]}, "e": "9", "f": "true"}),
    ],
)
def test_other_values_given_in_python_come_back(kind: Any, value: Any) -> None:
    assert read_back(kind, value) == value
