from __future__ import annotations

import ctypes.util
import json
from pathlib import Path

import imageio.v3
import numpy as np
import pytest

import eva_rl
from eva_rl import collect, evaluate, pretrain
from eva_rl.cli.parsing import parse
from eva_rl.envs import CW10, MT40
from eva_rl.envs.registry import task_ids
from eva_rl.tracking.tracker import read_metrics

SMALL = ["env=reach-v3+window-close-v3", "data.episodes=2", "data.workers=1", "env.horizon=60", "threads=1"]
SMALL += ["data.only_successes=false", "size.hidden_size=16", "size.num_layers=1", "size.num_heads=2"]
SMALL += ["size.context_length=5", "algo.updates=4", "algo.batch_size=8", "eval.episodes=1", "eval.every=2"]


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
    assert pretrain.main(["env=mujoco/hopper", f"data={data}", *small, "threads=1", f"run_dir={run_dir}"]) == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["validation/mean_reward"] == summary["validation/Hopper-v5"] > 0
    assert "validation/success_rate" not in summary
