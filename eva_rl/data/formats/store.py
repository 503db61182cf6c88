"""Trajectories as a folder of ``.npy`` files that are mapped into memory instead of read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from eva_rl.data.formats.checks import Source, check_regular_file
from eva_rl.data.trajectories import COLUMNS, Trajectories, check_same_dimensions
from eva_rl.errors import UserError
from eva_rl.files import read_json, write_folder, write_json

INDEX = "trajectories.json"
FORMAT = 2
WITHOUT_DIGESTS = 1
"""Format of stores whose index holds no SHA-256 of the arrays and of itself."""
OPTIONAL = frozenset({"successes", "target_actions"})


def write_store(folder: Path, parts: Iterable[Trajectories], source: str) -> None:
    """Write a store part by part, completely or not at all; memory for one part is needed. A store there is replaced.

    Raises:
        UserError: There is no episode, the parts do not fit each other, the disk is full, or the folder holds something
            else.
    """
    own = (INDEX, *(f"{name}.npy" for name in (*COLUMNS, "offsets")))
    write_folder(folder, lambda aside: _write_parts(aside, parts, source), own)


def is_store(path: Path) -> bool:
    """Whether a folder is a store."""
    return (path / INDEX).is_file()


def read_store(folder: Path) -> Trajectories:
    """Map a store; the arrays are read once, for their digests.

    Raises:
        UserError: A file is missing, damaged, changed, or of another size than the index says.
    """
    index = _read_index(folder / INDEX)
    columns = {name: _map(folder, name, index, *COLUMNS[name]) for name in index["columns"]}
    return Trajectories(
        **columns,
        offsets=np.array(_map(folder, "offsets", index, np.int64, 1)),
        env_id=str(index.get("env_id", "")),
        source=str(index.get("source", folder)),
        metadata={str(key): str(value) for key, value in dict(index.get("metadata", {})).items()},
    )


def _read_index(file: Path) -> dict[str, Any]:
    check_regular_file(file)
    with Source(file).reading():  # json's recursion has a limit, which is no error of JSON
        index = read_json(file)
    known = isinstance(index, dict) and index.get("format") in (WITHOUT_DIGESTS, FORMAT)
    if not known or not isinstance(index.get("columns"), list) or not isinstance(index.get("metadata", {}), dict):
        raise UserError(f"{file} is not the index of a store of format {FORMAT}. Convert the data again.")
    columns = {str(name) for name in index["columns"]}
    if columns - set(COLUMNS) or set(COLUMNS) - columns - OPTIONAL:
        raise UserError(f"{file} lists columns {index['columns']}, expected {list(COLUMNS)}.")
    sums = index.get("sha256")
    if _has_digests(index) and (not isinstance(sums, dict) or sums.get(INDEX) != _index_digest(index)):
        raise UserError(f"{file} is damaged or was changed: it does not have its own digest. Convert the data again.")
    return dict(index)


def _has_digests(index: Mapping[str, Any]) -> bool:
    return index["format"] != WITHOUT_DIGESTS or "sha256" in index


def _index_digest(index: Mapping[str, Any]) -> str:
    sums = {name: value for name, value in index["sha256"].items() if name != INDEX}
    return hashlib.sha256(json.dumps({**index, "sha256": sums}, sort_keys=True).encode()).hexdigest()


def _map(folder: Path, name: str, index: Mapping[str, Any], dtype: type[np.generic], axes: int) -> NDArray[Any]:
    path = folder / f"{name}.npy"
    source = Source(path)
    check_regular_file(path)
    if _has_digests(index) and index["sha256"].get(name) != _file_digest(path):
        raise UserError(f"{path} is damaged or was changed: it does not have its digest. Convert the data again.")
    with source.reading():
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    source.check_dtype(array.dtype)
    if array.dtype != dtype or array.ndim != axes:
        raise UserError(f"{path} holds {array.dtype} with {array.ndim} axes, expected {dtype.__name__} with {axes}.")
    return array


def _file_digest(path: Path) -> str:
    with Source(path).reading(), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Column:
    """A ``.npy`` file that grows; numpy leaves room in its header for the final number of rows."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self.file: IO[bytes] = path.open("wb")
        self.path, self.dtype, self.rows, self.shape = path, np.dtype(dtype), 0, (0,)

    def append(self, array: NDArray[Any]) -> None:
        if self.rows == 0:
            self.shape = array.shape[1:]
            self._header()
        self.rows += len(array)
        self.file.write(np.ascontiguousarray(array, self.dtype).data)

    def close(self) -> None:
        self.file.seek(0)
        self._header()
        self.file.close()

    def _header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.rows, *self.shape),
        }
        np.lib.format.write_array_header_1_0(self.file, header)


def _write_parts(folder: Path, parts: Iterable[Trajectories], source: str) -> None:
    columns = {name: _Column(folder / f"{name}.npy", dtype) for name, (dtype, _) in COLUMNS.items()}
    optional, offsets, first = dict.fromkeys(OPTIONAL, False), [np.zeros(1, np.int64)], None
    env_id = ""
    metadata: dict[str, str] = {}
    try:
        for part in parts:
            if first is None:
                first, env_id, metadata = part, part.env_id, part.metadata
            check_same_dimensions(part, first)
            env_id, metadata = env_id if part.env_id == env_id else "", metadata if part.metadata == metadata else {}
            for name, column in columns.items():
                column.append(part.column(name))
            offsets.append(part.offsets[1:] + offsets[-1][-1])
            optional = {name: seen or getattr(part, name) is not None for name, seen in optional.items()}
    finally:
        for column in columns.values():
            column.close()
    if first is None:
        raise UserError(f"{source}: no episode. Expected at least one; name another data set.")
    for name in (name for name, seen in optional.items() if not seen):
        columns.pop(name).path.unlink()
    np.save(folder / "offsets.npy", np.concatenate(offsets))
    index: dict[str, Any] = {"format": FORMAT, "columns": list(columns), "env_id": env_id, "source": source}
    index |= {"metadata": metadata}
    index["sha256"] = {name: _file_digest(folder / f"{name}.npy") for name in (*columns, "offsets")}
    index["sha256"][INDEX] = _index_digest(index)
    write_json(folder / INDEX, index)
