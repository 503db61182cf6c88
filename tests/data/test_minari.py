"""Minari data sets: ours are minari's, and minari's are read as minari reads them."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from minari.serialization import serialize_space

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


def box(*shape: int) -> spaces.Box:
    return spaces.Box(-9, 9, shape, np.float64)


INNER = {"b": box(2, 2), "a": box()}
SORTED = spaces.Dict({"observation": box(2), "desired_goal": box(1), "inner": spaces.Dict(INNER)})
OWN_ORDER = spaces.Dict(
    [("observation", box(2)), ("inner", spaces.Dict(list(INNER.items()))), ("desired_goal", box(1))]
)
"""Keys as the environment gives them, not in alphabetical order."""
NESTED = spaces.Dict([("z", spaces.Tuple([box(2), spaces.Dict([("y", box(1)), ("x", box(3))])])), ("a", box(2))])


def samples(space: spaces.Space[object], rows: int) -> object:
    """Rows of a space, in the form in which minari's buffers hold them; every number differs."""
    if isinstance(space, spaces.Dict):
        return {name: samples(inner, rows) for name, inner in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(samples(inner, rows) for inner in space.spaces)
    return np.random.default_rng(7 + len(str(space))).normal(size=(rows, *(space.shape or ())))


def save_goals(
    episodes: int = 2, steps: int = 3, space: spaces.Space[object] = SORTED, data_format: str = "hdf5", rows: int = 1
) -> list[object]:
    """A data set made by minari, with ``rows`` observations more than steps; returns the observations of each."""
    action_space = spaces.Box(np.array([0, -2], np.float32), np.array([1, 2], np.float32))
    kept, buffers = [], []
    for index in range(episodes):
        observations = samples(space, steps + rows)
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
                infos={"success": np.arange(steps + rows) == steps},
            )
        )
    minari.create_dataset_from_buffers(
        "goals-v1",
        buffers,
        observation_space=space,
        action_space=action_space,
        ref_min_score=0,
        ref_max_score=9,
        data_format=data_format,
    )
    return kept


def at(observations: object, row: int) -> object:
    if isinstance(observations, dict):
        return {k: at(v, row) for k, v in observations.items()}
    return tuple(at(v, row) for v in observations) if isinstance(observations, tuple) else observations[row]  # type: ignore[index]


@pytest.mark.parametrize("space", [SORTED, OWN_ORDER, NESTED, spaces.Tuple([box(2), box(1)])], ids=str)
@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_dict_observations_are_in_the_order_of_their_own_space(space: spaces.Space[object], data_format: str) -> None:
    if data_format == "arrow":
        pytest.importorskip("pyarrow")
    kept = save_goals(space=space, data_format=data_format)
    data = load_dataset("minari:goals-v1")
    for index, observations in enumerate(kept):
        rows = [spaces.flatten(space, at(observations, row)) for row in range(4)]
        np.testing.assert_allclose(data.episode(index).observations, rows, rtol=1e-6)
    assert data.observation_dim == spaces.flatdim(space)
    assert data.successes is not None
    assert data.successes.tolist() == [False, False, True] * 2  # T + 1 rows of infos: the first is the reset's
    assert data.source == "minari:goals-v1"


def test_a_converted_set_knows_the_order_of_its_parts(root: Path) -> None:
    """It was lost, so that data in another order than the task's were cloned without a word."""
    save_goals(space=OWN_ORDER)
    data = load_dataset("minari:goals-v1?keys=observation,desired_goal")
    save_minari(data, "mine/flat-v1")
    again = load_dataset("minari:mine/flat-v1")
    assert again.metadata["observation_keys"] == data.metadata["observation_keys"] == "observation,desired_goal"


def test_an_unknown_order_is_refused_and_can_be_said(root: Path, tmp_path: Path) -> None:
    kept = save_goals(space=OWN_ORDER)
    file = root / "goals-v1" / "data" / "main_data.hdf5"
    whole = load_dataset("minari:goals-v1")
    assert differences(load_dataset(str(file)), whole) == []  # metadata.json lies beside it
    assert differences(load_dataset(str(root / "goals-v1")), whole) == []
    alone = tmp_path / "alone.hdf5"
    alone.write_bytes(file.read_bytes())
    message = r"episode_0/observations has the parts desired_goal, inner, observation, .*\?keys=desired_goal"
    with pytest.raises(UserError, match=message):
        load_dataset(str(alone))
    chosen = load_dataset(f"{alone}?keys=observation,desired_goal")
    expected = np.concatenate([kept[0][key] for key in ("observation", "desired_goal")], 1)  # type: ignore[index]
    np.testing.assert_allclose(chosen.episode(0).observations, expected, rtol=1e-6)
    with pytest.raises(UserError, match=r"observations/goal is missing.*holds desired_goal, inner, observation"):
        load_dataset(f"{alone}?keys=observation,goal")
    edit_metadata(root, observation_space=None)
    with pytest.raises(UserError, match=r"metadata\.json: observation_space"):
        load_dataset("minari:goals-v1")


def test_other_parts_than_the_space_says_are_refused(root: Path) -> None:
    save_goals(space=OWN_ORDER)
    parts = {"observation": box(2), "desired_goal": box(1), "outer": box(5)}
    edit_metadata(root, observation_space=serialize_space(spaces.Dict(parts)))
    with pytest.raises(UserError, match=r"holds desired_goal, inner, observation; the space in the metadata has"):
        load_dataset("minari:goals-v1")


