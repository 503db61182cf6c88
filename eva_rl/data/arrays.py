"""Large arrays, in memory or mapped from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eva_rl.errors import UserError


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
