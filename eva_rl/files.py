"""Files that are written completely or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from yaml.nodes import Node

from eva_rl.errors import UserError


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: No such file, or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"No file {path}.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON: {error}.") from error


class _PlainLoader(yaml.SafeLoader):
    """Reads plain values; a file that repeats parts by alias could grow without bound."""

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not taken")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values; text such as ``${oc.env:HOME}`` stays text.

    Raises:
        UserError: No such file, or not YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
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
    with _disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(aside)
            _sync(aside)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a folder beside ``path``, then sync it and move it to ``path``, replacing what was there.

    Raises:
        UserError: The disk is full or not writable; ``path`` is as it was.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    with _disk_errors(path):
        try:
            aside.mkdir(parents=True)
            write(aside)
            for file in aside.rglob("*"):
                if file.is_file():
                    _sync(file)
            _swap(aside, path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


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
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} could not be written: {error}. Free some room, or name another folder.") from error
