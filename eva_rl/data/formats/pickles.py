"""Pickled trajectories, opened only on request and only as far as arrays and builtin containers go.

What a pickle builds is bounded by its size: no object repeats so often, and no copy is made so often, that more comes
out than was put in.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eva_rl.data.formats.checks import READ_ERRORS, Source, check_regular_file
from eva_rl.errors import UserError

_NUMBER = re.compile(r"[fiu][1248]|b1|\?")
_CONTAINERS: dict[str, Callable[..., Any]] = {
    "dict": dict,
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "bytearray": bytearray,
}
_MEMO_OPCODES = {"PUT", "BINPUT", "LONG_BINPUT"}


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
    if not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("it holds an array without bytes")
    return np.frombuffer(data, dtype.numpy()).reshape(shape, order=order)


def _scalar(dtype: Any, data: Any) -> Any:
    return _from_buffer(data, dtype, (), "C")[()]


def _latin1(text: str, encoding: str) -> bytes:
    """How protocols up to 2 spell bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it wants the codec {encoding}")
    return text.encode("latin1")


_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): "ndarray",  # named, but never called
    ("numpy", "dtype"): _DType,
    ("builtins", "complex"): complex,
    ("__builtin__", "complex"): complex,
    **{(module, "_reconstruct"): _Array for module in _MULTIARRAY},
    **{(module, "scalar"): _scalar for module in _MULTIARRAY},
    **{(module, "_frombuffer"): _from_buffer for module in ("numpy.core.numeric", "numpy._core.numeric")},
    ("_codecs", "encode"): _latin1,
}
_COPYING = (*_CONTAINERS.values(), _latin1)


class _Call:
    """What a file may call: nothing can be set on it, and what it copies counts."""

    __slots__ = ("_function", "_spend")

    def __init__(self, function: Callable[..., Any], spend: Callable[[int], None]) -> None:
        self._function, self._spend = function, spend

    def __call__(self, *args: Any) -> Any:
        for arg in args if self._function in _COPYING else ():
            if not hasattr(arg, "__len__"):  # bytearray(n) makes n bytes of nothing
                raise pickle.UnpicklingError(f"it makes a container of {arg!r}")
            self._spend(len(arg))
        return self._function(*args)


class _ArraysOnly(pickle.Unpickler):
    """Knows numpy arrays and builtin containers; every other name in the file is refused before it is imported."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._left = len(content)

    def _spend(self, copied: int) -> None:
        self._left -= copied
        if self._left < 0:
            raise pickle.UnpicklingError("it copies parts of itself again and again")

    def find_class(self, module: str, name: str) -> Any:
        if module in {"builtins", "__builtin__"} and name in _CONTAINERS:
            return _Call(_CONTAINERS[name], self._spend)
        if (module, name) == ("collections", "OrderedDict"):
            return _Call(dict, self._spend)
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(
                f"it wants {module}.{name}, which is neither a numpy array nor a builtin container"
            )
        found = _ADMITTED[module, name]
        return found if isinstance(found, str) else _Call(found, self._spend)


class _Plain:
    """Puts arrays in the place of what they were built in; a part that occurs twice is looked at once."""

    def __init__(self) -> None:
        self._done: dict[int, tuple[Any, int, Any]] = {}

    def __call__(self, value: Any) -> tuple[Any, int]:
        """The value, and how many numbers it would take to write it out."""
        if not isinstance(value, _Array | dict | list | tuple):
            return value, int(getattr(value, "size", 1))
        if id(value) not in self._done:
            self._done[id(value)] = (None, -1, value)  # kept, so that the number stays its own
            plain, count = self._make(value)
            self._done[id(value)] = (plain, count, value)
        plain, count, _ = self._done[id(value)]
        if count < 0:
            raise pickle.UnpicklingError("it holds itself")
        return plain, count

    def _make(self, value: Any) -> tuple[Any, int]:
        if isinstance(value, _Array):
            if value.value is None:
                raise pickle.UnpicklingError("it holds an unfinished array")
            return value.value, value.value.size
        if isinstance(value, dict):
            inner = {key: self(part) for key, part in value.items()}
            return {key: part for key, (part, _) in inner.items()}, sum(count for _, count in inner.values())
        parts = [self(part) for part in value]
        return type(value)(part for part, _ in parts), sum(count for _, count in parts)


def _check_opcodes(content: bytes) -> None:
    """Refuse places in the memo beyond what the file can fill: the unpickler makes room for all up to the largest."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in _MEMO_OPCODES and isinstance(argument, int) and argument > len(content):
            raise pickle.UnpicklingError(f"it counts its parts up to {argument}, more than it can hold")


def _unpickled(content: bytes) -> Any:
    _check_opcodes(content)
    plain, count = _Plain()(_ArraysOnly(content).load())
    if count > len(content):
        raise pickle.UnpicklingError(f"it claims {count} numbers by repeating parts, more than it can hold")
    return plain


def read_pickle(path: Path, allow_pickle: bool) -> Any:
    """Open a pickle.

    Args:
        path: The file.
        allow_pickle: The opt-in; without it nothing is unpickled.

    Raises:
        UserError: Not opted in, not a pickle, one with anything but numpy arrays and builtin containers, or one that
            claims more than it holds.
    """
    if not allow_pickle:
        raise UserError(
            f"{path} is a pickle, which is opened only if you state that you trust it: data.allow_pickle=true "
            "(load_dataset(..., allow_pickle=True)). Even then, only numpy arrays and builtin containers are admitted."
        )
    check_regular_file(path)
    with Source(path).reading():
        content = path.read_bytes()
    try:
        return _unpickled(content)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is not opened: {error}. Convert it to .npz where it was made.") from error
    except (*READ_ERRORS, ImportError) as error:
        raise UserError(f"{path} is not a readable pickle: {error}. Write or download it again.") from error
