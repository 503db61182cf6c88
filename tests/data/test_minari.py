"""Minari data sets: ours are minari's, and minari's are read as minari reads them."""

from __future__ import annotations

import json
from pathlib import Path

import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from eva_rl.data import load_dataset, local_minari_sets, save_minari, write_episodes
from eva_rl.errors import UserError
from tests.data.making import differences, random_trajectories, table, write_h5

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")  # it asks for author, e-mail, permalink


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    return tmp_path / "minari"


@pytest.mark.parametrize("next_observations", [True, False])
def test_round_trip_d4rl_minari(tmp_path: Path, next_observations: bool) -> None:
    arrays = table(14) if next_observations else table(14, next_observations=None)
    data = load_dataset(f"d4rl:{write_h5(tmp_path / 'mine.hdf5', arrays)}")
    save_minari(data, "mine/table-v0")
    again = load_dataset("minari:mine/table-v0")
    assert differences(data, again) == []
    write_episodes(tmp_path / "again.h5", again)
    assert differences(data, load_dataset(str(tmp_path / "again.h5"))) == []


def test_saved_sets_are_minaris() -> None:
    data = random_trajectories()
    save_minari(data, "mine/deep/random-v3", references=(-1.0, 4.0), algorithm_name="noise", author="me")
    assert "mine/deep/random-v3" in minari.list_local_datasets()
    dataset = minari.load_dataset("mine/deep/random-v3")
    assert (dataset.total_episodes, dataset.total_steps) == (3, 11)
    for index, episode in enumerate(dataset.iterate_episodes()):
        own = data.episode(index)
        np.testing.assert_array_equal(episode.observations, own.observations)
        np.testing.assert_array_equal(episode.terminations, own.terminations)
        np.testing.assert_array_equal(episode.infos["success"], own.successes)
    assert minari.get_normalized_score(dataset, np.array([1.5])).tolist() == [0.5]
    again = load_dataset("minari:mine/deep/random-v3")
    assert differences(data, again) == []
    assert (again.metadata["ref_min_score"], again.metadata["ref_max_score"]) == ("-1.0", "4.0")
    assert local_minari_sets()["mine/deep/random-v3"]["total_steps"] == 11


def test_saved_sets_know_their_environment() -> None:
    data = random_trajectories(dims=(11, 3))
    object.__setattr__(data, "env_id", "Hopper-v5")
    save_minari(data, "mine/hopper-v0")
    assert minari.load_dataset("mine/hopper-v0").env_spec.id == "Hopper-v5"
    assert load_dataset("minari:mine/hopper-v0").env_id == "Hopper-v5"


def test_nothing_is_overwritten_and_bad_ids_leave_nothing(root: Path) -> None:
    save_minari(random_trajectories(), "mine/a-v0")
    with pytest.raises(UserError, match="exists and is not overwritten"):
        save_minari(random_trajectories(), "mine/a-v0")
    with pytest.raises(UserError, match="could not be saved"):
        save_minari(random_trajectories(), "mine/no version")
    assert [path.name for path in (root / "mine").iterdir() if path.is_dir()] == ["a-v0"]


def goal_space() -> spaces.Dict:
    box = lambda *shape: spaces.Box(-9, 9, shape, np.float64)  # noqa: E731
    return spaces.Dict(
        {"observation": box(2), "desired_goal": box(1), "inner": spaces.Dict({"b": box(2, 2), "a": box()})}
    )


def save_goals(episodes: int = 2, steps: int = 3) -> list[dict[str, object]]:
    """A data set with Dict observations, made by minari; returns the observations of each episode."""
    space, rng = goal_space(), np.random.default_rng(0)
    action_space = spaces.Box(np.array([0, -2], np.float32), np.array([1, 2], np.float32))
    kept, buffers = [], []
    for index in range(episodes):
        shapes = {"desired_goal": (1,), "observation": (2,)}
        observations: dict[str, object] = {k: rng.normal(size=(steps + 1, *shape)) for k, shape in shapes.items()}
        observations["inner"] = {"a": rng.normal(size=(steps + 1,)), "b": rng.normal(size=(steps + 1, 2, 2))}
        kept.append(observations)
        ends = np.arange(steps) == steps - 1
        buffers.append(
            EpisodeBuffer(
                id=index,
                observations=observations,
                actions=np.tile(np.float32([0.5, -1]), (steps, 1)),
                rewards=np.arange(steps, dtype=np.float64),
                terminations=~ends & False,
                truncations=ends,
                infos={"success": np.arange(steps + 1) == steps},
            )
        )
    minari.create_dataset_from_buffers(
        "goals-v1", buffers, observation_space=space, action_space=action_space, ref_min_score=0, ref_max_score=9
    )
    return kept


def at(observations: object, row: int) -> object:
    return {k: at(v, row) for k, v in observations.items()} if isinstance(observations, dict) else observations[row]  # type: ignore[index]


def test_dict_observations_are_in_the_order_of_gymnasiums_flatten() -> None:
    kept = save_goals()
    data = load_dataset("minari:goals-v1")
    for index, observations in enumerate(kept):
        rows = [spaces.flatten(goal_space(), at(observations, row)) for row in range(4)]
        np.testing.assert_allclose(data.episode(index).observations, rows, rtol=1e-6)
    assert data.observation_dim == 8
    assert data.successes is not None
    assert data.successes.tolist() == [False, False, True] * 2  # T + 1 rows of infos: the first belongs to the reset
    assert data.source == "minari:goals-v1"


def edit_metadata(root: Path, **values: object) -> None:
    file = root / "goals-v1" / "data" / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_action_bounds_are_those_of_the_space(root: Path) -> None:
    save_goals()
    space = {"type": "Box", "dtype": "float32", "shape": [2], "low": [0.6, -2], "high": [1, 2]}
    edit_metadata(root, action_space=json.dumps(space))
    with pytest.raises(UserError, match=r"main_data.hdf5: episode_0/actions, row 0: 0.5 in dimension 0 .* 0.6 to 1"):
        load_dataset("minari:goals-v1")
    assert load_dataset("minari:goals-v1?actions=clip").actions[0].tolist() == [np.float32(0.6), -1.0]


@pytest.mark.parametrize(
    "space",
    [
        {"type": "Discrete", "dtype": "int64", "start": 0, "n": 3},
        {"type": "Dict", "subspaces": {"mission": {"type": "Text", "max_length": 9}}},
        {"type": "Box", "dtype": "uint8", "shape": [64, 64, 3], "low": 0, "high": 255},
    ],
)
def test_other_spaces_are_refused(root: Path, space: dict[str, object]) -> None:
    save_goals()
    edit_metadata(root, observation_space=json.dumps(space))
    with pytest.raises(UserError, match=r"metadata.json: observation_space.*takes Box observations"):
        load_dataset("minari:goals-v1")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"action_space": 3}', '{"action_space": "{}"}', '{"action_space": "[1]"}']
)
def test_damaged_metadata(root: Path, content: str) -> None:
    save_goals()
    (root / "goals-v1" / "data" / "metadata.json").write_text(content)
    with pytest.raises(UserError, match=r"metadata\.json"):
        load_dataset("minari:goals-v1")
    assert "goals-v1" not in {"{": local_minari_sets(), "[]": local_minari_sets()}.get(content, {})


def test_missing_sets_are_named(root: Path) -> None:
    save_goals()
    with pytest.raises(UserError, match=r"Did you mean 'goals-v1'\?.*download failed.*MINARI_DATASETS_PATH"):
        load_dataset("minari:goal-v1")
    with pytest.raises(UserError, match="expected an id"):
        load_dataset("minari:/etc")