def test_metadata_without_spaces_make_no_environment(root: Path) -> None:
    """minari would make the environment that the file names, and so run what it names."""
    save_goals()
    file = root / "goals-v1" / "data" / "metadata.json"
    content = json.loads(file.read_text())
    del content["observation_space"]
    spec = {"id": "x-v0", "entry_point": "os:mkdir", "kwargs": {"path": str(root / "made")}}
    file.write_text(json.dumps(content | {"data_format": "arrow", "env_spec": json.dumps(spec)}))
    with pytest.raises(UserError, match="observation_space is missing"):
        load_dataset("minari:goals-v1")
    assert not (root / "made").exists()


def test_arrow_sets_without_the_last_observation(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("pyarrow")
    save_goals(space=box(2), data_format="arrow", rows=0)
    with pytest.raises(UserError, match=r"observations has 3 rows, expected 4: .*data.skip_damaged=true"):
        load_dataset("minari:goals-v1")
    with pytest.raises(UserError, match="2 of 2 episodes are damaged"):
        load_dataset("minari:goals-v1", skip_damaged=True)


@pytest.mark.parametrize("lacking", [[0, 1], [1]])
def test_damaged_episodes_are_left_out_when_asked(
    root: Path, lacking: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    save_goals(episodes=3, space=box(2))
    with h5py.File(root / "goals-v1" / "data" / "main_data.hdf5", "a") as file:
        for index in lacking:
            observations = file[f"episode_{index}/observations"][:-1]
            del file[f"episode_{index}/observations"]
            file[f"episode_{index}/observations"] = observations
    with pytest.raises(UserError, match=r"has 3 rows, expected 4: .*data.skip_damaged=true"):
        load_dataset("minari:goals-v1")
    data = load_dataset("minari:goals-v1", skip_damaged=True)
    assert data.num_episodes == 3 - len(lacking)
    assert f"{len(lacking)} of 3 episodes are damaged; the first: " in caplog.text


def test_nothing_but_damaged_episodes_is_an_error(root: Path) -> None:
    save_goals(space=box(2))
    with h5py.File(root / "goals-v1" / "data" / "main_data.hdf5", "a") as file:
        for index in range(2):
            file[f"episode_{index}/rewards"][:] = np.nan
    with pytest.raises(UserError, match=r"2 of 2 episodes are damaged; the first: .*nan is not a finite"):
        load_dataset("minari:goals-v1", skip_damaged=True)


def test_the_tasks_bounds_count_beside_the_datas_own() -> None:
    save_goals()
    with pytest.raises(UserError, match=r"actions, row 0: -1 in dimension 1 lies outside the bounds -0\.5 to 0\.5"):
        load_dataset("minari:goals-v1", action_bounds=([-0.5] * 2, [0.5] * 2))


def test_bounds_of_dict_actions_are_checked(root: Path) -> None:
    save_goals(space=box(2))
    two = {"type": "Dict", "subspaces": {}}
    for name, low in (("b", 0.0), ("a", 0.9)):
        two["subspaces"][name] = {"type": "Box", "dtype": "float32", "shape": [1], "low": [low], "high": [2.0]}  # type: ignore[index]
    edit_metadata(root, action_space=json.dumps(two))
    with h5py.File(root / "goals-v1" / "data" / "main_data.hdf5", "a") as file:
        for index in range(2):
            del file[f"episode_{index}/actions"]
            file[f"episode_{index}/actions/a"], file[f"episode_{index}/actions/b"] = np.ones((3, 1)), np.zeros((3, 1))
    assert load_dataset("minari:goals-v1").actions[0].tolist() == [0.0, 1.0]
    with h5py.File(root / "goals-v1" / "data" / "main_data.hdf5", "a") as file:
        file["episode_1/actions/a"][:] = 0
    with pytest.raises(UserError, match=r"episode_1/actions, row 0: 0 in dimension 1 lies outside .* 0\.9 to 2"):
        load_dataset("minari:goals-v1")


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


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_parts_of_parts_can_be_chosen(data_format: str) -> None:
    """They are called as the task calls its own, so that their order can be compared."""
    if data_format == "arrow":
        pytest.importorskip("pyarrow")
    kept = save_goals(space=OWN_ORDER, data_format=data_format)
    whole = load_dataset("minari:goals-v1")
    names = whole.metadata["observation_keys"]
    assert names == "observation,inner/b,inner/a,desired_goal"
    for keys in ("observation,inner,desired_goal", names):
        same = load_dataset(f"minari:goals-v1?keys={keys}")
        assert differences(same, whole) == []
        assert same.metadata["observation_keys"] == names
    chosen = load_dataset("minari:goals-v1?keys=inner/a,observation")
    expected = np.column_stack([kept[0]["inner"]["a"], kept[0]["observation"]])  # type: ignore[index]
    np.testing.assert_allclose(chosen.episode(0).observations, expected, rtol=1e-6)


def test_images_that_are_not_asked_for_do_not_matter(root: Path) -> None:
    kept = save_goals(space=OWN_ORDER)
    image = spaces.Box(0, 255, (8, 8, 3), np.uint8)
    parts = {"observation": box(2), "inner": image, "desired_goal": spaces.Discrete(3)}
    edit_metadata(root, observation_space=serialize_space(spaces.Dict(parts)))
    with pytest.raises(UserError, match=r"Discrete.*those parts of a Dict that are Boxes: \?keys=a,b"):
        load_dataset("minari:goals-v1")
    data = load_dataset("minari:goals-v1?keys=observation")
    np.testing.assert_allclose(data.episode(0).observations, kept[0]["observation"], rtol=1e-6)  # type: ignore[index]
