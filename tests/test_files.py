"""Files: whole or as before, only regular ones, only plain values, and digests that find every change."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eva_rl.agents.huggingface import export_huggingface
from eva_rl.agents.policy_folder import save_policy
from eva_rl.data.formats.store import write_store
from eva_rl.errors import UserError
from eva_rl.files import (
    alone,
    check_files,
    check_seal,
    copy_files,
    expanded,
    is_partial,
    read_json,
    read_yaml,
    regular_size,
    remove_leftovers,
    sealed,
    sha256,
    write_file,
    write_folder,
    write_json,
)
from eva_rl.schema import Integer, Record
from tests import forks
from tests.conftest import make_policy
from tests.data.making import random_trajectories


def listed(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, UserError])
def test_a_write_that_fails_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    def fail(aside: Path) -> None:
        if aside.is_dir():
            (aside / "new").write_text("half")
        else:
            aside.write_text("half")
        raise error

    write_json(tmp_path / "a.json", {"a": 1})
    write_folder(tmp_path / "b", lambda aside: (aside / "old").write_text("whole"))
    for write, name in ((write_file, "a.json"), (write_folder, "b")):
        with pytest.raises(error):
            write(tmp_path / name, fail)
    assert listed(tmp_path) == ["a.json", "b", "b/old"]
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_a_written_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_folder(tmp_path / "deep/b", lambda aside, name=name: (aside / name).write_text(name))
    assert listed(tmp_path) == ["deep", "deep/b", "deep/b/second"]


def test_only_what_is_its_own_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that was saved into a folder removed all that lay there."""
    save_policy(tmp_path / "run", make_policy())
    save_policy(tmp_path / "run", make_policy())
    (tmp_path / "run" / "thesis.txt").write_text("words")
    for save in (
        lambda: save_policy(tmp_path / "run", make_policy()),
        lambda: export_huggingface(make_policy(), tmp_path / "run"),
        lambda: write_store(tmp_path / "run", [random_trajectories()], "mine"),
    ):
        with pytest.raises(UserError, match=r"run holds .*thesis\.txt, which would be lost\. Name another folder"):
            save()
    assert (tmp_path / "run" / "thesis.txt").read_text() == "words"
    (tmp_path / "file").write_text("words")
    with pytest.raises(UserError, match="holds file, which would be lost"):
        save_policy(tmp_path / "file", make_policy())
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(UserError, match="would be lost"):
        save_policy(".", make_policy())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"a\.json"):
        write_json(tmp_path / "a.json", {})


def test_where_a_file_stands_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    for write in (write_file, write_folder):
        with pytest.raises(UserError, match="a/b"):
            write(tmp_path / "a/b", lambda aside: aside.write_text("x"))
    assert (tmp_path / "a").read_text() == "a file"


def test_infinity_and_nan_survive(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"loss": float("inf"), "text": "ü"})
    assert read_json(tmp_path / "a.json") == {"loss": float("inf"), "text": "ü"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable JSON"),
        (b'{"a": 1', "not readable JSON"),
        (b"\xff\xfe{}", "not readable JSON"),
        (b"[" * 100_000, "not readable JSON"),
        (b'{"a": "x"}', "a"),
        (b"[1]", "expected"),
    ],
)
def test_json_that_is_none_or_another(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_json(path, Record({"a": Integer()}))
    assert str(path) in str(caught.value)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    assert regular_size(tmp_path / "file") == regular_size(tmp_path / "link") == 5
    for name in ("pipe", "folder"):
        for read in (regular_size, sha256, read_json):
            with pytest.raises(UserError, match="not a regular file"):
                read(tmp_path / name)
    with pytest.raises(UserError, match="No file"):
        read_json(tmp_path / "broken")


def test_digests_are_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    """Of two files, as it is read again."""
    (tmp_path / "w.bin").write_bytes(b"weights")
    (tmp_path / "c.json").write_text("{}")
    write_json(tmp_path / "r.json", sealed({"rank": 8, "rates": [0.1, 1e-5], 3: None}, tmp_path, ["w.bin", "c.json"]))
    found: dict[str, Any] = read_json(tmp_path / "r.json")
    return found


def test_a_sealed_record_passes_in_any_order_of_its_keys(record: dict[str, Any], tmp_path: Path) -> None:
    for one in (record, dict(reversed(record.items())), json.loads(json.dumps(record, indent=7))):
        check_seal(one, tmp_path / "r.json")
        check_files(one, tmp_path, ["w.bin", "c.json", "not listed"], tmp_path / "r.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(rank=9),
        lambda record: record.update(rank="8"),
        lambda record: record.update(rank=8.5),
        lambda record: record.update(more=1),
        lambda record: record.pop("rates"),
        lambda record: record["rates"].reverse(),
        lambda record: record["files"].pop("w.bin"),
        lambda record: record.pop("files"),
        lambda record: record.pop("sha256"),
        lambda record: record.update(sha256="0" * 64),
        lambda record: record.update(sha256=None),
    ],
)
def test_every_change_of_a_sealed_record_is_found(
    change: Callable[[dict[str, Any]], object], record: dict[str, Any], tmp_path: Path
) -> None:
    change(record)
    with pytest.raises(UserError, match=r"r\.json does not match its own checksum"):
        check_seal(record, tmp_path / "r.json")


def test_a_record_without_digests_passes_as_one_of_an_earlier_version(record: dict[str, Any], tmp_path: Path) -> None:
    old = {key: value for key, value in record.items() if key not in {"files", "sha256"}} | {"rank": 99}
    check_seal(old, tmp_path / "r.json")
    check_files(old, tmp_path, ["w.bin"], tmp_path / "r.json")


