"""Minari data sets: read with h5py and json alone, saved through minari itself."""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

from eva_rl.data.formats.checks import ActionBounds, Source, check_regular_file
from eva_rl.data.formats.episode_folder import checked_parts
from eva_rl.data.formats.episodes import ReadOptions
from eva_rl.data.formats.minari_arrow import arrow_episodes
from eva_rl.data.formats.minari_file import iterate_episodes
from eva_rl.data.formats.spaces import Spaces, leaf_names, read_spaces
from eva_rl.data.trajectories import OBSERVATION_KEYS, Trajectories
from eva_rl.errors import UnknownNameError, UserError
from eva_rl.files import expanded, read_json

log = logging.getLogger(__name__)

REFERENCES = ("ref_min_score", "ref_max_score")


def minari_root() -> Path:
    """Where Minari keeps data sets: ``MINARI_DATASETS_PATH`` or ``~/.minari/datasets``."""
    return expanded(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets")


def is_minari_id(dataset_id: str) -> bool:
    """Whether Minari takes this id, and it names a version."""
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError):  # the latter without a version
        return False
    return True


def local_minari_sets() -> dict[str, dict[str, Any]]:
    """Metadata of each data set below :func:`minari_root`, by id; damaged ones are left out with a warning."""
    root, found = minari_root(), {}
    for file in sorted(root.rglob("data/metadata.json")):
        try:
            found[file.parent.parent.relative_to(root).as_posix()] = _metadata(file.parent)
        except UserError as error:
            log.warning("%s", error)
    return found


def minari_folder(dataset_id: str) -> Path:
    """The ``data`` folder of a data set; one that is not there is downloaded through minari.

    Raises:
        UserError: Not there, and cannot be downloaded.
    """
    folder = minari_root() / dataset_id / "data"
    with Source(f"minari:{dataset_id}").reading():
        there = folder.is_dir()
    if not there:
        _download(dataset_id)
    return folder


def _download(dataset_id: str) -> None:
    if not is_minari_id(dataset_id):
        here = f" What is on this disk goes without minari: data={dataset_id}." * Path(dataset_id).exists()
        raise UserError(f"minari:{dataset_id}: expected an id such as minari:mujoco/hopper/expert-v0.{here}")
    import minari

    log.info("minari:%s is not below %s: downloading it.", dataset_id, minari_root())
    try:
        minari.download_dataset(dataset_id)
    except Exception as error:  # whatever a remote's client raises: it differs by MINARI_REMOTE
        local = local_minari_sets()
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        hint = (
            f"It is not below {minari_root()}, and the download failed ({reason}). On a machine with a network: "
            f"minari download {dataset_id}; then copy it there, or set MINARI_DATASETS_PATH."
        )
        raise UnknownNameError("Minari data set on this machine", dataset_id, local, hint) from error
    if not (minari_root() / dataset_id / "data").is_dir():
        raise UserError(f"minari downloaded nothing for {dataset_id}. Type `minari list remote` for the ids.")


METADATA = "metadata.json"


def _metadata(folder: Path) -> dict[str, Any]:
    file = folder / METADATA
    check_regular_file(file)
    with Source(file).reading():  # json's recursion has a limit, which is no error of JSON
        content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, expected a JSON object.")
    return content


def minari_data_folder(path: Path) -> Path | None:
    """The folder with the metadata of a data set that a path names: itself, or the ``data`` folder in it."""
    return next((folder for folder in (path, path / "data") if (folder / METADATA).is_file()), None)


def iterate_minari(folder: Path, name: str, options: ReadOptions) -> Iterator[Trajectories]:
    """Read a data set part by part.

    Args:
        folder: The ``data`` folder, with ``metadata.json``.
        name: What to call the data, such as ``D4RL/door/human-v2``.
        options: How to read them; without bounds, those of the action space are taken.

    Yields:
        Some whole episodes each.

    Raises:
        UserError: Not there, damaged, or with spaces that are not made of Boxes.
    """
    metadata = _metadata(folder)
    spaces = read_spaces(Source(folder / METADATA), metadata, options.keys)
    options = replace(options, bounds=spaces.action_bounds(options.bounds, options.outside))
    origin = {"env_id": _env_id(metadata), "source": f"minari:{name}", "dataset": name}
    origin |= {key: str(metadata[key]) for key in REFERENCES if isinstance(metadata.get(key), int | float)}
    if spaces.observations is not None:
        origin[OBSERVATION_KEYS] = ",".join(leaf_names(spaces.observations, keys=options.keys))
    elif isinstance(metadata.get(OBSERVATION_KEYS), str):
        origin[OBSERVATION_KEYS] = metadata[OBSERVATION_KEYS]
    if metadata.get("data_format", "hdf5") == "hdf5":
        yield from iterate_episodes(folder / "main_data.hdf5", options, spaces, origin)
    else:
        yield from _iterate_arrow(folder, metadata, options, (spaces, origin))


