"""Trajectories as a folder of ``.npy`` files that are mapped into memory instead of read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from eva_rl.data.formats.checks import check_dtype, place, reading
from eva_rl.data.trajectories import COLUMNS, Trajectories, concatenate
from eva_rl.errors import UserError
from eva_rl.files import read_json, write_folder, write_json

INDEX = "trajectories.json"
FORMAT = 1


def gather(parts: Iterable[Trajectories], source: str, folder: Path | None = None) -> Trajectories:
    """Join what a reader yields, in memory or in a folder.

    Args:
        parts: Some whole episodes each.
        source: What a user would call the whole.
        folder: Where to write a store and map it; None keeps everything in memory.

    Raises:
        UserError: There is no episode, the parts do not fit each other, or the disk is full.
    """
    if folder is None:
        return concatenate(list(parts), source=source)
    write_store(folder, parts, source)
    return read_store(folder)


def write_store(folder: Path, parts: Iterable[Trajectories], source: str) -> None:
    """Write a store part by part, completely or not at all; memory for one part is needed.

    Raises:
        UserError: As :func:`gather`.
    """
    write_folder(folder, lambda aside: _write_parts(aside, parts, source))


def is_store(path: Path) -> bool:
    """Whether a folder is a store."""
    return (path / INDEX).is_file()


def read_store(folder: Path) -> Trajectories:
    """Map a store; nothing but its index and its offsets is read.

    Raises:
        UserError: A file is missing, damaged or of another size than the index says.
    """
    index = read_json(folder / INDEX)
    if not isinstance(index, dict) or index.get("format") != FORMAT or not isinstance(index.get("columns"), list):
        raise UserError(f"{folder / INDEX} is not the index of a store of format {FORMAT}. Convert the data again.")
    unknown = set(index["columns"]) - set(COLUMNS)
    if unknown or not {"observations", "actions", "rewards"} <= set(index["columns"]):
        raise UserError(f"{folder / INDEX} lists columns {index['columns']}, expected some of {list(COLUMNS)}.")
    columns = {name: _map(folder / f"{name}.npy", *COLUMNS[name]) for name in index["columns"]}
    return Trajectories(
        **columns,
        offsets=np.array(_map(folder / "offsets.npy", np.int64, 1)),
        env_id=str(index.get("env_id", "")),
        source=str(index.get("source", folder)),
        metadata={str(key): str(value) for key, value in dict(index.get("metadata", {})).items()},
    )


def _map(path: Path, dtype: type[np.generic], axes: int) -> NDArray[Any]:
    with reading(path):
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    check_dtype(path, "", array.dtype)
    if array.dtype != dtype or array.ndim != axes:
        raise UserError(
            f"{place(path)} holds {array.dtype} with {array.ndim} axes, expected {dtype.__name__} with {axes}."
        )
    return array


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
    optional, offsets, first = {"successes": False, "target_actions": False}, [np.zeros(1, np.int64)], None
    try:
        for part in parts:
            first = first or part
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
    index = {"format": FORMAT, "columns": list(columns), "env_id": first.env_id, "source": source}
    write_json(folder / INDEX, index | {"metadata": first.metadata})
