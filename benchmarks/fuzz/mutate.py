"""Mutate files of every format and count what loading them gives.

    python -m benchmarks.fuzz.mutate                       # 200 mutations of each format
    python -m benchmarks.fuzz.mutate --mutations 5000 --formats D4RL store --seed 7
    python -m benchmarks.fuzz.mutate --formats store --seed 7 --only 123    # one mutation again, with its traceback

Each mutated folder is loaded in a process of its own, with a limit on time and memory. Outcomes: ``equal`` (the file
means what it meant), ``fell back`` (to the checkpoint before), ``refused`` (one UserError), ``different`` (other
numbers: damage that a format without digests cannot show; for our own formats a fault), ``traceback``, ``hang``,
``crash`` (the process died). The exit status is 1 where there is a traceback or a hang, or a file of ours that loaded
as something else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import multiprocessing
import resource
import secrets
import shutil
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from benchmarks.fuzz import formats, policies, runs
from benchmarks.fuzz.formats import FELL_BACK, Format
from eva_rl.errors import UserError

FORMATS = formats.FORMATS | policies.FORMATS | runs.FORMATS

MEMORY = 12 << 30
OUTCOMES = ("equal", "fell back", "refused", "different", "traceback", "hang", "crash")
SHOWN = 3

Rng = np.random.Generator


def flip_bits(content: bytearray, rng: Rng) -> None:
    """Change one bit in some bytes."""
    for place in rng.integers(len(content), size=rng.integers(1, 9)):
        content[place] ^= 1 << int(rng.integers(8))


def overwrite(content: bytearray, rng: Rng) -> None:
    """Put random bytes, zeros or ones in the place of a block."""
    begin, length = int(rng.integers(len(content))), int(rng.integers(1, 65))
    filler = [rng.bytes(length), bytes(length), b"\xff" * length][rng.integers(3)]
    content[begin : begin + length] = filler[: len(content) - begin]


def cut(content: bytearray, rng: Rng) -> None:
    """Lose the end, or a block in the middle."""
    begin = int(rng.integers(len(content)))
    del content[begin : None if rng.integers(2) else begin + int(rng.integers(1, 65))]


def insert(content: bytearray, rng: Rng) -> None:
    """Put in random bytes, or a block for a second time."""
    begin, source, length = int(rng.integers(len(content))), int(rng.integers(len(content))), int(rng.integers(1, 65))
    content[begin:begin] = rng.bytes(length) if rng.integers(2) else content[source : source + length]


def swap_blocks(content: bytearray, rng: Rng) -> None:
    """Exchange two blocks of the same length."""
    length = int(rng.integers(1, max(2, min(65, len(content) // 2))))
    one, other = (int(place) for place in rng.integers(len(content) - length + 1, size=2))
    content[one : one + length], content[other : other + length] = (
        content[other : other + length],
        content[one : one + length],
    )


def large_number(content: bytearray, rng: Rng) -> None:
    """Put a length that cannot be where a length may stand."""
    value = [2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 0][rng.integers(5)]
    place = int(rng.integers(max(1, len(content) - 8)))
    content[place : place + 8] = value.to_bytes(8, "little")


def in_bytes(change: Callable[[bytearray, Rng], None]) -> Callable[[Path, Rng], None]:
    """A mutation of a file's bytes."""

    def mutate(file: Path, rng: Rng) -> None:
        content = bytearray(file.read_bytes())
        if content:
            change(content, rng)
        file.write_bytes(content)

    return mutate


JUNK: tuple[Any, ...] = (None, True, -1, 0, 1e308, float("nan"), 2**70, "", "x", [], {}, [[]], "[" * 50, {"a": [1]})


def in_json(file: Path, rng: Rng) -> None:
    """Change, rename or remove one value of a JSON file, at any depth."""
    whole = {"": json.loads(file.read_text())}
    places = list(_places(whole))
    holder, key = places[rng.integers(len(places))]
    action = rng.integers(3)
    if action == 0 and isinstance(holder, dict) and holder is not whole:
        holder[f"{key}x"] = holder.pop(key)
    elif action == 1 and holder is not whole:
        del holder[key]
    else:
        holder[key] = JUNK[rng.integers(len(JUNK))]
    file.write_text(json.dumps(whole[""]))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def in_hdf5(file: Path, rng: Rng) -> None:
    """Change one array or attribute of an HDF5 file, with the library that wrote it."""
    with h5py.File(file, "a") as root:
        names: list[str] = []
        root.visititems(lambda name, member: names.append(name) if isinstance(member, h5py.Dataset) else None)
        name = names[rng.integers(len(names))]
        array = np.asarray(root[name][()])
        del root[name]
        changed = _changed(array, rng)
        if changed is not None:
            root[name] = changed


