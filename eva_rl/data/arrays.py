"""Large arrays, in memory or mapped from a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eva_rl.errors import UserError
from eva_rl.files import expanded
from eva_rl.limits.memory import memory_limit

MEMORY_FRACTION = 0.25
"""Data are mapped instead of read when they are larger than this part of the memory that the process may use."""

Rows = NDArray[np.int64]


def cache_folder() -> Path:
    """Where downloads and memory maps are kept: ``EVA_RL_CACHE`` or ``~/.cache/eva-rl``."""
    return expanded(os.environ.get("EVA_RL_CACHE") or "~/.cache/eva-rl")


def gathered(arrays: Mapping[str, NDArray[Any]], begins: Rows, ends: Rows) -> dict[str, NDArray[Any]]:
    """Ranges of rows of several arrays, one after the other.

    They are copied in memory. Where that takes more than :data:`MEMORY_FRACTION`, ranges that follow each other stay
    where they are, and others are mapped from a file of the cache, which has no name and is gone with the process.

    Args:
        arrays: By name, of equally many rows.
        begins: First row of each range.
        ends: Row after the last of each range.

    Raises:
        UserError: The file cannot be written.
    """
    spans = [slice(begin, end) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
    size = int((ends - begins).sum()) * sum(array[:1].nbytes for array in arrays.values())
    if not spans or size <= MEMORY_FRACTION * memory_limit():
        return {name: np.concatenate([array[:0], *(array[span] for span in spans)]) for name, array in arrays.items()}
    if np.array_equal(begins[1:], ends[:-1]):
        return {name: array[spans[0].start : spans[-1].stop] for name, array in arrays.items()}
    return {name: _mapped(array, spans) for name, array in arrays.items()}


def _mapped(array: NDArray[Any], spans: list[slice]) -> NDArray[Any]:
    folder, rows = cache_folder(), sum(span.stop - span.start for span in spans)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            for span in spans:
                file.write(np.ascontiguousarray(array[span]).data)
            file.flush()
            return np.memmap(file, array.dtype, "r", shape=(rows, *array.shape[1:]))
    except OSError as error:
        raise UserError(
            f"The chosen episodes are too large for the memory and cannot be kept in {folder}: {error}. Choose fewer, "
            "or name a folder with more room in EVA_RL_CACHE."
        ) from error


def new_array(name: str, shape: tuple[int, ...], folder: Path | None) -> NDArray[np.float32]:
    """Zeros.

    Args:
        name: Of the file.
        shape: Any.
        folder: Where the file lies; None keeps the array in memory.

    Raises:
        UserError: The file cannot be written.
    """
    if folder is None:
        return np.zeros(shape, np.float32)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, shape)
    except OSError as error:
        raise UserError(f"The replay cannot be kept in {folder}: {error}. Name another run_dir=.") from error
