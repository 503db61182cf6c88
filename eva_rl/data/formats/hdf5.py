"""HDF5 files that may be damaged, or made to read other files or to fill the memory."""

from __future__ import annotations

import math
import mmap
import posixpath
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5l, h5o
from numpy.typing import NDArray

from eva_rl.data.formats.checks import Source, check_regular_file, kind_of_file
from eva_rl.errors import UserError

MAX_COMPRESSION = 1100
"""An array is at most so many times larger than what its file stores of it: deflate reaches 1032."""
MAX_LINKS = 8
"""Soft links that one name may lead through, and virtual data sets."""
HEAP = b"GCOL\x01\0\0\0"
"""How a heap of texts of variable length begins, which alone of HDF5's structures has no checksum in new files."""
MAX_ATTRIBUTE = 4096
"""Numbers of an array-valued attribute that are read."""


class HdfFile:
    """A file opened once for reading; a context manager.

    Nothing outside the file is read: external links, external storage and virtual data sets of other files are
    refused. No array is read that claims more than the file stores.

    Args:
        path: The file.

    Raises:
        UserError: No such file, a folder, unreadable, or not HDF5.
    """

    def __init__(self, path: Path) -> None:
        check_regular_file(path)
        self.path = path
        self._checked: set[str] = set()
        self._addresses: dict[int, str] = {}
        self._left = MAX_COMPRESSION * path.stat().st_size
        self._heaps_checked = False
        if not h5py.is_hdf5(path):
            kind = kind_of_file(path)
            raise UserError(
                f"{path}: not readable: it is not an HDF5 file{kind and f' but {kind}'}. It is damaged, cut short or "
                "of another format; download or write it again, or name another."
            )
        with self.source().reading():
            self._file = h5py.File(path, "r")

    def __enter__(self) -> HdfFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def source(self, key: str = "") -> Source:
        """The name of a member, for messages."""
        return Source(self.path, key)

    def names(self, group: str = "") -> list[str]:
        """Names in a group; none where there is no such group.

        Raises:
            UserError: The file is damaged.
        """
        found = self._member(group)
        with self.source(group).reading():
            return [str(name) for name in found] if isinstance(found, h5py.Group) else []

    def is_group(self, key: str) -> bool:
        """Whether there is a group of this name.

        Raises:
            UserError: The file is damaged.
        """
        return isinstance(self._member(key), h5py.Group)

    def array(self, key: str, expected: str = "") -> h5py.Dataset:
        """An array of numbers, unread.

        Args:
            key: Its full name.
            expected: What to say where it is missing.

        Raises:
            UserError: Missing, a group, not numbers, a scalar, stored in other files, or larger than what is stored.
        """
        found = self._member(key)
        if not isinstance(found, h5py.Dataset):
            parent, _, name = key.rpartition("/")
            raise self.source(parent).missing(name, expected or "an array of numbers", self.names(parent))
        if key not in self._checked:  # the array itself is not kept: open ones hold what was read of them
            self._check(self.source(key), found, MAX_LINKS)
            self._checked.add(key)
        return found

    def read(self, key: str, rows: slice = slice(None), expected: str = "") -> NDArray[Any]:
        """Rows of an array.

        Raises:
            UserError: As :meth:`array`, or the file is damaged.
        """
        found = self.array(key, expected)
        with self.source(key).reading():
            return np.asarray(found[rows])

    def scalar(self, key: str) -> float:
        """A single number.

        Raises:
            UserError: Missing, or something else.
        """
        found = self._member(key)
        if not isinstance(found, h5py.Dataset) or found.shape != () or found.external or found.is_virtual:
            raise UserError(f"{self.source(key)} is not a single number.")
        self.source(key).check_dtype(found.dtype)
        with self.source(key).reading():
            return float(found[()])

    def attribute(self, key: str, group: str = "") -> str:
        """An attribute as text, "" where there is none or it is a long array.

        Raises:
            UserError: The file is damaged.
        """
        with self.source(key).reading():
            found = (self._file[group] if group else self._file).attrs
            if key not in found:
                return ""
            shape, kind = found.get_id(key).shape or (), found.get_id(key).dtype.kind
            if kind == "O":
                self._check_heaps()
            readable = not shape or (kind in "fiub" and math.prod(shape) <= MAX_ATTRIBUTE)
            return str(found[key]) if readable else ""

    def attributes(self) -> dict[str, str]:
        """All attributes of the file itself, as text.

        Raises:
            UserError: The file is damaged.
        """
        with self.source().reading():
            names = [str(name) for name in self._file.attrs]
        return {name: self.attribute(name) for name in names}

    def _check_heaps(self) -> None:
        """Refuse heaps of texts in whose damage the HDF5 library walks for ever: by steps of no length.

        Layout: section III.E, "Global Heap", of https://docs.hdfgroup.org/hdf5/v1_14/_f_m_t3.html.
        """
        if self._heaps_checked:
            return
        self._heaps_checked = True
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            begin = content.find(HEAP)
            while begin >= 0:
                end = begin + int.from_bytes(content[begin + 8 : begin + 16], "little")
                place = begin + 16
                while place + 16 <= min(end, len(content)):
                    size = int.from_bytes(content[place + 8 : place + 16], "little")
                    free_space = content[place : place + 2] == b"\0\0"
                    step = size if free_space else 16 + -(-size // 8) * 8
                    if step == 0:
                        raise UserError(f"{self.path}: its texts are damaged. Download or write it again.")
                    place += step
                begin = content.find(HEAP, begin + 8)

    def _member(self, key: str, links: int = MAX_LINKS) -> Any:
        """A group or an array, or None where there is none.

        ``in`` and ``get`` of h5py would open other files to follow a link, and call a damaged member a missing one.
        """
        found: Any = self._file
        names = [name for name in key.split("/") if name]
        for depth, name in enumerate(names):
            if not isinstance(found, h5py.Group):
                return None
            with self.source(key).reading():
                if not found.id.links.exists(name.encode()):
                    return None
                kind = found.id.links.get_info(name.encode()).type
                target = found.id.links.get_val(name.encode()) if kind != h5l.TYPE_HARD else b""
                found = found[name] if kind == h5l.TYPE_HARD else found
            if kind == h5l.TYPE_SOFT:
                parent = "/".join(names[:depth])
                target = posixpath.join(parent, target.decode(errors="replace"), *names[depth + 1 :])
                return self._followed(key, target, links)
            if kind != h5l.TYPE_HARD:
                raise UserError(
                    f"{self.source(key)} is a link to another file ({target!r}), which is not followed. Copy what it "
                    "leads to into the file, for instance with h5repack or h5copy."
                )
        return found

    def _followed(self, key: str, target: str, links: int) -> Any:
        if links == 0:
            raise UserError(f"{self.source(key)} is a link that leads through too many others. Write the file again.")
        return self._member(posixpath.normpath(target), links - 1)

    def _check(self, source: Source, found: h5py.Dataset, links: int) -> None:
        with source.reading():
            dtype, shape, external, virtual = found.dtype, found.shape, found.external, found.is_virtual
            address = h5o.get_info(found.id).addr
        source.check_dtype(dtype)
        if not shape:
            raise UserError(f"{source} is a single number, expected one row per env step.")
        if external:
            raise UserError(f"{source} keeps its numbers in other files, which are not read. Copy them into the file.")
        if self._addresses.setdefault(address, source.key) != source.key:
            raise UserError(f"{source} and {self._addresses[address]} are one array. Expected one of its own for each.")
        claimed = math.prod(shape) * dtype.itemsize
        if virtual:
            self._check_virtual(source, found, links)
        elif claimed > 0:
            claimed = max(claimed, self._check_stored(source, found, claimed))
        self._left -= claimed
        if self._left < 0:
            raise UserError(f"{source} claims {claimed} bytes, more than the file can hold: it is damaged.")

    def _check_virtual(self, source: Source, found: h5py.Dataset, links: int) -> None:
        """Admit virtual data sets that lead to arrays of this file."""
        with source.reading():
            parts = [(part.file_name, part.dset_name) for part in found.virtual_sources()]
        for file, name in parts:
            if file != "." or links == 0:
                raise UserError(f"{source} is made of other files ({file}), which are not read. Copy them into it.")
            inner = self._member(name)
            if not isinstance(inner, h5py.Dataset):
                raise UserError(f"{source} is made of {name}, which is missing. Write the file again.")
            with source.reading():
                external, virtual = inner.external, inner.is_virtual
            if external:
                raise UserError(f"{source} is made of {name}, which keeps its numbers in other files. Copy them.")
            if virtual:
                self._check_virtual(source, inner, links - 1)

    def _check_stored(self, source: Source, found: h5py.Dataset, claimed: int) -> int:
        """Bytes that reading will unpack: whole chunks. What was never written would be made up by the library."""
        with source.reading():
            chunks, stored = found.chunks, found.id.get_storage_size()
            filters = found.id.get_create_plist().get_nfilters() if chunks else 0
            if chunks:
                expected = math.prod(-(-n // c) for n, c in zip(found.shape, chunks, strict=True))
                whole, written = expected * math.prod(chunks) * int(found.dtype.itemsize), found.id.get_num_chunks()
            else:
                expected, whole, written = 1, claimed, 1
        if written < expected or (not filters and stored < claimed) or whole > MAX_COMPRESSION * stored:
            raise UserError(
                f"{source} claims {claimed} bytes, of which the file stores {stored}: it is damaged or was never "
                "written to its end. Write it again."
            )
        return int(whole)
