"""Where trajectories are written: our own file, a store, or a Minari data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from eva_rl.data import Trajectories, save_minari, write_episodes, write_store
from eva_rl.data.formats.checks import ActionBounds
from eva_rl.data.formats.minari import is_minari_id, minari_root
from eva_rl.envs import env_spec, reference_scores
from eva_rl.envs.registry import is_known
from eva_rl.errors import UserError
from eva_rl.files import check_new, expanded

FILE_SUFFIXES = {".h5", ".hdf5"}
MINARI = "minari:"


def check_output(out: str) -> None:
    """Raise unless trajectories can be written there; existing data are not overwritten.

    Args:
        out: ``FILE.h5``, ``minari:ID``, or a folder for a store.

    Raises:
        UserError: Nothing named, it exists, or its folder cannot be written.
    """
    if not out or out == MINARI:
        raise UserError("out= is missing: name a FILE.h5, a minari:NAMESPACE/NAME-v0, or a folder for a store.")
    in_minari = out.startswith(MINARI)
    if in_minari and not is_minari_id(out.removeprefix(MINARI)):
        raise UserError(f"out={out}: expected an id such as minari:mine/push-v0, of letters, digits, _ and -.")
    if kind := next((kind for kind in ("d4rl:", "trajectories:") if out.startswith(kind)), ""):
        raise UserError(f"out={out}: {kind} names how data are read. Type out=FILE.h5, with a name of your own.")
    path = minari_root() / out.removeprefix(MINARI) if in_minari else expanded(out)
    check_new(path)
    if path.suffix and path.suffix not in FILE_SUFFIXES and not in_minari:
        raise UserError(f"out={out}: expected FILE.h5, minari:NAMESPACE/NAME-v0, or a folder without a suffix.")


def write_output(out: str, data: Trajectories, about: Mapping[str, Any] | None = None) -> str:
    """Write trajectories.

    Args:
        out: As :func:`check_output` takes it.
        data: What to write.
        about: Attributes of a file, or minari's ``algorithm_name``, ``author``, ``description``, ...

    Returns:
        The source by which they are read again.
    """
    check_output(out)
    if out.startswith(MINARI):
        save_minari(
            data,
            out.removeprefix(MINARI),
            action_bounds=_action_bounds(data.env_id),
            references=data_references(data),
            **(about or {}),
        )
        return out
    path = expanded(out)
    if path.suffix in FILE_SUFFIXES:
        write_episodes(path, data, about)
    else:
        write_store(path, [data], data.source)
    return str(path)


def _action_bounds(env_id: str) -> ActionBounds | None:
    """Bounds of a task that is known here, by a name that is a file's."""
    if not is_known(env_id):
        return None
    spec = env_spec(env_id)
    return ActionBounds(np.array(spec.action_low, np.float32), np.array(spec.action_high, np.float32))


def data_references(data: Trajectories) -> tuple[float, float] | None:
    """Reference returns: the data set's own where it has them, else those of its name or its task."""
    own = [data.metadata.get(key) for key in ("ref_min_score", "ref_max_score")]
    if own[0] is not None and own[1] is not None:
        return float(own[0]), float(own[1])
    by_name: tuple[float, float] | None = reference_scores(data.metadata.get("dataset", ""))
    return by_name or reference_scores(data.env_id)