def test_a_changed_or_missing_file_is_named(record: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"Weights")
    with pytest.raises(UserError, match=r"w\.bin is not the file that .*r\.json was written with"):
        check_files(record, tmp_path, ["c.json", "w.bin"], tmp_path / "r.json")
    (tmp_path / "w.bin").unlink()
    with pytest.raises(UserError, match=r"w\.bin is missing"):
        check_files(record, tmp_path, ["w.bin"], tmp_path / "r.json")


def test_copies_hold_the_known_files_and_nothing_else(tmp_path: Path) -> None:
    source, target, store = tmp_path / "source", tmp_path / "target", tmp_path / "store"
    for name in ("source/a", "source/deep/b", "source/secret", "store/blob", "elsewhere"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    (source / "cached").symlink_to(store / "blob")
    copy_files(source, target, ["a", "deep/b", "absent", "cached"], store)
    assert listed(target) == ["a", "cached", "deep", "deep/b"]
    assert not (target / "cached").is_symlink()
    assert (target / "cached").read_text() == "store/blob"
    for name in ("cached", "outside", "above"):
        (source / "outside").unlink(missing_ok=True)
        (source / "outside").symlink_to(tmp_path / "elsewhere")
        (source / "above").unlink(missing_ok=True)
        (source / "above").symlink_to("../elsewhere")
        with pytest.raises(UserError, match=f"{name} is a link to .*not copied"):
            copy_files(source, tmp_path / "other", [name])
    assert listed(tmp_path / "other") == [] or not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-05", {"a": 1e-5}),
        ("a: 2E3", {"a": 2000.0}),
        ("a: .5", {"a": 0.5}),
        ("a: 1.5e+3", {"a": 1500.0}),
        ("a: '1e-05'", {"a": "1e-05"}),
        ("a: ${oc.env:HOME}", {"a": "${oc.env:HOME}"}),
        ("a: null\nb: [x, 2, true]", {"a": None, "b": ["x", 2, True]}),
        ("a: e5", {"a": "e5"}),
        ("", None),
    ],
)
def test_yaml_holds_plain_values(text: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert read_yaml(tmp_path / "a.yaml") == value


@pytest.mark.parametrize(
    "text", ["a: &x 1\nb: *x", "a: !!python/object/apply:os.getcwd []", "a: [", "\t- a", "a: b: c", "\x00"]
)
def test_yaml_that_is_none_or_more_than_values(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=r"a\.yaml is not readable YAML") as caught:
        read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = [".hidden", ".a.partial", ".config.yaml.0123456g.partial", "a.old", "b.12345678.partial"]
    for name in [*kept, ".config.yaml.0123abcd.partial", "deep/.m.jsonl.ffffffff.partial"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in ("policy", ".policy.old", ".lost.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    assert is_partial(tmp_path / ".config.yaml.0123abcd.partial", "config.yaml")
    assert not is_partial(tmp_path / ".config.yaml.0123abcd.partial", "config")
    remove_leftovers(tmp_path)
    assert listed(tmp_path) == sorted([*kept, "deep", "lost", "lost/weights", "policy", "policy/weights"])
    assert (tmp_path / "policy/weights").read_text() == "policy"
    assert (tmp_path / "lost/weights").read_text() == ".lost.old"


@pytest.mark.parametrize("name", ["~nobody-of-that-name/runs", "~", "~/a", "a/~/b", "a b", ""])
def test_only_homes_that_exist_are_expanded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    known = {"~": "/home/me", "~/a": "/home/me/a"}
    assert expanded(name) == expanded(Path(name)) == Path(known.get(name, name))


def test_every_typed_path_is_expanded_in_one_way() -> None:
    """``Path.expanduser`` raises RuntimeError for a user that does not exist."""
    root = Path(__file__).parent.parent
    files = [file for folder in ("eva_rl", "agents", "envs", "configs") for file in (root / folder).rglob("*.py")]
    assert [file.name for file in files if "expanduser(" in file.read_text(encoding="utf-8")] == ["files.py"]


def test_what_one_process_makes_the_others_find(tmp_path: Path) -> None:
    """Processes that all look first whether it is there: without the lock each finds nothing, and makes it."""
    path, log = tmp_path / "places" / "made", tmp_path / "log"

    def make() -> int:
        with alone(path, "run_dir="):
            if not path.exists():
                time.sleep(0.2)
                write_file(path, lambda aside: aside.write_text("x"))
                with log.open("a") as file:
                    file.write("made\n")
        return 0

    processes = [forks.start(make, tmp_path / "out") for _ in range(3)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "made\n"


def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with alone(tmp_path / "made", "run_dir="):
        (tmp_path / "made").touch()
    assert (tmp_path / "made").exists()


def test_errors_inside_a_lock_are_not_taken_for_the_lock_s(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk"), alone(tmp_path / "made", "run_dir="):
        raise OSError("disk")


def test_the_setting_of_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    made = alone(tmp_path / "file" / "made", "run_dir=")
    with pytest.raises(UserError, match=r"file cannot be written: .* Name another run_dir=\."), made:
        pass


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_others_may_read_what_the_user_lets_them_read(umask: int, tmp_path: Path) -> None:
    """safetensors writes files that the owner alone can read, whatever the umask."""
    before = os.umask(umask)
    try:
        write_file(tmp_path / "a.safetensors", lambda aside: save_file({"a": torch.zeros(2)}, aside))
        write_folder(tmp_path / "b", lambda aside: save_file({"a": torch.zeros(2)}, aside / "c.safetensors"))
    finally:
        os.umask(before)
    for path in (tmp_path / "a.safetensors", tmp_path / "b" / "c.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
