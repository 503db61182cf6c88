"""``python -m eva_rl.datasets`` from end to end."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

from eva_rl.cli.loading import expert_source, load_task_data
from eva_rl.cli.saving import check_output
from eva_rl.configs.groups import DataOptions
from eva_rl.data import load_dataset, write_episodes, write_store
from eva_rl.data.selection import sampling_weights
from eva_rl.datasets import main
from eva_rl.errors import UserError
from tests.data.making import differences, random_trajectories, table, write_h5
from tests.data.test_files import spoil


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVA_RL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minari").mkdir()


def test_convert_filter_check_show_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_h5(tmp_path / "pen-human-v1.hdf5", table(observations=np.ones((12, 39)), next_observations=None))
    source = f"data=d4rl:{path}"
    assert main(["action=convert", source, "out=minari:mine/table-v0"]) == 0
    assert main(["action=filter", "data=minari:mine/table-v0", "data.top=0.5", "out=best.h5"]) == 0
    assert main(["action=filter", "data=minari:mine/table-v0", "data.sample=1", "data.seed=3", "out=one.h5"]) == 0
    assert load_dataset("one.h5").num_episodes == 1
    assert main(["action=convert", "data=best.h5", "out=store"]) == 0
    assert main(["action=check", "data=store"]) == 0
    assert main(["action=show", "data=minari:mine/table-v0"]) == 0
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert load_dataset("store").returns.tolist() == [150.0, 450.0]
    assert differences(load_dataset("store"), load_dataset(f"d4rl:{path}").select([1, 2])) == []
    assert "store is sound: 2 episodes, 8 env steps" in printed
    assert "mean 4.2, -1.2 to 11.9" in printed  # normalised: of returns 60, 150 and 450 between pen's references
    assert "none of the shipped ones" in printed
    assert "To use them: data=minari:mine/table-v0" in " ".join(printed.split())
    assert "d4rl:hopper-medium-v2" in printed
    assert minari.load_dataset("mine/table-v0").total_episodes == 3


def test_fitting_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_episodes(tmp_path / "a.h5", random_trajectories(dims=(39, 4)))
    assert main(["action=show", "data=a.h5"]) == 0
    assert "mt40" in capsys.readouterr().out


def test_data_that_are_named_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They were ignored, and everything listed."""
    write_episodes(tmp_path / "a.h5", random_trajectories(dims=(39, 4)))
    assert main(["data=a.h5"]) == 0
    shown = capsys.readouterr().out
    assert main(["action=show", "data=a.h5"]) == 0
    assert capsys.readouterr().out == shown
    assert main(["action=list", "data=a.h5"]) == 0
    assert "d4rl:hopper-medium-v2" in capsys.readouterr().out


