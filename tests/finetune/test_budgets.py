"""Held-out success at several numbers of updates within a run, held-out cloning loss, and work that runs share."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eva_rl.cli.parsing import parse
from eva_rl.data import Trajectories, WindowSampler
from eva_rl.errors import UserError
from eva_rl.finetune import command as finetune
from eva_rl.finetune.adapter import attach
from eva_rl.report.runs import read_run
from eva_rl.report.verdicts import held_out
from tests.conftest import make_policy

TINY = ["env=reach-v3", "data.episodes=2", "data.workers=1", "data.only_successes=false", "algo.batch_size=4"]
TINY += ["eval.episodes=3", "eval.every=0", "env.horizon=30", "tracker=[]", "adapter.targets=[q_proj]"]

AT = "eval.at=[60,170,240]"


def run(base: Path, folder: Path, *more: str) -> dict[str, Any]:
    assert finetune.main([*TINY, f"policy={base}", f"run_dir={folder}", *more]) == 0
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def rows(folder: Path) -> dict[int, dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in found if "eval/success_rate" in row}


@pytest.mark.slow
def test_budgets_are_the_ends_of_shorter_looks_at_the_same_run(policy_folder: Path, tmp_path: Path) -> None:
    """Evaluating on the way changes nothing of the end, and shared work is the same work."""
    shared = f"shared={tmp_path / 'shared'}"
    budgets = ["algo.updates=6", "eval.at=[2,4,6]", "eval.demonstrations=1", shared]
    one = run(policy_folder, tmp_path / "one", "adapter=eva", *budgets)
    plain = run(policy_folder, tmp_path / "plain", "adapter=eva", "algo.updates=6")
    for key in ("eval/mean_reward", "eval/success_rate", "eval_before/mean_reward"):
        assert one[key] == plain[key]
    assert list(one["eval_at"]) == ["2", "4", "6"]
    curve = rows(tmp_path / "one")
    assert sorted(curve) == [0, 2, 4, 6]
    assert curve[2]["eval/mean_reward"] == one["eval_at"]["2"]["eval/mean_reward"] != curve[6]["eval/mean_reward"]
    assert one["eva/gain"] > 0, "measured, though the pass is read from a file"
    losses = [curve[step]["eval/cloning_loss"] for step in (0, 2, 4, 6)]
    assert losses[-1] == one["eval/cloning_loss"]
    assert len(set(losses)) == 4
    other = run(policy_folder, tmp_path / "other", "adapter=lora", "study=abc", *budgets)
    assert other["shared"]["before"] == one["shared"]["before"]
    assert other["data"]["hash"] == one["data"]["hash"] == plain["data"]["hash"]
    assert other["study"] == "abc"
    again = run(policy_folder, tmp_path / "again", "adapter=eva", *budgets)  # reads all three
    same = ("eval/mean_reward", "eval/cloning_loss", "eval_before/mean_reward", "shared", "eval_at")
    assert {key: again[key] for key in same} == {key: one[key] for key in same}
    made = {kind.name: [p.name for p in kind.iterdir() if p.is_dir()] for kind in (tmp_path / "shared").iterdir()}
    assert {kind: len(found) for kind, found in made.items()} == {"data": 2, "before": 1, "eva": 1}


@pytest.mark.slow
@pytest.mark.parametrize("algo", [["algo=bc_then_odt"], ["algo=bc_then_self_imitation", "algo.retries=0"]])
def test_evaluating_an_online_run_on_the_way_changes_nothing_of_it(
    policy_folder: Path, tmp_path: Path, algo: list[str]
) -> None:
    """Neither what it learns nor the env steps that it counts, those of its own validation included."""
    online = [*algo, "algo.env_steps=240", "algo.steps_per_iteration=60", "algo.num_envs=2"]
    online += ["algo.updates_per_iteration=2", "algo.bc.updates=2", "algo.bc.batch_size=4", "algo.eval_every=120"]
    runs = [run(policy_folder, tmp_path / name, *online, at) for name, at in [("plain", "eval.at=[]"), ("one", AT)]]
    same = ("eval/mean_reward", "eval_cloned/mean_reward", "updates", "env_steps_played", "env_steps")
    assert {key: runs[0][key] for key in same} == {key: runs[1][key] for key in same}
    weights = [(tmp_path / name / "policy/adapter/adapter_model.safetensors").read_bytes() for name in ("plain", "one")]
    assert weights[0] == weights[1]
    measured = sorted(rows(tmp_path / "one"))
    assert rows(tmp_path / "plain").keys() == {0, measured[-1]}
    assert len(measured) == 4, "after cloning, twice on the way, at the end"
    assert 60 <= measured[1] < measured[2] < measured[3] == runs[1]["env_steps_played"]
    early, late, end = map(int, runs[1]["eval_at"])
    assert 60 <= early < 170 <= late < end == runs[1]["env_steps"], "of training alone"
    points = held_out(read_run(tmp_path / "one")[0], "mean_reward")
    assert points[:, 0].tolist() == [0, early, late, end]
    assert points[0, 1] == runs[1]["eval_cloned/mean_reward"]
    assert rows(tmp_path / "one")[0]["eval/mean_reward"] == runs[1]["eval_cloned/mean_reward"]


@pytest.mark.slow
def test_a_shared_pass_can_be_given_another_gain(policy_folder: Path, tmp_path: Path) -> None:
    shared = [f"shared={tmp_path / 'shared'}", "algo.updates=1"]
    own = run(policy_folder, tmp_path / "own", "adapter=eva", *shared)["eva/gain"]
    lora = run(policy_folder, tmp_path / "lora", "adapter=lora", *shared)["eva/gain"]
    rescaled = run(policy_folder, tmp_path / "rescaled", "adapter=eva", "adapter.gain=lora", *shared)["eva/gain"]
    assert rescaled == pytest.approx(lora, rel=0.5)
    assert own > 3 * rescaled


def test_a_pass_without_its_moments_gives_the_same_scale(reach_demonstrations: Trajectories) -> None:
    """As read from a file; it ended before the last batch that it could have taken."""
    config = parse("finetune", ["env=reach-v3", "adapter=eva", "adapter.gain=lora", "adapter.tau=0.5"])
    found = []
    for kept in (True, False):
        policy = make_policy()
        data = WindowSampler(reach_demonstrations, 6, policy.scaling)
        adapter = attach(policy, data, config, lambda run, kept=kept: run() if kept else replace(run(), moments={}))
        assert adapter.eva is not None
        assert adapter.eva.batches < config.adapter.eva.max_batches
        found.append({n: p.detach() for n, p in policy.network.named_parameters() if ".lora_A." in n})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("at", ["[0]", "[300]"])
def test_budgets_lie_within_the_run(at: str) -> None:
    with pytest.raises(UserError, match="expected gradient steps from 1 to 100"):
        parse("finetune", [f"eval.at={at}"])
    with pytest.raises(UserError, match="expected env steps from 1 to 50"):
        parse("finetune", [f"eval.at={at}", "algo=odt", "algo.env_steps=50"])
    with pytest.raises(
        UserError,
        match=r"eval\.every=10 counts gradient steps of cloning, .*Type eval\.every=0, .*algo\.eval_every=STEPS",
    ):
        parse("finetune", ["env=reach-v3", "algo=odt", "eval.every=10"])
    with pytest.raises(UserError, match="algo=residual is not evaluated on the held-out episodes while it learns"):
        parse("finetune", ["eval.at=[10]", "algo=residual"])