def _iterate_arrow(
    folder: Path, metadata: Mapping[str, Any], options: ReadOptions, said: tuple[Spaces, dict[str, str]]
) -> Iterator[Trajectories]:
    if not {"observation_space", "action_space"} <= metadata.keys():
        raise Source(folder / METADATA).missing("observation_space", "both spaces of the data set", list(metadata))
    spaces, origin = said
    episodes = arrow_episodes(folder, metadata, spaces, options.keys)
    for part in checked_parts(str(folder), episodes, options):
        own = {key: value for key, value in origin.items() if key not in {"env_id", "source"}}
        yield replace(part, env_id=origin["env_id"], source=origin["source"], metadata=own)


def _env_id(metadata: Mapping[str, Any]) -> str:
    if isinstance(metadata.get("env_id"), str):
        return str(metadata["env_id"])
    try:
        spec = json.loads(metadata.get("env_spec") or "{}")
    except (TypeError, ValueError, RecursionError):
        return ""
    return str(spec.get("id", "")) if isinstance(spec, dict) else ""


def save_minari(
    trajectories: Trajectories,
    dataset_id: str,
    *,
    action_bounds: ActionBounds | None = None,
    references: tuple[float, float] | None = None,
    **about: Any,
) -> Path:
    """Save trajectories as a data set that minari lists and loads.

    Args:
        trajectories: What to save.
        dataset_id: ``(namespace/)name-vN``; it must be new.
        action_bounds: Of the action space; None takes [-1, 1], widened to what the data hold.
        references: Lowest and highest reference return, for minari's normalised score; None takes those that came
            with the data.
        about: ``algorithm_name``, ``author``, ``author_email``, ``code_permalink``, ``description``, as minari takes
            them.

    Returns:
        The folder of the data set.

    Raises:
        UserError: Minari refuses the id, it exists, or the disk is full.
    """
    import minari
    from minari.data_collector import EpisodeBuffer

    if not is_minari_id(dataset_id):
        raise UserError(f"minari:{dataset_id} could not be saved. Ids look like mine/push-v0.")
    folder = minari_root() / dataset_id
    if folder.exists():
        raise UserError(f"{folder} exists and is not overwritten. Name another id, for instance the next version.")
    inner = trajectories.observation_dim
    spec = _gym_spec(trajectories)
    defaults = {"description": f"Converted by eva-rl from {trajectories.source}."}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # minari asks for author, e-mail and permalink, which are optional
            dataset = minari.create_dataset_from_buffers(
                dataset_id,
                (_buffer(EpisodeBuffer, trajectories, index) for index in range(trajectories.num_episodes)),
                env=spec,
                observation_space=Box(-np.inf, np.inf, (inner,), np.float32),
                action_space=_action_space(trajectories, action_bounds),
                **(defaults | about),
            )
            dataset.storage.update_metadata(_extra_metadata(trajectories, references))
    except (OSError, ValueError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"minari:{dataset_id} could not be saved: {error}. Ids look like mine/push-v0.") from error
    except BaseException:  # an interruption too leaves nothing behind
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _buffer(kind: Any, trajectories: Trajectories, index: int) -> Any:
    episode = trajectories.episode(index)
    infos = {"success": episode.successes, "target_actions": episode.target_actions}
    return kind(
        id=index,
        observations=episode.observations,
        actions=episode.actions,
        rewards=episode.rewards,
        terminations=episode.terminations,
        truncations=episode.truncations,
        infos={key: value for key, value in infos.items() if value is not None} or None,
    )


def _gym_spec(trajectories: Trajectories) -> Any:
    """Gymnasium's spec, where it knows the task and the spaces fit; Meta-World's entry points cannot be serialised."""
    if trajectories.env_id not in gym.registry or trajectories.env_id.startswith("Meta-World"):
        return None
    try:
        env = gym.make(trajectories.env_id)
    except Exception:  # whatever its constructor raises, for instance where it needs an argument
        return None
    env.close()
    fits = env.observation_space.shape == (trajectories.observation_dim,)
    return env.spec if fits and env.action_space.shape == (trajectories.action_dim,) else None


def _action_space(trajectories: Trajectories, bounds: ActionBounds | None) -> Box:
    if bounds is None:
        bounds = ActionBounds(np.minimum(-1, trajectories.actions.min(0)), np.maximum(1, trajectories.actions.max(0)))
    shape = (trajectories.action_dim,)
    low, high = (np.broadcast_to(np.asarray(side, np.float32), shape) for side in (bounds.low, bounds.high))
    return Box(low, high, shape, np.float32)


def _extra_metadata(trajectories: Trajectories, references: tuple[float, float] | None) -> dict[str, Any]:
    extra: dict[str, Any] = {"env_id": trajectories.env_id} if trajectories.env_id else {}
    if (parts := trajectories.metadata.get(OBSERVATION_KEYS)) is not None:  # the order of what a Dict held
        extra[OBSERVATION_KEYS] = parts
    known = [trajectories.metadata.get(key) for key in REFERENCES]
    if references is None and None not in known:
        references = (float(str(known[0])), float(str(known[1])))
    return extra | (dict(zip(REFERENCES, references, strict=True)) if references else {})