def test_a_store_is_checked_number_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tmp_path / "store", [random_trajectories()], "x")
    array = np.load(tmp_path / "store" / "actions.npy")
    array[7, 1] = np.nan
    spoil(tmp_path / "store", "actions", array)
    assert main(["action=check", "data=store"]) == 2
    assert "actions.npy, row 7: not a finite number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["action=shw"], "Did you mean 'show'"),
        (["action=show"], "action=show needs data="),
        (["action=show", "data=nothing.h5"], "No data at nothing.h5"),
        (["action=convert", "data=a.h5"], "out= is missing"),
        (["action=convert", "data=a.h5", "out=a.h5"], "exists and is not overwritten"),
        (["action=convert", "data=a.h5", "out=b.csv"], "expected FILE.h5"),
        (["action=filter", "data=a.h5", "out=b.h5"], "No filter given"),
        (["action=show", "data=a.h5", "data.top=2"], "data.top=2.0: expected"),
    ],
)
def test_mistakes(tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_episodes(tmp_path / "a.h5", random_trajectories())
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_load_task_data_takes_every_source(tmp_path: Path) -> None:
    data = random_trajectories((3, 3, 3, 3), dims=(39, 4))
    write_episodes(tmp_path / "a.h5", data)
    write_store(tmp_path / "store", [data], "x")
    for source in ("a.h5", "trajectories:a.h5", "store"):
        loaded = load_task_data("push-v3", DataOptions(source=source, top=0.5), tmp_path)
        best = sorted(np.argsort(-data.returns)[:2].tolist())
        assert differences(loaded, data.select(best)) == []
    write_episodes(tmp_path / "b.h5", random_trajectories())
    with pytest.raises(UserError, match="2 numbers a row, expected 4"):
        load_task_data("push-v3", DataOptions(source="b.h5"), tmp_path)


def test_expert_sources(tmp_path: Path) -> None:
    assert expert_source("expert", "push-v3", 25) == ("push-v3", 25)
    assert expert_source("expert:reach-v3?episodes=3", "push-v3", 25) == ("reach-v3", 3)
    for wrong in ("expert:reach-v3?episodes=0", "expert:reach-v3?seed=1"):
        with pytest.raises(UserError, match="expected expert:ENV"):
            expert_source(wrong, "push-v3", 25)
    data = load_task_data("push-v3", DataOptions(source="expert:reach-v3?episodes=2", workers=1), tmp_path)
    assert (data.num_episodes, data.env_id) == (2, "metaworld/reach-v3")


def test_weights_of_success_and_return_multiply() -> None:
    data = random_trajectories((30, 30))
    both = sampling_weights(data, 0.25, "return")
    drawn, after = sampling_weights(data, 1, "return"), sampling_weights(data, 0.25)
    assert both is not None
    assert drawn is not None
    assert after is not None
    np.testing.assert_allclose(both, drawn * after)
    assert len(np.unique(both)) == 4


class TwoParts(gym.Env):  # type: ignore[type-arg]
    """Observations of two parts, in an order that is not the alphabet's."""

    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        parts = [(name, gym.spaces.Box(-9, 9, (2,), np.float64)) for name in ("where", "goal")]
        self.observation_space = gym.spaces.Dict(parts)


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_the_parts_of_observations_lie_as_in_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gym.registry, "TwoParts-v0", gym.envs.registration.EnvSpec("TwoParts-v0", TwoParts))
    for name, order in (("same-v0", ("where", "goal")), ("other-v0", ("goal", "where"))):
        space = gym.spaces.Dict([(key, gym.spaces.Box(-9, 9, (2,), np.float64)) for key in order])
        rows = {"where": np.zeros((3, 2)), "goal": np.ones((3, 2))}
        ends = np.array([False, True])
        buffer = EpisodeBuffer(
            id=0,
            observations=rows,
            actions=np.zeros((2, 2), np.float32),
            rewards=np.zeros(2),
            terminations=~ends & False,
            truncations=ends,
        )
        minari.create_dataset_from_buffers(name, [buffer], observation_space=space, action_space=TwoParts.action_space)
    same = load_task_data("TwoParts-v0", DataOptions(source="minari:same-v0"), tmp_path)
    assert same.observations[0].tolist() == [0, 0, 1, 1]
    with pytest.raises(UserError, match=r"as goal,where, TwoParts-v0 as where,goal\. Add \?keys=where,goal"):
        load_task_data("TwoParts-v0", DataOptions(source="minari:other-v0"), tmp_path)
    turned = load_task_data("TwoParts-v0", DataOptions(source="minari:other-v0?keys=where,goal"), tmp_path)
    assert differences(turned, same) == []


def test_converting_imports_no_module_that_the_file_names(tmp_path: Path) -> None:
    (tmp_path / "payload.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    data = random_trajectories()
    object.__setattr__(data, "env_id", "payload:Some-v0")
    write_episodes(tmp_path / "evil.h5", data)
    assert main(["action=convert", "data=evil.h5", "out=minari:mine/some-v0"]) == 0
    assert not (tmp_path / "ran").exists()
    assert differences(load_dataset("minari:mine/some-v0"), data) == []


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("minari:rev/reach", "expected an id such as minari:mine/push-v0"),
        ("minari:my robot/reach-v0", "expected an id"),
        ("minari:/abs/x-v0", "expected an id"),
        ("minari:m/push-v0", "expected an id"),
        ("d4rl:conv/y.hdf5", "d4rl: names how data are read. Type out=FILE.h5"),
        ("trajectories:z.h5", "trajectories: names how data are read"),
    ],
)
def test_outputs_that_cannot_be_are_refused_before_anything_is_collected(out: str, said: str) -> None:
    """Whatever was collected was lost at the end; or lay in a folder of that name."""
    with pytest.raises(UserError, match=said):
        check_output(out)
