"""Online algorithms through the real command: what they leave behind, how they go on, what they refuse."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from eva_rl.adapters import Refresh, load_policy, refresh_directions
from eva_rl.adapters.extensions import AdaLoraExtension
from eva_rl.cli.parsing import parse
from eva_rl.eva import EvaResult
from eva_rl.finetune import phases
from eva_rl.finetune.command import main
from eva_rl.rollouts.evaluation import evaluate_policy
from eva_rl.tracking.tracker import read_metrics
from eva_rl.training.checkpoint import TENSORS_FILE
from eva_rl.training.self_imitation.snapshot import load_snapshot

SMALL = [
    "env=reach-v3",
    "env.horizon=30",
    "data.episodes=2",
    "data.workers=1",
    "data.only_successes=false",
    "eval.episodes=2",
    "eval.quick_episodes=2",
    "eval.every=0",
    "adapter.rank=2",
    "adapter.eva.max_batches=2",
    "adapter.eva.rollout_envs=2",
    "adapter.eva.rollout_steps=20",
    "algo.num_envs=2",
    "algo.env_steps=240",
    "algo.eval_every=120",
    "algo.checkpoint_every=120",
    "threads=1",
    "tracker=[]",
]
REPLAYED = ["algo.steps_per_iteration=60", "algo.updates_per_iteration=2", "algo.batch_size=8"]
SHORT = {
    "self_imitation": REPLAYED,
    "odt": REPLAYED,
    "odt_td3": [*REPLAYED, "algo.critic_warmup=2", "algo.policy_delay=1"],
    "residual": [
        *REPLAYED,
        "algo.critic_warmup=2",
        "algo.learning_starts=60",
        "algo.distill.updates=2",
        "algo.distill.rounds=1",
        "algo.distill.env_steps=60",
    ],
    "ppo": ["algo.rollout_steps=30", "algo.epochs=1", "algo.batch_size=30"],
    "sac": ["algo.learning_starts=40", "algo.train_freq=20", "algo.gradient_steps=1", "algo.batch_size=8"],
    "td3": ["algo.learning_starts=40", "algo.train_freq=20", "algo.gradient_steps=1", "algo.batch_size=8"],
}


def command(policy: Path, run_dir: Path, algo: str, *others: str) -> list[str]:
    replayed = algo.removeprefix("bc_then_") in {"odt", "odt_td3", "self_imitation"}
    steps = [o for o in SMALL if replayed or "checkpoint_every" not in o]
    return [
        f"policy={policy}",
        f"run_dir={run_dir}",
        f"algo={algo}",
        *steps,
        *SHORT[algo.removeprefix("bc_then_")],
        *others,
    ]


def summary(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return found


@pytest.mark.parametrize("algo", [pytest.param("odt_td3", marks=pytest.mark.slow), "ppo"])
def test_a_policy_learns_without_demonstrations(algo: str, policy_folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    keeps_best = [] if algo == "ppo" else ["algo.keep_best=true"]  # looks at the first and the last parameters, too
    assert main(command(policy_folder, run_dir, algo, *keeps_best)) == 0
    found = summary(run_dir)
    assert found["algo"] == algo
    assert found["data"] is None
    assert found["env_steps"] == 240
    assert found["updates"] > 0
    rows = read_metrics(run_dir)
    looks = [row["step"] for row in rows if "validation/mean_reward" in row]
    measured = found["activation_env_steps"]
    assert measured == 2 * 20, "the rollouts that EVA's directions come from"
    played = [120 + 60] if algo == "ppo" else [60, 120 + 120, 240 + 180]
    assert looks == [measured + steps for steps in played], "every env step that was played"
    assert {row["step"] for row in rows if "eval/mean_reward" in row} == {0, found["env_steps_played"]}
    assert found["env_steps_played"] == looks[-1] + (120 if algo == "ppo" else 0)
    assert any("rollout/ep_rew_mean" in row for row in rows)
    report = json.loads((run_dir / "eva_report.json").read_text())
    assert report["data"] == {"activation_source": "rollouts"}
    assert load_policy(run_dir).env_id == "metaworld/reach-v3"


def test_odt_says_that_it_asks_for_no_more_than_the_policy_obtains(
    policy_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It went on asking for that for ever."""
    asked = load_policy(policy_folder).conditioning.of("reach-v3")
    assert main(command(policy_folder, tmp_path / "run", "odt", "data=none")) == 0
    assert f"asks for {asked:.4g}, which the policy obtains as it is" in caplog.text
    caplog.clear()
    assert main(command(policy_folder, tmp_path / "other", "odt", "data=none", "policy.target_return=99")) == 0
    assert "as it is" not in caplog.text


