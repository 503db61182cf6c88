"""Files: written completely or not at all, and read only if they are what they should be."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import yaml
from safetensors import SafetensorError
from yaml.nodes import Node

from eva_rl.errors import UserError
from eva_rl.schema import Check

LARGEST_JSON = 64 * 2**20
"""Bytes of the largest JSON file that is read."""
FILES, SEAL = "files", "sha256"
"""Keys of a sealed record: digests of the files beside it, and its own."""


def expanded(path: str | Path) -> Path:
    """A path as it is typed, with ``~`` as the home folder; a user that does not exist stays as it is."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises RuntimeError for ~nobody


def check_folder(folder: Path, setting: str) -> None:
    """Raise unless files can be written in a folder, or in the nearest one above it that exists.

    Args:
        folder: It need not exist.
        setting: What says where it is, for the message: ``run_dir=``, say.

    Raises:
        UserError: One cannot, a file is in the way, or the name is too long.
    """
    try:
        nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with TemporaryFile(dir=nearest):  # an attempt: permissions say nothing of /proc, nor anything to root
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}. Name another {setting}.") from error


def check_new(path: Path) -> None:
    """Raise unless there is nothing at the path of ``out=``, and something can be written there.

    Raises:
        UserError: Saying why not.
    """
    try:
        exists = path.exists()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}. Name another out=.") from error
    if exists:
        raise UserError(f"{path} exists and is not overwritten. Name another out=, or remove it.")
    check_folder(path.parent, "out=")


def read_json(path: Path, check: Check | None = None) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        check: What it may hold (see :mod:`eva_rl.schema`); None admits everything.

    Raises:
        UserError: No such file, not a regular one, not JSON, or not what ``check`` admits.
    """
    try:
        if regular_size(path) > LARGEST_JSON:
            raise UserError(f"{path} is larger than {LARGEST_JSON // 2**20} MiB: it is another file, or damaged.")
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"No file {path}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}.") from error
    return value if check is None else check.of(value, str(path))


def regular_size(path: Path) -> int:
    """Bytes of a regular file; a link to one counts.

    Raises:
        FileNotFoundError: No such file.
        UserError: It is a folder, a pipe, a socket or a device, reading which may never end.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is not a regular file. Replace it by the file itself.")
    return found.st_size