def _changed(array: Any, rng: Rng) -> Any:
    """Another array, or None."""
    flat = np.array(array, np.float64 if array.dtype.kind in "fiub" else array.dtype).reshape(-1)
    if flat.size and flat.dtype.kind == "f":
        flat[rng.integers(flat.size)] = [np.nan, np.inf, -np.inf, 1e300, -2.5, 0, 1][rng.integers(7)]
    one_more = np.concatenate([flat, flat[:1]])
    kinds = [flat.reshape(array.shape), one_more, flat[:-1], flat[:0], flat.astype("S4"), flat.sum(), flat[None, None]]
    choice = rng.integers(len(kinds) + 1)
    return None if choice == len(kinds) else kinds[choice]


def remove(file: Path, rng: Rng) -> None:
    """The file is not there, is empty, or is a folder."""
    file.unlink()
    if rng.integers(3) == 0:
        file.mkdir()
    elif rng.integers(2):
        file.write_bytes(b"")


def exchange(file: Path, rng: Rng) -> None:
    """The file holds what another one of the folder holds."""
    others = [other for other in _files(_top(file)) if other != file]
    if others:
        shutil.copyfile(others[rng.integers(len(others))], file)


def _top(file: Path) -> Path:
    return next(parent for parent in file.parents if parent.name == "mutated")


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


BYTES = [in_bytes(change) for change in (flip_bits, overwrite, cut, insert, swap_blocks, large_number)]
WHOLE = [remove, exchange]


def mutate(folder: Path, rng: Rng) -> None:
    """Change one file of a folder in one way; small structured files as often as large ones."""
    files = _files(folder)
    file = files[rng.integers(len(files))]
    structured = {".json": [in_json] * 6, ".h5": [in_hdf5] * 4, ".hdf5": [in_hdf5] * 4}.get(file.suffix, [])
    ways = [*BYTES, *structured, *WHOLE]
    ways[rng.integers(len(ways))](file, rng)


def outcome(form: Format, folder: Path, expected: str) -> tuple[str, str]:
    """What loading gives, and a traceback."""
    try:
        names = {expected: "equal", FELL_BACK: "fell back"}
        return names.get(form.load(folder), "different"), ""
    except UserError as error:
        return "refused", str(error)
    except Exception:  # whatever comes is what is counted
        return "traceback", traceback.format_exc()


def work(name: str, sound: Path, seed: int, connection: Connection) -> None:
    """Mutate and load, one number after the other, until there are no more."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    form, expected = FORMATS[name], FORMATS[name].load(sound)
    while (number := connection.recv()) is not None:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "mutated"
            shutil.copytree(sound, folder)
            mutate(folder, np.random.default_rng((seed, number)))
            connection.send(outcome(form, folder, expected))


class Worker:
    """A process that loads mutated folders, started anew when it dies or hangs."""

    def __init__(self, name: str, sound: Path, seed: int, limit: float) -> None:
        self._arguments, self._limit = (name, sound, seed), limit
        self._start()

    def _start(self) -> None:
        self._connection, other = multiprocessing.Pipe()
        self._process = multiprocessing.Process(target=work, args=(*self._arguments, other), daemon=True)
        self._process.start()
        other.close()

    def outcome(self, number: int) -> tuple[str, str]:
        """What comes of a mutation."""
        self._connection.send(number)
        try:
            if self._connection.poll(self._limit):
                found: tuple[str, str] = self._connection.recv()
                return found
            self.close()
            result = ("hang", f"more than {self._limit:.0f} s")
        except (EOFError, ConnectionResetError):
            self._process.join()
            result = ("crash", f"the process ended with status {self._process.exitcode}")
        self._start()
        return result

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def fuzz(name: str, numbers: range, seed: int, limit: float) -> Counter[str]:
    """Mutate one format, print what should not be, and count."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        FORMATS[name].make(Path(folder))
        worker = Worker(name, Path(folder), seed, limit)
        for number in numbers:
            result, text = worker.outcome(number)
            counts[result] += 1
            faulty = result in {"traceback", "hang", "crash"} or (result == "different" and FORMATS[name].ours)
            if len(numbers) == 1 or (faulty and counts[result] <= SHOWN):
                print(f"{name}, seed {seed}, mutation {number}: {result}\n{text}")
        worker.close()
    return counts


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=200, help="of each format")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument(
        "--limit", type=float, default=30, help="seconds after which a load hangs; more on a busy machine"
    )
    parser.add_argument("--only", type=int, default=None, help="number of one mutation")
    options = parser.parse_args()
    seed = secrets.randbelow(10**9) if options.seed is None else options.seed
    numbers = range(options.mutations) if options.only is None else range(options.only, options.only + 1)
    print(f"seed {seed}, {len(numbers)} mutations of each format")
    print(f"{'format':16s}" + "".join(f"{name:>11s}" for name in OUTCOMES))
    faults = 0
    for name in options.formats:
        form = FORMATS[name]
        if form.needs and importlib.util.find_spec(form.needs) is None:
            print(f"{name:16s} left out: {form.needs} is not installed")
            continue
        counts = fuzz(name, numbers, seed, options.limit)
        print(f"{name:16s}" + "".join(f"{counts[outcome]:>11d}" for outcome in OUTCOMES), flush=True)
        faults += counts["traceback"] + counts["hang"] + (counts["different"] if form.ours else 0)
    return int(faults > 0)


if __name__ == "__main__":
    raise SystemExit(main())