def test_a_residual_is_learned_and_distilled(
    policy_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    others = ["algo.bc.updates=2", "eval.every=1", "eval.stop_at_success=false", "algo.distill.log_every=5"]
    assert main(command(policy_folder, run_dir, "bc_then_residual", *others)) == 0
    assert "algo.distill.log_every=5 has no effect" in caplog.text
    found = summary(run_dir)
    assert list(json.loads((run_dir / "evaluation.json").read_text())) == ["before", "cloned", "residual", "after"]
    assert found["updates"] == 6  # in the three iterations of 60 env steps before distillation
    assert found["distill/updates"] == 4
    assert found["env_steps"] == 240
    assert found["env_steps_played"] == 60 + 240 + 60  # two validations of two episodes, the first while cloning
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows if "distill/loss" in row] == [60 + 240 + 60]
    assert [row["time/env_steps_played"] for row in rows if "rollout/ep_rew_mean" in row] == [120, 180, 300]
    policy = load_policy(run_dir)  # the ordinary folder
    played = evaluate_policy(policy, "reach-v3", episodes=2, seed=0, horizon=30)
    assert played.mean_reward == pytest.approx(found["eval/mean_reward"])
    assert found["eval/mean_reward"] != found["eval_cloned/mean_reward"]


@pytest.mark.slow
def test_rounds_of_distillation_are_one_training_to_the_adapter(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdaLoRA's schedule began anew in each round, and its budget was never reached."""
    told, prune = [], AdaLoraExtension.after_step

    def after_step(self: AdaLoraExtension, update: int) -> None:
        told.append(update)
        prune(self, update)

    monkeypatch.setattr(AdaLoraExtension, "after_step", after_step)
    assert main(command(policy_folder, tmp_path / "run", "residual", "adapter=adalora", "data=none")) == 0
    assert told == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["bc_then_odt", "bc_then_residual"])
def test_cloning_before_is_part_of_the_adapters_training(
    algo: str, policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdaLoRA's schedule began anew after it: what had been pruned came back."""
    told, prune = [], AdaLoraExtension.after_step

    def after_step(self: AdaLoraExtension, update: int) -> None:
        told.append((update, self._model.peft_config["default"].total_step))
        prune(self, update)

    monkeypatch.setattr(AdaLoraExtension, "after_step", after_step)
    assert main(command(policy_folder, tmp_path / "run", algo, "adapter=adalora", "algo.bc.updates=3")) == 0
    assert told == [(update, told[-1][0]) for update in range(1, len(told) + 1)]
    assert len(told) > 3


@pytest.mark.slow
@pytest.mark.parametrize("algo", sorted(SHORT))
def test_cloning_comes_first(algo: str, policy_folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = f"bc_then_{algo}"
    assert main(command(policy_folder, run_dir, first, "algo.bc.updates=3", "eval.every=2", "adapter=eva_dora")) == 0
    found = summary(run_dir)
    assert found["bc/updates"] == 3
    assert found["env_steps"] == 240
    looks = json.loads((run_dir / "evaluation.json").read_text())
    assert list(looks) == ["before", "cloned", *(["residual"] if algo == "residual" else []), "after"]
    rewards = [episode["episode_return"] for episode in looks["cloned"]["episodes"]]
    assert found["eval_cloned/mean_reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert found["data"]["episodes"] == 2
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows if "bc/train/loss" in row] == [1, 3]
    (cloning,) = [row["bc/validation/env_steps"] for row in rows if "bc/validation/env_steps" in row]
    validated = sum(row["validation/env_steps"] for row in rows if "validation/env_steps" in row)
    assert found["env_steps_played"] == 240 + cloning + validated


def test_adapters_of_odt_share_their_base(policy_folder: Path, tmp_path: Path) -> None:
    """The head that draws their actions was trained as part of the base: no two runs had the same."""
    for seed in (0, 1):
        assert main(command(policy_folder, tmp_path / f"{seed}", "odt", "adapter=lora", f"seed={seed}")) == 0
    both = load_policy(policy_folder, adapters={f"{seed}": tmp_path / f"{seed}" for seed in (0, 1)})
    assert set(both.adapters.names) == {"0", "1"}
    base, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "0" / "policy", policy_folder))
    assert base.keys() == expected.keys()
    assert all(torch.equal(base[name], value.to(base[name].dtype)) for name, value in expected.items())


