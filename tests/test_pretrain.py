from __future__ import annotations

import contextlib
import ctypes.util
import json
from dataclasses import replace
from pathlib import Path

import imageio.v3
import numpy as np
import pytest
from safetensors import safe_open

import eva_rl
import eva_rl.data.sources
from eva_rl import collect, evaluate, pretrain
from eva_rl.cli.parsing import parse
from eva_rl.cli.run_dir import changed_settings, open_run
from eva_rl.data import save_minari, write_episodes
from eva_rl.envs import CW10, MT40
from eva_rl.envs.registry import task_ids
from eva_rl.tracking.tracker import read_metrics
from tests.data.making import random_trajectories, write_h5

SMALL = ["env=reach-v3+window-close-v3", "data.episodes=2", "data.workers=1", "env.horizon=60", "threads=1"]
SMALL += ["data.only_successes=false", "size.hidden_size=16", "size.num_layers=1", "size.num_heads=2"]
SMALL += ["size.context_length=5", "algo.updates=4", "algo.batch_size=8", "eval.episodes=1", "eval.every=2"]
SMALL += ["tracker=[]"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain") / "run"
    assert pretrain.main([*SMALL, f"run_dir={folder}"]) == 0
    return folder


def test_a_policy_comes_out(run_dir: Path) -> None:
    policy = eva_rl.load_policy(run_dir)
    assert policy.network.config.context_length == 5
    assert set(policy.conditioning.per_env) == {"metaworld/reach-v3", "metaworld/window-close-v3"}
    assert policy.metadata["pretrained_on"] == ["metaworld/reach-v3", "metaworld/window-close-v3"]
    assert policy.metadata["data"] == {
        "source": "expert:reach-v3+window-close-v3",
        "episodes": 4,
        "steps": 240,
    }


def test_progress_is_on_record(run_dir: Path) -> None:
    rows = [row for row in read_metrics(run_dir) if "validation/success_rate" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert (
        json.loads((run_dir / "summary.json").read_text())["validation/success_rate"]
        == rows[-1]["validation/success_rate"]
    )


def test_task_sets() -> None:
    assert tuple(task_ids("cw10")) == CW10
    assert tuple(task_ids("mt40")) == MT40
    assert len(task_ids("mt50")) == 50
    assert task_ids("push+reach-v3") == ["metaworld/push-v3", "metaworld/reach-v3"]


def test_sizes_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    size = parse("pretrain", ["size=base"]).size
    assert (size.hidden_size, size.num_layers, size.num_heads, size.context_length) == (512, 4, 8, 50)
    assert pretrain.main(["size=huge"]) == 2
    assert "'huge'" in capsys.readouterr().err


def test_evaluate_several_tasks(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    arguments = [f"policy={run_dir}", "env=reach-v3+push-v3", "eval.episodes=2", "env.horizon=10", f"out={out}"]
    assert evaluate.main([*arguments, "threads=1"]) == 0
    record = json.loads(out.read_text())
    assert list(record["tasks"]) == ["metaworld/reach-v3", "metaworld/push-v3"]
    assert record["mean_success_rate"] == 0
    assert [e["length"] for e in record["tasks"]["metaworld/push-v3"]["episodes"]] == [10, 10]
    assert evaluate.main([*arguments, "threads=1"]) == 2
    assert "not overwritten" in capsys.readouterr().err
    assert json.loads(out.read_text()) == record


def test_a_policy_of_several_tasks_wants_a_task(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([f"policy={run_dir}", "threads=1"]) == 2
    assert "Name one with env=" in " ".join(capsys.readouterr().err.split())


def test_the_target_is_chosen_by_validation(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    small = ["env=reach-v3", "eval.episodes=2", "env.horizon=8", "threads=1"]
    assert evaluate.main([f"policy={run_dir}", *small, "targets=[10,-20000,400]", f"out={out}"]) == 0
    best = {}
    for target in (10.0, -20000.0, 400.0):
        path = tmp_path / f"{target}.json"
        more = [f"policy.target_return={target}", "validation=true", f"out={path}"]
        assert evaluate.main([f"policy={run_dir}", *small, *more]) == 0
        best[target] = json.loads(path.read_text())["tasks"]["metaworld/reach-v3"]["metrics"]["eval/mean_reward"]
    assert len(set(best.values())) == 3, "the target changes what the policy does"
    chosen = json.loads(out.read_text())["tasks"]["metaworld/reach-v3"]["target_return"]
    assert chosen == max(best, key=lambda target: best[target])
    capsys.readouterr()
    assert evaluate.main([f"policy={run_dir}", *small, "targets=[10,400]", "policy.target_return=500"]) == 2
    assert "policy.target_return=500 and targets=[10.0, 400.0]: expected one of them" in capsys.readouterr().err


@pytest.mark.slow
def test_video(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if ctypes.util.find_library("OSMesa") is None:
        pytest.skip("needs Debian's libosmesa6")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    small = ["env=reach-v3", "eval.episodes=1", "env.horizon=6", "threads=1", "video=true"]
    assert evaluate.main([f"policy={run_dir}", *small]) == 0
    frames = imageio.v3.imread(tmp_path / "videos" / "metaworld-reach-v3.gif")
    assert frames.shape == (4, 264, 240, 3)
    assert frames[0].std() > 10, "something is to be seen"
    assert np.abs(frames[0, 24:].astype(int) - frames[-1, 24:]).max() > 0, "and it moves"


def test_validation_episodes_are_others(run_dir: Path, tmp_path: Path) -> None:
    seeds = []
    for flag in ("false", "true"):
        out = tmp_path / f"{flag}.json"
        more = ["env=reach-v3", "eval.episodes=2", "env.horizon=5", "threads=1", f"validation={flag}", f"out={out}"]
        assert evaluate.main([f"policy={run_dir}", *more]) == 0
        episodes = json.loads(out.read_text())["tasks"]["metaworld/reach-v3"]["episodes"]
        seeds.append({episode["episode_seed"] for episode in episodes})
    assert not seeds[0] & seeds[1]


def test_tasks_without_success_are_judged_by_their_return(tmp_path: Path) -> None:
    data, run_dir = tmp_path / "hopper.h5", tmp_path / "run"
    assert (
        collect.main(
            ["env=mujoco/hopper", "env.horizon=20", "expert=sac", "expert.steps=120", "episodes=3", f"out={data}"]
        )
        == 0
    )
    small = ["size.hidden_size=16", "size.num_layers=1", "size.num_heads=2", "size.context_length=4", "algo.updates=2"]
    small += ["tracker=[]"]
    assert pretrain.main(["env=mujoco/hopper", f"data={data}", *small, "threads=1", f"run_dir={run_dir}"]) == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["validation/mean_reward"] == summary["validation/Hopper-v5"] > 0
    assert eva_rl.load_policy(run_dir).env_id == "Hopper-v5", "evaluate asked for the only task"
    assert "validation/success_rate" not in summary


TINY = ["size.hidden_size=16", "size.num_layers=1", "size.num_heads=2", "size.context_length=4", "threads=1"]
TINY += ["algo.updates=1", "algo.batch_size=4", "eval.every=0", "tracker=[]"]


def swing_up(rows: int = 30) -> dict[str, np.ndarray]:
    """Pendulum-v1: actions from -2 to 2, rewards down to -16; one episode of 20 env steps and one of 10."""
    rng = np.random.default_rng(0)
    return {
        "observations": rng.normal(size=(rows, 3)).astype(np.float32),
        "actions": np.linspace(-2, 2, rows, dtype=np.float32)[:, None],
        "rewards": np.full(rows, -8, np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.isin(np.arange(rows), [19, 29]),
    }


@pytest.mark.parametrize("kind", ["d4rl", "folder"])
def test_what_a_policy_may_do_is_the_environments(tmp_path: Path, kind: str) -> None:
    source = f"d4rl:{write_h5(tmp_path / 'pendulum.hdf5', swing_up())}"
    if kind == "folder":
        np.savez(tmp_path / "0.npz", **{key: value[:20] for key, value in swing_up().items()})
        (tmp_path / "pendulum.hdf5").unlink()
        source = f"trajectories:{tmp_path}"
    run_dir = tmp_path / "run" / "here"
    assert pretrain.main(["env=Pendulum-v1", f"data={source}", *TINY, f"run_dir={run_dir}"]) == 0
    policy = eva_rl.load_policy(run_dir)
    assert policy.scaling.action_half_range.tolist() == [2.0]
    assert list(policy.conditioning.per_env) == ["Pendulum-v1"]


def test_actions_beyond_the_environments_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = swing_up()
    arrays["actions"][3] = 2.5
    source = f"d4rl:{write_h5(tmp_path / 'pendulum.hdf5', arrays)}"
    assert pretrain.main(["env=Pendulum-v1", f"data={source}", *TINY, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "actions, row 3: 2.5 in dimension 0 lies outside the bounds -2 to 2" in printed(capsys)


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    return tmp_path / "minari"


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_data_may_name_an_environment_that_is_not_installed(minari_root: Path, tmp_path: Path) -> None:
    save_minari(random_trajectories(dims=(3, 1)), "mine/door-v0")
    file = minari_root / "mine" / "door-v0" / "data" / "metadata.json"
    spec = json.dumps({"id": "AdroitHandDoor-v1", "entry_point": "gymnasium_robotics:x"})
    file.write_text(json.dumps(json.loads(file.read_text()) | {"env_spec": spec}))
    command = ["env=Pendulum-v1", "data=minari:mine/door-v0", *TINY, f"run_dir={tmp_path / 'run'}"]
    assert pretrain.main(command) == 0
    assert list(eva_rl.load_policy(tmp_path / "run").conditioning.per_env) == ["Pendulum-v1"]


@pytest.mark.parametrize(
    ("dims", "said"),
    [((111, 8), "has 111 numbers in an observation and 8"), ((105, 7), "has 7 numbers a row, expected 8")],
)
def test_dimensions_are_checked_before_the_first_step(
    tmp_path: Path, dims: tuple[int, int], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_episodes(tmp_path / "ant.h5", random_trajectories((6, 5), dims=dims))
    command = ["env=mujoco/ant", f"data={tmp_path / 'ant.h5'}", *TINY, f"run_dir={tmp_path / 'run'}"]
    assert pretrain.main(command) == 2
    assert said in printed(capsys)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_one_file_for_several_tasks_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_episodes(tmp_path / "a.h5", random_trajectories((5, 5, 5), dims=(39, 4)))
    opened: list[Path] = []
    real = eva_rl.data.sources.iterate_episodes
    monkeypatch.setattr(
        eva_rl.data.sources, "iterate_episodes", lambda path, *rest: opened.append(path) or real(path, *rest)
    )
    command = ["env=reach-v3+push-v3", f"data={tmp_path / 'a.h5'}", *TINY, f"run_dir={tmp_path / 'run'}"]
    assert pretrain.main(command) == 0
    assert opened == [tmp_path / "a.h5"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["data"]["episodes"] == 3
    assert "The 2 tasks share these episodes, which are read and used once" in printed(capsys)
    policy = eva_rl.load_policy(tmp_path / "run")
    assert set(policy.conditioning.per_env) == {"metaworld/reach-v3", "metaworld/push-v3"}


def test_tasks_that_one_policy_cannot_act_in_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_episodes(tmp_path / "a.h5", random_trajectories((5, 5), dims=(3, 1)))
    command = ["env=Pendulum-v1+MountainCarContinuous-v0", f"data={tmp_path / 'a.h5'}", *TINY]
    assert pretrain.main([*command, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "MountainCarContinuous-v0 has observation_dim 2, Pendulum-v1 has 3" in printed(capsys)


def test_the_policy_is_saved_before_it_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_episodes(tmp_path / "a.h5", random_trajectories((5, 5), dims=(39, 4)))
    monkeypatch.setattr("eva_rl.envs.metaworld.MetaWorldTask.step", lambda *_: 1 / 0)
    command = ["env=reach-v3", f"data={tmp_path / 'a.h5'}", *TINY, f"run_dir={tmp_path / 'run'}"]
    with contextlib.suppress(ZeroDivisionError):
        assert pretrain.main(command) != 0
    assert eva_rl.load_policy(tmp_path / "run" / "policy").observation_dim == 39


def test_a_run_goes_on_with_the_data_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With other data under the same name it went on with their scaling, and named them for the whole run."""
    path, saved = tmp_path / "pendulum.hdf5", pretrain._save
    command = ["env=Pendulum-v1", f"data=d4rl:{write_h5(path, swing_up())}", *TINY]
    command += ["algo.updates=2", "checkpoint.every=1", "eval.every=2", f"run_dir={tmp_path / 'run'}"]
    monkeypatch.setattr(pretrain, "_save", lambda *_: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        assert pretrain.main(command) != 0
    assert (tmp_path / "run" / "checkpoint").exists()
    monkeypatch.setattr(pretrain, "_save", saved)
    arrays = swing_up()
    write_h5(path, arrays | {"observations": arrays["observations"] + 1})
    assert pretrain.main(command) == 2
    assert "holds an unfinished run, and what data= names has changed" in printed(capsys)
    write_h5(path, arrays)
    assert pretrain.main(command) == 0


@pytest.mark.parametrize(("largest", "scale"), [(1e-12, 1e-10), (1e14, 1e10)])
def test_returns_of_any_size_make_a_policy_that_can_be_read(tmp_path: Path, largest: float, scale: float) -> None:
    """Its return_scale was saved beyond what a policy file may hold, so that the policy could not be loaded."""
    arrays = swing_up(200)
    arrays["rewards"][:] = largest
    source = f"d4rl:{write_h5(tmp_path / 'pendulum.hdf5', arrays)}"
    assert pretrain.main(["env=Pendulum-v1", f"data={source}", *TINY, f"run_dir={tmp_path / 'run'}"]) == 0
    assert eva_rl.load_policy(tmp_path / "run").scaling.return_scale == pytest.approx(scale)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_are_written_in_precisions_that_load(tmp_path: Path, dtype: str) -> None:
    command = ["env=Pendulum-v1", f"data=d4rl:{write_h5(tmp_path / 'pendulum.hdf5', swing_up())}", *TINY]
    assert pretrain.main([*command, f"weight_dtype={dtype}", f"run_dir={tmp_path / 'run'}"]) == 0
    with safe_open(tmp_path / "run" / "policy" / "model.safetensors", "pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {f"torch.{dtype}"}  # noqa: SIM118
    assert eva_rl.load_policy(tmp_path / "run").observation_dim == 3


@pytest.mark.parametrize("dtype", ["fp16", "int8", "nn"])
def test_other_precisions_are_refused_first(tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``int8`` was written and could not be read; ``fp16`` failed after training, and the run could not continue."""
    command = ["env=Pendulum-v1", f"data=d4rl:{write_h5(tmp_path / 'pendulum.hdf5', swing_up())}", *TINY]
    assert pretrain.main([*command, f"weight_dtype={dtype}", f"run_dir={tmp_path / 'run'}"]) == 2
    assert f"'{dtype}'" in printed(capsys)
    assert not (tmp_path / "run").exists()


def test_a_continued_run_may_save_in_another_precision(tmp_path: Path) -> None:
    config = parse("pretrain", [f"run_dir={tmp_path / 'run'}"])
    run_dir = open_run("pretrain", config)
    (run_dir / "checkpoint").mkdir()
    assert changed_settings(run_dir, replace(config, weight_dtype="float32")) == {}


def test_what_could_not_be_read_again_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = swing_up(200)
    arrays["observations"][:] = 1e20
    source = f"d4rl:{write_h5(tmp_path / 'pendulum.hdf5', arrays)}"
    assert pretrain.main(["env=Pendulum-v1", f"data={source}", *TINY, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "an observation mean over its std is 1e+20; expected at most" in printed(capsys)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_experts_dimensions_are_checked_before_it_plays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(["env=Pendulum-v1", "data=expert:push-v3", *TINY, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "metaworld/push-v3 has 39 numbers in an observation and 4" in printed(capsys)
    assert not list((tmp_path / "run").rglob("*.h5"))


@pytest.mark.parametrize("largest", [3500.0, 1.0])
def test_return_scale_and_timesteps_come_from_the_data(
    tmp_path: Path, largest: float, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = swing_up(600)
    arrays["timeouts"][:] = np.isin(np.arange(600), [299, 599])
    arrays["rewards"][:] = 0
    arrays["rewards"][450] = largest
    source = f"d4rl:{write_h5(tmp_path / 'pendulum.hdf5', arrays)}"
    assert pretrain.main(["env=Pendulum-v1", f"data={source}", *TINY, f"run_dir={tmp_path / 'run'}"]) == 0
    policy = eva_rl.load_policy(tmp_path / "run")
    assert policy.scaling.return_scale == pytest.approx(largest / 5)
    assert policy.network.config.max_timestep == 300  # the longest episode; Pendulum-v1's own end after 200
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["return_scale"], summary["max_timestep"]) == (pytest.approx(largest / 5), 300)
    assert f"Return scale {largest / 5:g}" in printed(capsys)
    fixed = [*TINY, "return_scale=10", "size.max_timestep=40", f"run_dir={tmp_path / 'other'}"]
    assert pretrain.main(["env=Pendulum-v1", f"data={source}", *fixed]) == 0
    policy = eva_rl.load_policy(tmp_path / "other")
    assert (policy.scaling.return_scale, policy.network.config.max_timestep) == (10.0, 40)
