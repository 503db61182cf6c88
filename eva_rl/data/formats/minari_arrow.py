"""Minari's Arrow and Parquet data sets: a folder an episode, in which every column has a row an observation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eva_rl.data.formats.checks import Source, check_regular_file
from eva_rl.data.formats.episode_folder import Read
from eva_rl.data.formats.episodes import Arrays
from eva_rl.data.formats.minari_file import READ_INFOS, REQUIRED
from eva_rl.data.formats.spaces import INDEX, Layout, Spaces, Tree, flattened
from eva_rl.errors import UserError, counted
from eva_rl.files import read_json

FORMATS = ("arrow", "parquet")


def arrow_episodes(
    folder: Path, metadata: Mapping[str, Any], spaces: Spaces, keys: tuple[str, ...]
) -> Iterator[tuple[Source, Read]]:
    """Name of each episode, for messages, and what reads its arrays.

    Args:
        folder: With one folder for each episode.
        metadata: Of the data set.
        spaces: What they say of its spaces.
        keys: Parts of Dict observations that are wanted; none for all.

    Raises:
        UserError: pyarrow is not installed, the format is another, or the number of episodes is not said.
    """
    kind = metadata.get("data_format")
    if kind not in FORMATS:
        raise UserError(f"{folder} holds data of the format {kind!r}, expected hdf5, {' or '.join(FORMATS)}.")
    try:
        import pyarrow.dataset  # noqa: F401 - said here once, instead of in every episode
    except ImportError as error:
        raise UserError(f'{folder}: {error}. Install it with `pip install "minari[arrow]"`.') from error
    total = metadata.get("total_episodes")
    if not isinstance(total, int) or total < 1:
        raise UserError(f"{folder / 'metadata.json'}: total_episodes is {total!r}, expected a number of episodes.")
    for index in range(total):
        source = Source(folder, f"episode_{index}")
        yield source, partial(_episode, source, folder / str(index), str(kind), spaces, keys)


def _episode(source: Source, folder: Path, kind: str, spaces: Spaces, keys: tuple[str, ...]) -> Arrays:
    table = _table(source, folder, kind)
    for key in REQUIRED:
        if key not in table.column_names:
            raise source.missing(key, ", ".join(REQUIRED), table.column_names)
    with source.reading():
        trees = {key: _tree(table[key].combine_chunks()) for key in REQUIRED}
        infos = _tree(table["infos"].combine_chunks()) if "infos" in table.column_names else {}
    steps = _steps(source, folder, len(table))
    raw: dict[str, Any] = {name: np.asarray(trees[name])[:steps] for name in REQUIRED[2:]}
    for key, layout, wanted in (("observations", spaces.observations, keys), ("actions", spaces.actions, ())):
        raw[key] = flattened(source / key, _as_in_hdf5(trees[key], layout), layout, wanted)
    raw["actions"] = raw["actions"][:steps]
    for key, name in READ_INFOS.items():
        found = infos.get(key) if isinstance(infos, Mapping) else None
        if isinstance(found, np.ndarray):
            raw[name] = found[len(found) - steps :]
    return raw


def _table(source: Source, folder: Path, kind: str) -> Any:
    from pyarrow import dataset

    with source.reading():
        files = sorted(file for file in folder.iterdir() if file.suffix == f".{kind}")
    for file in files:
        check_regular_file(file)
    if not files:
        raise UserError(f"{source}: {folder} holds no .{kind} file. Copy or download the data set again.")
    with source.reading():
        return dataset.dataset([str(file) for file in files], format=kind).to_table()


def _steps(source: Source, folder: Path, rows: int) -> int:
    """Env steps, which the episode's own metadata say; minari fills the columns up to the number of observations."""
    file = folder / "metadata.json"
    if not file.is_file():
        return rows - 1
    with source.reading():
        said = read_json(file)
        steps = said["total_steps"] if isinstance(said, dict) and "total_steps" in said else rows - 1
        if not 0 < int(steps) <= rows:
            raise UserError(
                f"{source / 'metadata.json'} says {counted(int(steps), 'env step')}, there are {rows} rows."
            )
    return int(steps)


def _tree(array: Any) -> Tree:
    """A struct as its fields, a column of lists as an array."""
    fields = [array.type.field(i).name for i in range(array.type.num_fields)] if _is_struct(array) else []
    if fields:
        return {name: _tree(array.field(name)) for name in fields}
    values = array.to_numpy(zero_copy_only=False)
    return np.stack(list(values)) if values.dtype == object and len(values) else np.asarray(values)


def _is_struct(array: Any) -> bool:
    return str(array.type).startswith("struct")


def _as_in_hdf5(tree: Tree, layout: Layout) -> Tree:
    """Parts of a Tuple are called 0, 1, ... here; the layout calls them as HDF5 files do."""
    if not isinstance(tree, Mapping) or layout is None:
        return tree
    is_tuple = all(name.startswith(INDEX) for name in layout) and not set(layout) <= set(tree)
    named = {f"{INDEX}{name}" if is_tuple else name: inner for name, inner in tree.items()}
    return {name: _as_in_hdf5(inner, layout.get(name)) for name, inner in named.items()}