def sha256(path: Path) -> str:
    """Digest of a regular file, in hexadecimal."""
    regular_size(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(record: Mapping[str, Any], folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """A record with the digests of files in a folder, and with its own.

    Args:
        record: JSON values.
        folder: Where the files are.
        names: Of the files, relative to it.
    """
    values: dict[str, Any] = json.loads(json.dumps(record))  # as it will be read: keys are strings, and so sorted
    full = {**values, FILES: {name: sha256(folder / name) for name in names}}
    return {**full, SEAL: _record_digest(full)}


def check_seal(record: Mapping[str, Any], path: Path) -> None:
    """Raise unless a record is as :func:`sealed` left it; records from before that have no digest, and pass.

    Raises:
        UserError: It was changed.
    """
    if FILES not in record and SEAL not in record:
        return
    if record.get(SEAL) != _record_digest({name: value for name, value in record.items() if name != SEAL}):
        raise UserError(
            f"{path} does not match its own checksum: it was changed or damaged after it was written. Copy it again. "
            f"If the change is wanted, remove its keys {FILES!r} and {SEAL!r}."
        )


def check_files(record: Mapping[str, Any], folder: Path, names: Sequence[str], path: Path) -> None:
    """Raise unless files are those that a record was sealed with; what it does not list passes.

    Args:
        record: From ``path``.
        folder: Where the files are.
        names: Which of them to check.
        path: The record's file, for the message.

    Raises:
        UserError: One of them is missing, or another one.
    """
    digests = record.get(FILES, {})
    for name in names:
        if name not in digests:
            continue
        file = folder / name
        if not file.exists():
            raise UserError(f"{file} is missing, and {path} lists it. Save or copy the folder again.")
        if sha256(file) != digests[name]:
            raise UserError(
                f"{file} is not the file that {path} was written with: it was changed or damaged. Save or copy the "
                f"folder again. If the change is wanted, remove the keys {FILES!r} and {SEAL!r} of {path.name}."
            )


def _record_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record, whatever the order of its keys and the blanks between them."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def copy_files(source: Path, target: Path, names: Sequence[str], store: Path | None = None) -> None:
    """Copy those of the named files that exist; nothing else of the folder, and no links.

    Args:
        source: The folder to copy from.
        target: The folder to copy to.
        names: Relative to both.
        store: A folder into which links may lead: the Hugging Face hub's cache keeps its files in one.

    Raises:
        UserError: One of them is a link to elsewhere, or not a regular file.
    """
    for name in names:
        file = source / name
        if not file.exists() and not file.is_symlink():
            continue
        resolved = file.resolve()
        inside = resolved == source.resolve() / name or (store is not None and resolved.parent == store.resolve())
        if not inside:
            raise UserError(
                f"{file} is a link to {resolved}, which is not copied: it may be any file of this machine. Replace it "
                "by the file itself."
            )
        regular_size(resolved)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(resolved, target / name)


class PlainLoader(yaml.SafeLoader):
    """Reads plain values; a file that repeats parts by alias could grow without bound."""

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        """Refuse aliases."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not taken")
        return super().compose_node(parent, index)


PlainLoader.add_implicit_resolver(  # YAML 1.1 reads 1e-05 as text, for it has no point
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+"), list("-+0123456789")
)


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values; text such as ``${oc.env:HOME}`` stays text.

    Raises:
        UserError: No such file, or not YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), PlainLoader)
    except FileNotFoundError as error:
        raise UserError(f"No file {path}.") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}.") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file through a temporary one beside it."""
    write_file(path, lambda aside: aside.write_text(json.dumps(value, indent=2, allow_nan=True) + "\n"))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then sync it and rename it over ``path``.

    Raises:
        UserError: The disk is full or not writable; ``path`` is as it was.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.touch()
            mode = stat.S_IMODE(aside.stat().st_mode)
            write(aside)
            _let_read(aside, mode)
            _sync(aside)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable[[Path], object], own: Collection[str] | None = None) -> None:
    """Let ``write`` fill a folder beside ``path``, then sync it and move it to ``path``, replacing what was there.

    Args:
        path: Where to.
        write: Fills the folder that it is given.
        own: Names of what may be replaced; None replaces anything.

    Raises:
        UserError: There is something else, or the disk is full or not writable; ``path`` is as it was.
    """
    path = path.absolute()
    if own is not None and path.exists():
        others = [path.name] if path.is_file() else sorted(p.name for p in path.iterdir() if p.name not in own)
        if others:
            raise UserError(f"{path} holds {', '.join(others[:5])}, which would be lost. Name another folder.")
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    with disk_errors(path):
        try:
            aside.mkdir(parents=True)
            mode = stat.S_IMODE(aside.stat().st_mode) & 0o666
            with _held(aside):
                write(aside)
                for file in aside.rglob("*"):
                    if file.is_file():
                        _let_read(file, mode)
                        _sync(file)
                _swap(aside, path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a folder that is being filled, so that others can tell it from one that a killed process left."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def is_held(folder: Path) -> bool:
    """Whether a process is filling a folder."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(opened)
    return False


def _let_read(path: Path, mode: int) -> None:
    """Give a file the permissions of new files: safetensors makes its own for the owner alone."""
    with suppress(OSError):  # a file system that knows no permissions
        path.chmod(mode)


@contextmanager
def alone(path: Path, setting: str) -> Iterator[None]:
    """Let one process at a time make what belongs at ``path``; on a file system without locks, each on its own.

    Args:
        path: What is made.
        setting: What says where it is, for the message: ``run_dir=``, say.

    Raises:
        UserError: Its folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock").open("ab")
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written: {error}. Name another {setting}.") from error
    with lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.partial")
REPLACED = re.compile(r"\.(.+)\.old")


def is_partial(path: Path, name: str) -> bool:
    """Whether a file is what a killed process left of writing ``name``."""
    return re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}\.partial", path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left unfinished in a folder, and put back what it was replacing."""
    for aside in list(folder.rglob(".*.partial")):
        if PARTIAL.fullmatch(aside.name) and not aside.is_symlink():
            _remove(aside)
    for old in list(folder.rglob(".*.old")):
        replaced = REPLACED.fullmatch(old.name)
        if replaced is None or old.is_symlink() or not old.is_dir():
            continue
        path = old.with_name(replaced[1])
        _remove(old) if path.exists() else old.rename(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _swap(aside: Path, path: Path) -> None:
    """Move a finished folder into place; a crash in between leaves the old one under a ``.old`` name."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    aside.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a full or unwritable disk raises into one message.

    Raises:
        UserError: Naming the path.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} could not be written: {error}. Free some space, or name another folder.") from error
