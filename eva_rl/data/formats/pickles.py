"""Pickled trajectories, opened only when asked for and only as far as arrays and builtin containers go."""

from __future__ import annotations

import builtins
import io
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eva_rl.data.formats.checks import READ_ERRORS
from eva_rl.errors import UserError

_NUMBER = re.compile(r"[fiu][1248]|b1|\?")
_CONTAINERS = {"dict", "list", "tuple", "set", "frozenset", "bytearray", "complex"}


class _DType:
    """A type of numbers. numpy's own would take flags from the file that make it touch memory that is not its."""

    def __init__(self, spec: Any, *_: Any) -> None:
        if not isinstance(spec, str) or not _NUMBER.fullmatch(spec):
            raise pickle.UnpicklingError(f"it holds an array of {spec!r}, expected numbers")
        self.spec, self.order = spec, "<" if sys.byteorder == "little" else ">"

    def __setstate__(self, state: Any) -> None:
        self.order = {"<": "<", ">": ">"}.get(state[1], self.order)

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.spec)


class _Array:
    """An array under construction: numpy's own would trust the file with its shape, its memory and its type."""

    def __init__(self, *_: Any) -> None:
        self.value: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _from_buffer(data, dtype, shape, "F" if fortran else "C")


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
    if not isinstance(dtype, _DType):
        raise pickle.UnpicklingError("it holds an array without a type")
    return np.frombuffer(bytes(data), dtype.numpy()).reshape(shape, order=order)


def _scalar(dtype: Any, data: Any) -> Any:
    return _from_buffer(data, dtype, (), "C")[()]


class _Marker:
    """Stands for ``numpy.ndarray``, which is named but never called."""


_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Marker,
    ("numpy", "dtype"): _DType,
    ("collections", "OrderedDict"): dict,
    **{(module, "_reconstruct"): _Array for module in _MULTIARRAY},
    **{(module, "scalar"): _scalar for module in _MULTIARRAY},
    **{(module, "_frombuffer"): _from_buffer for module in ("numpy.core.numeric", "numpy._core.numeric")},
    **{(module, name): getattr(builtins, name) for module in ("builtins", "__builtin__") for name in _CONTAINERS},
}


class _ArraysOnly(pickle.Unpickler):
    """Knows numpy arrays and builtin containers; every other name in the file is refused before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(
                f"it wants {module}.{name}, which is neither a numpy array nor a builtin container"
            )
        return _ADMITTED[module, name]


def _plain(value: Any) -> Any:
    """The same with arrays in the place of what they were built in."""
    if isinstance(value, _Array):
        if value.value is None:
            raise pickle.UnpicklingError("it holds an unfinished array")
        return value.value
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(inner) for inner in value)
    return value


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
    content = io.BytesIO(_bytes(path))
    try:
        return _plain(_ArraysOnly(content).load())
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is not opened: {error}. Convert it to .npz where it was made.") from error
    except (*READ_ERRORS, AttributeError, ImportError, UnicodeError) as error:
        raise UserError(f"{path} is not a readable pickle: {error}. Write or download it again.") from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} is not readable: {error}.") from error
