"""HDF5 files that may be damaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from eva_rl.data.formats.checks import check_dtype, place, reading
from eva_rl.errors import UserError

MAX_COMPRESSION = 1100
"""An array is at most so many times larger than its file: deflate reaches 1032."""


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading.

    Raises:
        UserError: No such file, a folder, unreadable, or not HDF5.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected an HDF5 file. Name a file in it.")
    if not path.exists():
        raise UserError(f"No data file {path}. Name an existing file; `python -m eva_rl.datasets` lists what is there.")
    with reading(path):
        file = h5py.File(path, "r")
    try:
        yield file
    finally:
        file.close()


def keys(path: Path, group: Any) -> list[str]:
    """Names in a group.

    Raises:
        UserError: The file is damaged.
    """
    with reading(path):
        return [str(name) for name in group]


def member(path: Path, group: Any, key: str) -> Any:
    """A group or an array, or None where there is none.

    Raises:
        UserError: The file is damaged. ``in`` and ``get`` of h5py would call a damaged member a missing one.
    """
    try:
        with reading(path, key):
            return group[key]
    except UserError as error:
        if isinstance(error.__cause__, KeyError) and key.split("/", maxsplit=1)[0] not in keys(path, group):
            return None
        raise


def array(path: Path, group: Any, key: str, expected: str = "", prefix: str = "") -> h5py.Dataset:
    """An array of numbers, unread.

    Args:
        path: Of the file.
        group: Where ``key`` lies.
        key: Name of the array.
        expected: What to say where it is missing.
        prefix: Of the key, for messages.

    Raises:
        UserError: Missing, a group, not numbers, a scalar, or larger than the file can hold.
    """
    name = prefix + key
    found = member(path, group, key)
    if not isinstance(found, h5py.Dataset):
        raise UserError(f"{place(path, name)} is missing{expected and '; expected ' + expected}.")
    with reading(path, name):
        dtype, shape, size = found.dtype, found.shape, found.size
    check_dtype(path, name, dtype)
    if not shape:
        raise UserError(f"{place(path, name)} is a single number, expected one row per env step.")
    if size * dtype.itemsize > MAX_COMPRESSION * path.stat().st_size:
        raise UserError(f"{place(path, name)} claims {size} numbers, more than the file can hold: it is damaged.")
    return found


def read(path: Path, key: str, dataset: h5py.Dataset, rows: slice = slice(None)) -> NDArray[Any]:
    """Rows of an array.

    Raises:
        UserError: The file is damaged.
    """
    with reading(path, key):
        return np.asarray(dataset[rows])


def attribute(path: Path, group: Any, key: str) -> str:
    """An attribute as text, "" where there is none.

    Raises:
        UserError: The file is damaged.
    """
    with reading(path, key):
        return str(group.attrs[key]) if key in group.attrs else ""