def test_a_policy_that_odt_trained_as_a_whole_keeps_its_head(policy_folder: Path, tmp_path: Path) -> None:
    assert main(command(policy_folder, tmp_path / "run", "odt", "adapter=full")) == 0
    assert load_policy(tmp_path / "run").network.config.stochastic


@pytest.mark.slow
def test_directions_are_looked_at_again(policy_folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert main(command(policy_folder, run_dir, "odt", "algo.refresh_every=60", "algo.refresh_below=1")) == 0
    rows = [row for row in read_metrics(run_dir) if "eva/overlap_mean" in row]
    assert [row["step"] - 40 for row in rows] == [60, 120, 240, 300], "40 for EVA before, 60 of validation after 120"
    assert all(0 < row["eva/overlap_min"] <= row["eva/overlap_mean"] <= 1 for row in rows)


@pytest.mark.slow
def test_self_imitation_clones_anew_from_refreshed_directions(policy_folder: Path, tmp_path: Path) -> None:
    """All of them are new: where an iteration begins, B is zero and uses none."""
    more = ["data=expert", "algo.refresh_every=60", "algo.refresh_below=1", "algo.bc.updates=2", "algo.retries=0"]
    assert main(command(policy_folder, tmp_path / "run", "bc_then_self_imitation", *more)) == 0
    rows = [row for row in read_metrics(tmp_path / "run") if "eva/overlap_mean" in row]
    assert len(rows) == 4
    layers = len(json.loads((tmp_path / "run/eva_report.json").read_text())["layers"])
    assert rows[0]["eva/directions_reinitialised"] == 2 * layers
    assert (
        main(command(policy_folder, tmp_path / "plain", "bc_then_self_imitation", *more, "algo.refresh_every=0")) == 0
    )
    adapters = [load_file(tmp_path / name / "policy/adapter/adapter_model.safetensors") for name in ("run", "plain")]
    first = [adapter[next(name for name in adapter if ".lora_A." in name)] for adapter in adapters]
    assert not torch.allclose(*first, atol=1e-2)


@pytest.mark.slow
def test_directions_are_looked_at_as_at_first(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the covariance where the first ones are."""
    found: list[bool] = []

    def refresh(model: PeftModel, result: EvaResult, threshold: float, gain: str) -> Refresh:
        found.append(result.options.center)
        return refresh_directions(model, result, threshold, gain)

    monkeypatch.setattr(phases, "refresh_directions", refresh)
    more = ["algo.refresh_every=120", "algo.refresh_below=1", "adapter.center=true"]
    assert main(command(policy_folder, tmp_path / "run", "odt", *more)) == 0
    assert found
    assert all(found)


RESIDUAL = ["algo=residual", "algo.distill.rounds=0", "algo.learning_starts=0", "algo.critic_warmup=0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algo=bc", "data=none"], "clones demonstrations"),
        (["algo=odt", "adapter.eva.source=trajectories"], "needs demonstrations"),
        (["algo=odt", "adapter=lora_ga"], "nothing to clone"),
        (["algo=odt", "algo.refresh_every=100", "adapter=lora"], "refreshes EVA's directions"),
        (["algo=odt", "algo.refresh_every=100", "adapter.variant=whiten"], "refreshes EVA's plain directions"),
        ([*RESIDUAL, "algo.refresh_every=100"], "leaves the policy's adapter as it is"),
        (["algo=residual", "algo.env_steps=23800"], "Type algo.env_steps=24000 or more (the actor needs thousands"),
        (["algo=ppo", "algo.rollout_steps=30", "adapter=adalora"], "Stable-Baselines3's"),
        (["algo=odt", "algo.initial_std=50"], "initial_std=50"),
        (["algo=odt", "algo.replay_size=1"], "replay_size"),
        (["algo=dqn"], "dqn"),
        (["algo=ppo", "algo.batch_size=1"], "batch_size=1: expected a number above 1"),
        (["algo=ppo", "algo.rollout_steps=1", "algo.num_envs=1"], "advantages of one env step have no spread"),
        (["algo=ppo", "algo.rollout_steps=121"], "242 env steps. Type algo.env_steps=242 or more"),
        (["algo=bc", "adapter=adalora", "algo.updates=2"], "takes 2; expected at least 3. Raise algo.updates"),
        (
            ["algo=bc", "adapter.variant=rotate", "adapter.rank_caps={q_proj:1}"],
            "adapter.variant=rotate mixes all 2 directions of blocks.0.attention.q_proj, which takes 1 at most",
        ),
        (["algo=bc", "algo.compile=default"], "Install g++, or use algo.compile=none"),
        (
            [*RESIDUAL, "algo.distill.compile=default"],
            "Install g++, or use algo.distill.compile=none",
        ),
        (["algo=odt_td3", "adapter.targets=[]"], "adapter.targets=[] names no layer"),
        (["algo=odt_td3", "adapter.tau=0"], "tau=0.0: expected a number above 0"),
        (["algo=odt_td3", "policy.num_heads=1"], "says its num_heads itself"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: list[str],
    message: str,
    policy_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is collected or played, and in keys that can be typed."""
    monkeypatch.setattr("eva_rl.training.compiling.shutil.which", lambda name: None)
    small = [o for o in SMALL if arguments[0] != "algo=bc" or not o.startswith("algo.")]
    small = [o for o in small if "checkpoint_every" not in o or arguments[0] not in {"algo=dqn", "algo=ppo"}]
    assert main([f"policy={policy_folder}", f"run_dir={tmp_path / 'run'}", *small, *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["bc_then_odt", "bc_then_residual", "bc_then_self_imitation", "odt_td3", "sac"])
def test_a_killed_run_goes_on(algo: str, policy_folder: Path, tmp_path: Path) -> None:
    """Killed with SIGKILL after its first checkpoint, it ends with the weights of one that was left alone."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    others = ["algo.bc.updates=3", "algo.env_steps=480"] if algo.startswith("bc") else ["algo.env_steps=480"]
    assert main(command(policy_folder, whole, algo, *others)) == 0
    arguments = command(policy_folder, killed, algo, *others)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "eva_rl.finetune", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    while process.poll() is None and not list((killed / "checkpoint" / "online").glob("step_*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (killed / "summary.json").exists():  # it was that quick
        assert main(arguments) == 0
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (whole / "policy" / name).read_bytes() == (killed / "policy" / name).read_bytes()
    rows = [row for row in read_metrics(killed) if "eval_cloned/success_rate" not in row]  # of the step before learning
    points = [(row["step"], key) for row in rows for key in row if "/" in key]
    assert len(points) == len(set(points))
    assert len(read_metrics(killed)) - len(rows) == algo.startswith("bc_then_")


@pytest.mark.slow
def test_a_snapshot_is_taken_in_the_middle_of_cloning(policy_folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = command(policy_folder, run_dir, "bc_then_self_imitation", "algo.bc.updates=5", "algo.env_steps=60")
    assert main([*arguments, "algo.snapshot=0.4", "algo.eval_every=0"]) == 0
    assert not [row for row in read_metrics(run_dir) if "validation/success_rate" in row], "nobody asked to validate"
    assert all(row.keys() - {"step", "wall_time"} for row in read_metrics(run_dir)), "no row without a metric"
    snapshot = load_snapshot(run_dir / "snapshot.safetensors")
    assert snapshot is not None
    moved = {name: value for name, value in snapshot.items() if "lora_B" in name}
    assert moved
    assert all(value.abs().max() > 0 for value in moved.values()), "taken after the first gradient step"
    checkpoint = sorted((run_dir / "checkpoint").glob("step_*"))[-1]  # of the end of cloning
    later = load_file(checkpoint / TENSORS_FILE)
    assert all(not torch.equal(later[f"parameter/{name}"], value) for name, value in moved.items())


@pytest.mark.slow
def test_what_is_left_of_another_start_plays_no_retries(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, given = tmp_path / "run", []
    monkeypatch.setattr(phases, "load_snapshot", lambda _: {"left": torch.zeros(1)})

    class Watched(phases.RetryingCollector):
        def __init__(self, *arguments: Any) -> None:
            given.append(arguments[3])
            super().__init__(*arguments)

    monkeypatch.setattr(phases, "RetryingCollector", Watched)
    arguments = command(policy_folder, run_dir, "bc_then_self_imitation", "algo.bc.updates=2", "algo.env_steps=60")
    assert main([*arguments, "algo.snapshot=0"]) == 0
    assert given == [None]


def test_snapshots_are_of_self_imitation_after_cloning() -> None:
    def at(*arguments: str) -> int:
        algo = parse("finetune", ["env=reach-v3", *arguments]).algo
        return phases.snapshot_update(algo)

    assert at("algo=bc_then_self_imitation", "algo.bc.updates=100") == 40
    assert at("algo=bc_then_self_imitation", "algo.bc.updates=100", "algo.snapshot=1") == 99
    assert at("algo=bc_then_self_imitation", "algo.bc.updates=100", "algo.snapshot=0.001") == 1
    assert at("algo=bc_then_self_imitation", "algo.bc.updates=1") == 0
    assert at("algo=bc_then_self_imitation", "algo.snapshot=0") == 0
    assert at("algo=self_imitation") == 0
    assert at("algo=bc_then_odt_td3") == 0


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["bc_then_residual", "bc_then_self_imitation", "odt_td3"])
def test_a_run_goes_on_after_a_worker_process_died(
    algo: str,
    policy_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed after the first checkpoint, a worker ends the run with one message; the same command completes it."""
    run_dir, make = tmp_path / "run", phases.online_envs

    def with_a_killer(*args: Any, **kwargs: Any) -> Any:
        vec_env = make(*args, **kwargs)

        def kill() -> None:
            while not list((run_dir / "checkpoint" / "online").glob("step_*")):
                time.sleep(0.002)
            os.kill(vec_env.processes[1].pid, signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
        return vec_env

    others = ["algo.bc.updates=3"] if algo.startswith("bc") else []
    arguments = command(policy_folder, run_dir, algo, "algo.env_steps=2000", "algo.workers=1", *others)
    with monkeypatch.context() as patched:
        patched.setattr(phases, "online_envs", with_a_killer)
        assert main(arguments) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"reach-v3 .*worker process \d+ ended by signal SIGKILL.*what was learned before is saved", said)
    assert not (run_dir / "summary.json").exists()
    assert main(arguments) == 0
    assert "Before" not in capsys.readouterr().err, "nothing is measured twice"
    assert json.loads((run_dir / "summary.json").read_text())["env_steps"] >= 2000
