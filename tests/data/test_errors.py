"""Every kind of bad file gives one message that names the file, the key and the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from eva_rl.data import load_dataset, write_episodes
from eva_rl.errors import UserError
from tests.data.making import random_trajectories, table, write_h5


def with_value(key: str, row: int, value: float, **arrays: Any) -> dict[str, Any]:
    changed = table(**arrays)
    changed[key] = changed[key].astype(np.float64)
    changed[key][row] = value
    return changed


D4RL = {
    "missing key": (table(actions=None), "actions is missing; expected observations, actions, rewards, terminals"),
    "NaN": (with_value("observations", 5, np.nan), "observations, row 5: nan is not a finite float32"),
    "infinity": (with_value("rewards", 11, -np.inf), "rewards, row 11: -inf is not a finite"),
    "float32 overflow": (with_value("actions", 2, 1e39), r"actions, row 2: 1e\+39 is not a finite"),
    "next NaN": (with_value("next_observations", 6, np.nan), "next_observations, row 6: nan"),
    "short actions": (table(actions=np.zeros((11, 1))), "actions has 11 rows, expected 12"),
    "long timeouts": (table(timeouts=np.zeros(13, bool)), "timeouts has 13 rows, expected 12"),
    "next shape": (
        table(next_observations=np.zeros((12, 3))),
        r"next_observations has shape \(12, 3\), expected \(12, 2\)",
    ),
    "empty": ({k: v[:0] for k, v in table().items()}, "rewards is empty"),
    "text": (table(rewards=np.array([b"x"] * 12)), "rewards holds .S1, expected floating-point numbers"),
    "complex": (table(actions=np.zeros((12, 1), complex)), "actions holds complex128"),
    "scalar": (table(rewards=np.float32(3)), "rewards is a single number"),
    "wide rewards": (table(rewards=np.zeros((12, 2))), r"rewards has shape \(12, 2\), expected \(T,\) or \(T, 1\)"),
    "no numbers": (table(actions=np.zeros((12, 0))), r"actions has shape \(12, 0\), expected at least one number"),
    "flag of 2": (with_value("terminals", 4, 2), "terminals, row 4: 2, expected 0 or 1"),
    "flag of 0.5": (with_value("timeouts", 9, 0.5), "timeouts, row 9: 0.5, expected 0 or 1"),
    "images": (table(observations=np.zeros((12, 4, 4, 3), np.uint8), next_observations=None), "uint8: images, and"),
    "grey images": (table(observations=np.zeros((12, 4, 4), np.uint8), next_observations=None), "uint8: images, and"),
    "group": ({"observations/a": 1}, "observations is missing"),
    "virtual": ({"virtual/a/observations": 1}, r"virtual holds \['a'\]"),
}


@pytest.mark.parametrize("case", D4RL)
def test_d4rl(tmp_path: Path, case: str) -> None:
    arrays, message = D4RL[case]
    path = write_h5(tmp_path / "hopper_medium-v2.hdf5", arrays)
    with pytest.raises(UserError, match=rf"{path}.*{message}"):
        load_dataset(f"d4rl:{path}")


EPISODES = {
    "missing key": ("rewards", None, "episode_1/rewards is missing"),
    "NaN": ("observations", np.full((2, 3), np.nan), "episode_1/observations, row 0: nan"),
    "T observations": ("observations", np.zeros((1, 3)), "episode_1/observations has 1 row, expected 2"),
    "zero length": ("rewards", np.zeros(0), "episode_1/rewards is empty"),
    "other width": (
        "actions",
        np.zeros((1, 5)),
        r"episode_1/actions has shape \(1, 5\), expected \(1, 2\), as wide",
    ),
    "text": ("actions", np.array([[b"a", b"b"]]), "episode_1/actions holds .S1"),
    "target width": ("infos/target_actions", np.zeros((1, 3)), r"episode_1/target_actions has shape \(1, 3\)"),
    "success length": ("infos/success", np.zeros(9), "episode_1/successes has 9 rows, expected 1"),
}


def change(path: Path, key: str, value: Any) -> None:
    with h5py.File(path, "a") as file:
        del file[key]
        if value is not None:
            file[key] = value


@pytest.mark.parametrize("case", EPISODES)
def test_episodes(tmp_path: Path, case: str) -> None:
    key, value, message = EPISODES[case]
    path = tmp_path / "a.h5"
    write_episodes(path, random_trajectories())
    change(path, f"episode_1/{key}", value)
    with pytest.raises(UserError, match=rf"{path}: {message}"):
        load_dataset(str(path))


def test_an_episode_without_steps_that_reports_one_success(tmp_path: Path) -> None:
    nothing = {"observations": np.zeros((1, 3)), "actions": np.zeros((0, 2)), "rewards": np.zeros(0)}
    np.savez(tmp_path / "0.npz", **nothing, success=np.array(True))
    with pytest.raises(UserError, match="rewards is empty: an episode needs at least one env step"):
        load_dataset(f"trajectories:{tmp_path}")


def test_ends_inside_an_episode(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_episodes(path, random_trajectories())
    change(path, "episode_0/terminations", np.array([0, 1, 0, 1], bool))
    with pytest.raises(UserError, match=r"episode_0/terminations, row 1: .* goes on to row 3"):
        load_dataset(str(path))


def test_missing_episode(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_episodes(path, random_trajectories())
    change(path, "episode_2", None)
    with pytest.raises(UserError, match="total_episodes has 2 rows, expected 3"):
        load_dataset(str(path))


@pytest.mark.parametrize("kind", ["d4rl", "trajectories"])
def test_files_that_are_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.hdf5"
    path.write_bytes(b"")
    with pytest.raises(UserError, match=rf"{path}: not readable"):
        load_dataset(f"{kind}:{path}")
    path.write_text("not HDF5 at all" * 100)
    with pytest.raises(UserError, match=rf"{path}: not readable"):
        load_dataset(f"{kind}:{path}")
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=rf"{path} (is a folder|holds no episodes)"):
        load_dataset(f"{kind}:{path}")


def test_unreadable_file(tmp_path: Path) -> None:
    loop = tmp_path / "loop.hdf5"
    path = write_h5(tmp_path / "a.hdf5", table())
    path.chmod(0)
    try:
        path.open("rb").close()
    except PermissionError:
        with pytest.raises(UserError, match=rf"{path}: not readable"):
            load_dataset(f"d4rl:{path}")
    loop.symlink_to(loop)
    with pytest.raises(UserError, match=str(loop)):
        load_dataset(f"d4rl:{loop}")


def test_bounds_of_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_episodes(path, random_trajectories())
    with pytest.raises(UserError, match=r"episode_0/actions, row \d: .* outside the bounds -0.01 to 0.01"):
        load_dataset(str(path), action_bounds=([-0.01] * 2, [0.01] * 2))
    with pytest.raises(UserError, match=r"2 numbers a row, expected 3, .* Name other data=, or the task"):
        load_dataset(str(path), action_bounds=([-1] * 3, [1] * 3))


@pytest.mark.parametrize(
    ("bounds", "told"),
    [
        ((-1, [1, 1, 1]), r"actions has 2 numbers a row, expected 3"),
        (([-1, -1], [1, 1, 1]), r"action_bounds=.*expected the lowest and the highest action"),
        ((1, -1), r"action_bounds=\(1, -1\): expected the lowest and the highest action"),
        ((float("nan"), 1), r"action_bounds=\(nan, 1\)"),  # it let everything pass
        ((-1,), r"action_bounds=\(-1,\)"),
        (3, r"action_bounds=3"),
    ],
)
def test_bounds_that_are_none_are_said(bounds: Any, told: str) -> None:
    arrays = {"observations": np.zeros((4, 2)), "actions": np.zeros((4, 2)), "rewards": np.zeros(4)}
    with pytest.raises(UserError, match=told):
        load_dataset(arrays, action_bounds=bounds)
