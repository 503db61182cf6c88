"""The file formats that ``benchmarks/fuzz/mutate.py`` mutates: how to make a sound example of each, and how to load it.

A format of one's own is one more entry of :data:`FORMATS`.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from eva_rl.data import Episode, Trajectories, load_dataset, save_minari, write_episodes, write_store
from eva_rl.data.trajectories import COLUMNS

FELL_BACK = "an earlier state, as it was"
"""What a format with several states gives where the last one is damaged."""


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        make: Writes a sound example below an empty folder, the same each time.
        load: Loads what lies below the folder as a user would, and returns a text that is equal where everything that
            was loaded is, or :data:`FELL_BACK`; raises ``UserError`` where it refuses.
        ours: Whether we write it: then whatever loads has to be equal.
        needs: Package without which it is left out, "" for none.
    """

    make: Callable[[Path], None]
    load: Callable[[Path], str]
    ours: bool = False
    needs: str = ""


def trajectories() -> Trajectories:
    """Some episodes, the same each time."""
    rng = np.random.default_rng(0)
    episodes = []
    for index, steps in enumerate((5, 1, 8)):
        ends = np.arange(steps) == steps - 1
        episodes.append(
            Episode(
                observations=rng.normal(size=(steps + 1, 4)).astype(np.float32),
                actions=rng.uniform(-1, 1, (steps, 2)).astype(np.float32),
                rewards=rng.normal(size=steps).astype(np.float32),
                terminations=ends & (index == 0),
                truncations=ends & (index != 0),
                successes=ends,
                target_actions=rng.uniform(-1, 1, (steps, 2)).astype(np.float32),
            )
        )
    return Trajectories.from_episodes(episodes, env_id="Pendulum-v1", source="fuzz", metadata={"dataset": "fuzz"})


def _table() -> dict[str, Any]:
    data = trajectories()
    following = np.concatenate([data.observations[1:], data.final_observations[-1:]])
    following[data.offsets[1:] - 1] = data.final_observations
    arrays = {name: getattr(data, name) for name in ("observations", "actions", "rewards")}
    return arrays | {"terminals": data.terminations, "timeouts": data.truncations, "next_observations": following}


def _make_d4rl(folder: Path) -> None:
    with h5py.File(folder / "hopper_medium-v2.hdf5", "w") as file:
        for name, array in _table().items():
            file.create_dataset(name, data=array, compression="gzip" if name == "observations" else None)


def _make_minari(folder: Path, data_format: str) -> None:
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    plain = replace(trajectories(), successes=None, target_actions=None)  # arrow takes infos of T + 1 rows alone
    save_minari(plain, "fuzz-v0", data_format=data_format)


def _make_npz(folder: Path) -> None:
    np.savez_compressed(folder / "a.npz", **_table())


def _make_pickle(folder: Path) -> None:
    data = trajectories()
    names = ("observations", "actions", "rewards", "terminations")
    episodes = [vars(data.episode(index)) for index in range(data.num_episodes)]
    (folder / "a.pkl").write_bytes(pickle.dumps([{name: episode[name] for name in names} for episode in episodes]))


def _make_d3rlpy(folder: Path) -> None:
    data = trajectories()
    with h5py.File(folder / "buffer.h5", "w") as file:
        file["columns"], file["num_episodes"] = ["observations", "actions", "rewards", "terminated"], 3
        for index in range(data.num_episodes):
            episode = data.episode(index)
            file[f"observations_{index}"], file[f"actions_{index}"] = episode.observations[:-1], episode.actions
            file[f"rewards_{index}"], file[f"terminated_{index}"] = episode.rewards[:, None], index == 0


def _make_robomimic(folder: Path) -> None:
    data = trajectories()
    with h5py.File(folder / "demos.hdf5", "w") as file:
        for index in range(data.num_episodes):
            episode = data.episode(index)
            group = file.create_group(f"data/demo_{index}")
            group["obs/state"], group["next_obs/state"] = episode.observations[:-1], episode.observations[1:]
            group["actions"], group["rewards"], group["dones"] = episode.actions, episode.rewards, episode.terminations


def _load(source: str) -> Callable[[Path], str]:
    """Loads ``source``, in which {} stands for the folder."""

    def load(folder: Path) -> str:
        os.environ["MINARI_DATASETS_PATH"] = str(folder)
        data = load_dataset(source.format(folder), allow_pickle=True)
        digest = hashlib.sha256(repr((data.env_id, sorted(data.metadata.items()))).encode())
        for name in ("offsets", *COLUMNS):
            array = getattr(data, name)
            digest.update(f"{name}|{None if array is None else array.shape}|".encode())
            digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    return load


FORMATS: dict[str, Format] = {
    "episode file": Format(lambda folder: write_episodes(folder / "a.h5", trajectories()), _load("{}/a.h5"), ours=True),
    "store": Format(
        lambda folder: write_store(folder / "store", [trajectories()], "fuzz"), _load("{}/store"), ours=True
    ),
    "D4RL": Format(_make_d4rl, _load("d4rl:{}/hopper_medium-v2.hdf5?actions=keep")),
    "Minari HDF5": Format(lambda folder: _make_minari(folder, "hdf5"), _load("minari:fuzz-v0")),
    "Minari arrow": Format(lambda folder: _make_minari(folder, "arrow"), _load("minari:fuzz-v0"), needs="pyarrow"),
    "npz": Format(_make_npz, _load("{}/a.npz")),
    "pickle": Format(_make_pickle, _load("{}/a.pkl")),
    "d3rlpy": Format(_make_d3rlpy, _load("{}/buffer.h5")),
    "robomimic": Format(_make_robomimic, _load("{}/demos.hdf5")),
}
"""By name."""
