"""Spaces as Minari's metadata describe them, and Dict observations laid side by side in the order of their space."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from eva_rl.data.formats.checks import ActionBounds, LayoutError, Source
from eva_rl.errors import UserError

INDEX = "_index_"
"""How Minari's HDF5 files name the parts of a Tuple."""
MAX_DEPTH = 8

Layout: TypeAlias = "Mapping[str, Layout] | None"
"""Parts of a Dict or Tuple space in their order; None for a Box."""
Tree: TypeAlias = "NDArray[Any] | Mapping[str, Tree]"


@dataclass(frozen=True)
class Spaces:
    """What a data set's metadata say of its spaces.

    Attributes:
        observations: Parts of the observations in their order; None for a Box or where nothing is said.
        actions: The same of the actions.
        bounds: Lowest and highest action, each (act,); None where nothing is said.
    """

    observations: Layout = None
    actions: Layout = None
    bounds: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None

    def action_bounds(self, given: ActionBounds | None, outside: str) -> ActionBounds | None:
        """The task's own bounds where they are given, else those of the data."""
        if given is not None or self.bounds is None:
            return given
        return ActionBounds(*self.bounds, outside)


def read_spaces(source: Source, metadata: Mapping[str, Any], keys: tuple[str, ...] = ()) -> Spaces:
    """Spaces of a data set.

    Args:
        source: The metadata file, for messages.
        metadata: Its content; each space is JSON in a string.
        keys: The parts of Dict observations that are wanted; none for all. Others may be of any kind.

    Raises:
        UserError: The metadata are damaged, or a space is not made of Boxes.
    """
    found: dict[str, Any] = {}
    for key in ("observation_space", "action_space"):
        if key in metadata:
            with (source / key).reading():
                found[key] = json.loads(metadata[key])
                if key == "observation_space" and keys:
                    found[key] = _with_parts(found[key], {name.partition("/")[0] for name in keys})
                check_space(source / key, found[key])
    bounds = None
    if "action_space" in found:
        with (source / "action_space").reading():
            low, high = (np.concatenate(_sides(found["action_space"], side)) for side in ("low", "high"))
        if np.isnan(low).any() or np.isnan(high).any() or (low > high).any():
            raise UserError(f"{source / 'action_space'} has bounds {low} to {high}, expected low <= high.")
        bounds = (low, high)
    return Spaces(_layout(found.get("observation_space")), _layout(found.get("action_space")), bounds)


def check_space(source: Source, space: Any, depth: int = MAX_DEPTH) -> None:
    """Raise unless a space is a Box, or a Dict or Tuple of such.

    Raises:
        UserError: Naming the space.
    """
    kind, parts = space["type"], {}
    if kind in {"Dict", "Tuple"} and depth > 0:
        parts = _parts(space)
        for name, inner in parts.items():
            check_space(source / name, inner, depth - 1)
    image = kind == "Box" and len(space["shape"]) > 1 and space["dtype"] == "uint8"
    if image or (kind != "Box" and not parts):
        raise UserError(
            f"{source} is {kind} {space.get('dtype', '')} {space.get('shape', '')}. A Decision Transformer takes "
            "Box observations and actions, or Dicts and Tuples of them, and no images. Name another data set, or those "
            "parts of a Dict that are Boxes: ?keys=a,b."
        )


def _with_parts(space: Any, wanted: set[str]) -> Any:
    """A Dict or a Tuple of those of its parts that are wanted, where it has them all."""
    if space["type"] not in {"Dict", "Tuple"} or not wanted <= _parts(space).keys():
        return space
    return {"type": "Dict", "subspaces": {name: part for name, part in _parts(space).items() if name in wanted}}


def _parts(space: Any) -> dict[str, Any]:
    inner = space["subspaces"]
    return dict(inner) if space["type"] == "Dict" else {f"{INDEX}{i}": part for i, part in enumerate(inner)}


def _layout(space: Any) -> Layout:
    if space is None or space["type"] == "Box":
        return None
    return {name: _layout(inner) for name, inner in _parts(space).items()}


def _sides(space: Any, side: str) -> list[NDArray[np.float32]]:
    if space["type"] != "Box":
        return [array for inner in _parts(space).values() for array in _sides(inner, side)]
    return [np.broadcast_to(np.asarray(space[side], np.float32), tuple(space["shape"])).reshape(-1)]


def leaf_names(layout: Layout, prefix: str = "", keys: tuple[str, ...] = ()) -> list[str]:
    """Names of the parts of a layout in the order in which they are laid side by side.

    Args:
        layout: The parts, as deep as they go.
        prefix: Of the names.
        keys: The parts that are wanted, ``outer/inner`` for a nested one; none for all.
    """
    if layout is None:
        return [prefix] if prefix else []
    return [
        leaf
        for name in keys or layout
        for leaf in leaf_names(_inside(layout, name), f"{prefix}/{name}" if prefix else name)
    ]


def _inside(tree: Any, path: str) -> Any:
    """A part, ``outer/inner`` for a nested one; None where there is none."""
    for name in path.split("/"):
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree


def flattened(source: Source, tree: Tree, layout: Layout, keys: tuple[str, ...] = ()) -> NDArray[Any]:
    """A Box as it is; a Dict or a Tuple as its parts side by side, (T, dim).

    Args:
        source: Where it lies, for messages.
        tree: The array, or the parts by name.
        layout: The parts in their order; None where that is unknown.
        keys: The parts that are wanted, in their order; none for all.

    Raises:
        UserError: The order is unknown, the parts are others than the layout's, or they differ in length.
    """
    if not isinstance(tree, Mapping):
        if layout is not None:
            raise UserError(f"{source} is one array, expected {', '.join(layout)} as the space in the metadata says.")
        if keys:
            raise one_array(source, keys)
        return tree
    names = _ordered(source, tree, layout, keys)
    inner = {name: _inside(layout, name) for name in names}
    parts = [(source / name).floats(flattened(source / name, _inside(tree, name), inner[name])) for name in names]
    for name, part in zip(names, parts, strict=True):
        (source / name).check_rows(len(part), len(parts[0]), f"{names[0]} has as many")
    return np.concatenate(parts, axis=1)


def one_array(source: Source, keys: tuple[str, ...]) -> LayoutError:
    """What to raise where parts of observations are asked for that have none."""
    return LayoutError(f"?keys={','.join(keys)}: {source} is one array, without parts. Leave it out.")


def _ordered(source: Source, tree: Mapping[str, Any], layout: Layout, keys: tuple[str, ...]) -> list[str]:
    """Names of the parts in the order asked for, else in that of the space, else in the only order that there is."""
    held = list(tree)
    if keys:
        for key in keys:
            if _inside(tree, key) is None:
                raise source.missing(key, "each part that ?keys= names", held)
        return list(keys)
    if layout is not None:
        if set(layout) != set(held):
            raise UserError(f"{source} holds {', '.join(sorted(held))}; the space in the metadata has {list(layout)}.")
        return list(layout)
    numbers = [name.removeprefix(INDEX) for name in held]
    if held and all(number.isdecimal() and number != name for number, name in zip(numbers, held, strict=True)):
        return sorted(held, key=lambda name: int(name.removeprefix(INDEX)))
    if len(held) == 1:
        return held
    if not held:
        raise UserError(f"{source} is an empty group, expected numbers.")
    raise LayoutError(
        f"{source} has the parts {', '.join(sorted(held))}, and nothing says in which order a policy sees them: the "
        "file has no metadata.json with the observation space beside it. Say it in the source, for instance "
        f"?keys={','.join(sorted(held))}, in the order of the environment's own space."
    )
