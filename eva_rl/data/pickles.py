"""Pickled trajectories, opened only when asked for and only as far as arrays and builtin containers go."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eva_rl.data.checks import READ_ERRORS
from eva_rl.errors import UserError

_ARRAYS = {
    (module, name)
    for name, modules in {
        "_reconstruct": ("numpy.core.multiarray", "numpy._core.multiarray"),
        "scalar": ("numpy.core.multiarray", "numpy._core.multiarray"),
        "_frombuffer": ("numpy.core.numeric", "numpy._core.numeric"),
        "ndarray": ("numpy",),
        "dtype": ("numpy",),
    }.items()
    for module in modules
}
_CONTAINERS = {"dict", "list", "tuple", "set", "frozenset", "bytearray", "complex"}


class _ArraysOnly(pickle.Unpickler):
    """Knows numpy arrays and builtin containers; every other name in the file is refused before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ARRAYS:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if module in {"builtins", "__builtin__"} and name in _CONTAINERS:
            return super().find_class("builtins", name)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(
            f"it wants {module}.{name}, which is neither a numpy array nor a builtin container"
        )


def _latin1(text: str, encoding: str) -> bytes:
    """How protocols up to 2 spell bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it wants the codec {encoding}")
    return text.encode("latin1")


def read_pickle(path: Path, allow_pickle: bool) -> Any:
    """Open a pickle.

    Args:
        path: The file.
        allow_pickle: The opt-in; without it nothing is unpickled.

    Raises:
        UserError: Not opted in, not a pickle, or one with anything but numpy arrays and builtin containers.
    """
    if not allow_pickle:
        raise UserError(
            f"{path} is a pickle, which is opened only when you say that you trust it: data.allow_pickle=true "
            "(load_dataset(..., allow_pickle=True)). Even then only numpy arrays and builtin containers are admitted."
        )
    load: Callable[[], Any] = _ArraysOnly(io.BytesIO(_bytes(path))).load
    try:
        with np.errstate(all="ignore"):
            return load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is not opened: {error}. Convert it to .npz where it was made.") from error
    except (*READ_ERRORS, AttributeError, ImportError, UnicodeError) as error:
        raise UserError(f"{path} is not a readable pickle: {error}. Write or download it again.") from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} is not readable: {error}.") from error
