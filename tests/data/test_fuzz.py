"""Mutated files: one UserError, or exactly the data that were meant; never anything else."""

from __future__ import annotations

import pickle
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eva_rl.data import Trajectories, load_dataset, write_episodes
from eva_rl.errors import UserError
from tests.data.making import differences, random_trajectories, table, write_h5

QUICK = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
REQUIRED = ["observations", "actions", "rewards", "terminals"]
KEYS = [*REQUIRED, "timeouts", "next_observations"]


def load(path: Path, source: str, **options: Any) -> Trajectories | None:
    """The data, or None where they are refused; a message always names the file."""
    try:
        return load_dataset(source, **options)
    except UserError as error:
        if str(path) not in str(error):
            raise
        return None


def expected_rows(arrays: dict[str, np.ndarray]) -> list[list[float]]:
    """Rewards of each episode, read row by row as D4RL's documentation says: the oracle."""
    episodes, current = [], []
    columns = (arrays[key].reshape(-1) for key in ("rewards", "terminals", "timeouts"))
    for reward, terminal, timeout in zip(*columns, strict=True):
        current.append(float(reward))
        if terminal or timeout:
            episodes.append(current)
            current = []
    return episodes or [current]  # a file without any end is one episode


@st.composite
def flag_tables(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Sound tables with any ends, any shape of vectors and several types."""
    rows = draw(st.integers(1, 30))
    flags = [np.array(draw(st.lists(st.booleans(), min_size=rows, max_size=rows))) for _ in range(2)]
    dtype = draw(st.sampled_from([np.bool_, np.uint8, np.int64, np.float32, np.float64]))
    shape = draw(st.sampled_from([(rows,), (rows, 1)]))
    row = np.arange(rows, dtype=draw(st.sampled_from([np.float32, np.float64, np.int32])))
    return {
        "observations": np.stack([row, row], 1),
        "next_observations": np.stack([row + 100, row], 1),
        "actions": np.zeros((rows, 1)),
        "rewards": row.reshape(shape),
        "terminals": flags[0].astype(dtype).reshape(shape),
        "timeouts": flags[1].astype(dtype),
    }


@QUICK
@given(flag_tables())
def test_sound_tables_are_read_as_the_oracle_says(arrays: dict[str, np.ndarray]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_h5(Path(folder) / "a.hdf5", arrays)
        data = load(path, f"d4rl:{path}")
    expected = expected_rows(arrays)
    assert data is not None
    found = [data.episode(index) for index in range(data.num_episodes)]
    assert [episode.rewards.tolist() for episode in found] == expected
    assert [episode.observations[:-1, 0].tolist() for episode in found] == expected
    assert [episode.observations[-1, 0] for episode in found] == [rewards[-1] + 100 for rewards in expected]


def no_key(draw: st.DrawFn, arrays: dict[str, Any]) -> None:
    del arrays[draw(st.sampled_from(REQUIRED))]


def other_length(draw: st.DrawFn, arrays: dict[str, Any]) -> None:
    key = draw(st.sampled_from(KEYS))
    arrays[key] = np.resize(arrays[key], (draw(st.sampled_from([0, 1, 11, 13, 24])), *arrays[key].shape[1:]))


def not_finite(draw: st.DrawFn, arrays: dict[str, Any]) -> None:
    key = draw(st.sampled_from(KEYS))
    values = arrays[key].astype(np.float64)
    values[draw(st.integers(0, 11))] = draw(st.sampled_from([np.nan, np.inf, -np.inf, 1e300]))
    arrays[key] = values


def other_type(draw: st.DrawFn, arrays: dict[str, Any]) -> None:
    key = draw(st.sampled_from(KEYS))
    kinds: list[Any] = ["S3", np.complex64, [("x", "f4")], "V5"]
    arrays[key] = np.zeros(arrays[key].shape, draw(st.sampled_from(kinds)))


def other_shape(draw: st.DrawFn, arrays: dict[str, Any]) -> None:
    key = draw(st.sampled_from(["rewards", "terminals", "timeouts"]))
    arrays[key] = np.zeros(draw(st.sampled_from([(), (12, 0), (12, 2), (12, 1, 2), (1, 12)])))


def nothing_in_a_row(draw: st.DrawFn, arrays: dict[str, Any]) -> None:
    arrays[draw(st.sampled_from(["observations", "actions"]))] = np.zeros((12, 0))


def no_flag(draw: st.DrawFn, arrays: dict[str, Any]) -> None:
    key = draw(st.sampled_from(["terminals", "timeouts"]))
    values = arrays[key].astype(np.float64)
    values[draw(st.integers(0, 11))] = draw(st.sampled_from([-1.0, 0.5, 2.0, 255.0]))
    arrays[key] = values


def out_of_bounds(draw: st.DrawFn, arrays: dict[str, Any]) -> None:
    arrays["actions"][draw(st.integers(0, 11))] = draw(st.sampled_from([-1.1, 1.01, 100.0]))


MUTATIONS = [no_key, other_length, not_finite, other_type, other_shape, nothing_in_a_row, no_flag, out_of_bounds]


@QUICK
@given(st.data(), st.sampled_from(MUTATIONS))
def test_wrong_tables_are_refused(data: st.DataObject, mutate: Any) -> None:
    arrays = table()
    mutate(data.draw, arrays)
    with tempfile.TemporaryDirectory() as folder:
        path = write_h5(Path(folder) / "hopper_medium-v2.hdf5", arrays)
        assert load(path, f"d4rl:{path}") is None


def bytes_of(folder: Path, kind: str) -> bytes:
    """A sound file of each kind."""
    path = folder / "sound.h5"
    if kind == "d4rl":
        write_h5(path, table())
    elif kind == "episodes":
        write_episodes(path, random_trajectories())
    elif kind == "pickle":
        path.write_bytes(pickle.dumps([{"observations": np.eye(3), "actions": np.eye(3), "rewards": np.ones(3)}] * 2))
    else:
        with path.open("wb") as file:
            np.savez(file, observations=np.eye(3), actions=np.eye(3), rewards=np.ones(3), dones=np.array([0, 0, 1]))
    return path.read_bytes()


FILES = {"d4rl": "a.hdf5", "episodes": "a.h5", "npz": "a.npz", "pickle": "a.pkl"}
SUMMED = {"episodes", "npz"}
"""Formats with checksums: a flipped bit is seen."""


@dataclass(frozen=True)
class Sound:
    """A sound file and what it means."""

    kind: str
    content: bytes = field(repr=False)
    data: Trajectories = field(repr=False)


@pytest.fixture(scope="module", params=FILES)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    folder = tmp_path_factory.mktemp("sound")
    content = bytes_of(folder, request.param)
    path = folder / FILES[request.param]
    path.write_bytes(content)
    data = load(path, source_of(request.param, path), allow_pickle=True)
    assert data is not None
    return Sound(request.param, content, data)


def source_of(kind: str, path: Path) -> str:
    return f"{'d4rl' if kind == 'd4rl' else 'trajectories'}:{path}"


def load_bytes(kind: str, content: bytes) -> Trajectories | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILES[kind]
        path.write_bytes(content)
        return load(path, source_of(kind, path), allow_pickle=True)


@QUICK
@given(st.data())
def test_cut_files(sound: Sound, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(sound.content) - 1))
    assert load_bytes(sound.kind, sound.content[:cut]) is None


@QUICK
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=6))
def test_changed_bytes(sound: Sound, changes: list[tuple[int, int]]) -> None:
    changed = bytearray(sound.content)
    for place, bits in changes:
        changed[place % len(changed)] ^= bits
    data = load_bytes(sound.kind, bytes(changed))
    if data is None:
        return
    assert np.isfinite(data.observations).all()
    assert np.isfinite(data.rewards).all()
    assert (data.lengths > 0).all()
    if sound.kind in SUMMED:
        assert differences(data, sound.data) == []
