"""JSON values are what their table describes, or refused by file, key, what was given and what was expected."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eva_rl.errors import UserError
from eva_rl.files import check_files, check_seal, copy_files, read_json, sealed
from eva_rl.schema import (
    Anything,
    Boolean,
    Check,
    Either,
    Integer,
    ListOf,
    MapOf,
    Number,
    OneOf,
    Optional,
    Record,
    Text,
)

TABLE = Record(
    {"name": Text(r"\w+"), "count": Integer(1, 10)},
    {
        "std": ListOf(Number(0, 5, above=True), least=1),
        "targets": MapOf(Number()),
        "kind": OneOf(("a", "b", None)),
        "inner": Optional(Record({"on": Boolean()})),
        "ranks": MapOf(Either((Integer(1), ListOf(Boolean())))),
    },
)
GOOD = {
    "name": "push",
    "count": 3,
    "std": [1.0, 2],
    "targets": {"x": -1.5},
    "kind": None,
    "inner": {"on": True},
    "ranks": {"a": 2, "b": [True, False]},
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def test_what_fits_comes_back() -> None:
    assert TABLE.of(GOOD, "f.json") == GOOD


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 11}, "f.json: count is 11; expected a whole number 1 to 10."),
        ({"count": True}, "f.json: count is true; expected a whole number 1 to 10."),
        ({"count": 2.0}, "f.json: count is 2.0; expected a whole number 1 to 10."),
        ({"name": "a b"}, r"f.json: name is 'a b'; expected a string like \w+."),
        ({"std": [1.0, 0]}, "f.json: std[1] is 0; expected a number above 0 and at most 5."),
        ({"std": [math.nan]}, "f.json: std[0] is nan; expected a number above 0 and at most 5."),
        ({"targets": {"x": math.inf}}, "f.json: targets.x is inf; expected a finite number."),
        ({"targets": [1]}, "f.json: targets is a list of 1 items; expected an object, each value a finite number."),
        ({"kind": "c"}, "f.json: kind is 'c'; expected 'a' or 'b' or null."),
        ({"inner": {"on": 1}}, "f.json: inner.on is 1; expected true or false."),
        ({"inner": 1}, "f.json: inner is 1; expected an object, or null."),
        ({"extra": 1}, "f.json holds 'extra'; expected only name, count, std, targets, kind, inner, ranks. It is"),
        ({"count": 10**5000}, "f.json: count is a number of too many digits; expected a whole number 1 to 10."),
        ({"name": "\ud800"}, "f.json: name is '\\ud800'; expected a string like"),
    ],
)
def test_refusals_name_file_key_given_and_expected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        TABLE.of(GOOD | change, "f.json")
    assert str(refused.value).startswith(message)


def test_missing_keys_are_named() -> None:
    with pytest.raises(UserError, match=r"f\.json lacks name, count: it is another file, or damaged"):
        TABLE.of({}, "f.json")


@given(JSON, st.sampled_from([*GOOD, "new", ""]))
def test_any_value_anywhere_is_admitted_or_refused_in_words(value: Any, key: str) -> None:
    for changed in (value, GOOD | {key: value}):
        refusal = ""
        try:
            assert TABLE.of(changed, "f.json") == changed
        except UserError as error:
            refusal = str(error)
            refusal.encode()
        assert refusal.startswith("f.json") == bool(refusal)


@pytest.mark.parametrize("check", [Anything(), Record({}, others=True)])
def test_depth_ends(check: Check) -> None:
    value: Any = {}
    for _ in range(200):
        value = {"deeper": [value]}
    with pytest.raises(UserError, match="nested at most"):
        check.of(value, "f.json")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a": 1' + "0" * 5000 + "}", b"\xff\xfe", "nul"])
def test_what_is_not_json(tmp_path: Path, text: str | bytes) -> None:
    (tmp_path / "f.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError, match="not readable JSON"):
        read_json(tmp_path / "f.json")


FACTS: dict[str, Any] = {"metadata": {1: 2, 10: [0.1, math.nan]}, "order": ("a", "b"), "text": "ü"}


@given(st.data())
def test_every_change_of_a_sealed_record_is_seen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("sealed")
    (folder / "w").write_bytes(b"weights")
    record = json.loads(json.dumps(sealed(FACTS, folder, ["w"])))
    check_seal(record, folder / "r.json")
    check_files(record, folder, ["w"], folder / "r.json")
    key = data.draw(st.sampled_from(sorted(record)))
    value = data.draw(JSON.filter(lambda value: json.dumps(value) != json.dumps(record[key])))
    with pytest.raises(UserError, match="its own checksum"):
        check_seal(record | {key: value}, folder / "r.json")


def test_another_file_or_none_is_seen(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"weights")
    record = sealed(FACTS, tmp_path, ["w"])
    (tmp_path / "w").write_bytes(b"wEights")
    with pytest.raises(UserError, match="is not the file that"):
        check_files(record, tmp_path, ["w"], tmp_path / "r.json")
    (tmp_path / "w").unlink()
    with pytest.raises(UserError, match="is missing, and"):
        check_files(record, tmp_path, ["w"], tmp_path / "r.json")
    check_seal(FACTS, tmp_path / "r.json")  # from before there were digests


def test_only_named_files_are_copied_and_no_links(tmp_path: Path) -> None:
    source, secret = tmp_path / "source", tmp_path / "secret"
    (source / "in").mkdir(parents=True)
    secret.write_text("key")
    for name in ("a", "b", "in/c"):
        (source / name).write_text(name)
    copy_files(source, tmp_path / "copy", ["a", "in/c", "lost"])
    assert sorted(p.name for p in (tmp_path / "copy").rglob("*")) == ["a", "c", "in"]
    for target in (secret, Path("../secret"), tmp_path / "nowhere"):
        (source / "link").unlink(missing_ok=True)
        (source / "link").symlink_to(target)
        with pytest.raises(UserError, match="is a link to"):
            copy_files(source, tmp_path / "other", ["link"])
    (source / "into").symlink_to(source / "in")
    with pytest.raises(UserError, match="is a link to"):
        copy_files(source, tmp_path / "other", ["into/c"])
