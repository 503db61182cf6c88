"""What a run works on: the target return, and what is checked before anything is started."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eva_rl.cli.origin import ORIGIN_FILE, check_origin
from eva_rl.cli.parsing import parse
from eva_rl.data import Trajectories, WindowSampler, write_episodes
from eva_rl.data.selection import target_return
from eva_rl.distributed import ProcessGroup
from eva_rl.errors import UserError
from eva_rl.finetune import command  # noqa: F401 - registers its config
from eva_rl.finetune.adapter import activation_source, attach
from eva_rl.finetune.session import choose_target_return, open_session
from eva_rl.seeding import MAX_SEED
from eva_rl.tracking import Resume
from eva_rl.training.checkpoint import TrainState, save_checkpoint
from eva_rl.training.losses import clone_loss
from tests.conftest import make_policy
from tests.finetune.test_call import data_of


@pytest.mark.parametrize("own", [1000.0, 0.0, -5.0])
def test_with_sparse_rewards_the_network_sees_the_target_that_it_knows(own: float) -> None:
    """Where it knows one that is above zero; else the unit of returns stays."""
    policy, data, env_id = make_policy(), data_of(1.0), "metaworld/reach-v3?reward=sparse"
    policy.set_target_return(own, env_id)
    unit = policy.scaling.return_scale
    choose_target_return(policy, parse("finetune", ["env=reach-v3", "env.reward=sparse"]), data, env_id)
    found = policy.conditioning.of(env_id)
    assert found == target_return(data) == 4
    if own > 0:
        assert found / policy.scaling.return_scale == pytest.approx(own / unit)
    else:
        assert policy.scaling.return_scale == unit


def test_a_run_that_is_refused_leaves_no_worker_behind(policy_folder: Path, tmp_path: Path) -> None:
    write_episodes(tmp_path / "data.h5", data_of(1.0))
    words = [f"policy={policy_folder}", f"data={tmp_path / 'data.h5'}", f"run_dir={tmp_path / 'run'}"]
    words += ["env=reach-v3", "eval.episodes=50", "eval.demonstrations=1", f"data.seed={MAX_SEED}", "threads=1"]
    with pytest.raises(UserError, match="is the seed of the held-out demonstrations"):
        open_session(parse("finetune", words))
    assert multiprocessing.active_children() == []


def test_a_task_without_an_expert_is_refused_first(tmp_path: Path) -> None:
    words = ["policy=hopper", "env=Hopper-v5", f"run_dir={tmp_path / 'run'}", "threads=1"]
    with pytest.raises(UserError, match="No scripted expert for Hopper-v5"):
        open_session(parse("finetune", words))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("source", ["rollouts", "mixed"])
def test_processes_have_an_environment_each(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three with two, two would play one episode, and directions would depend on the number of processes."""
    monkeypatch.setattr(ProcessGroup, "current", classmethod(lambda cls, group=None: cls(0, 3)))
    words = ["env=reach-v3", f"adapter.eva.source={source}", "adapter.eva.rollout_envs=2"]
    with pytest.raises(UserError, match=r"expected at least adapter\.eva\.rollout_envs=3"):
        activation_source(parse("finetune", words), has_data=True)
    assert activation_source(parse("finetune", [*words, "adapter.eva.rollout_envs=3"]), has_data=True) == source
    assert activation_source(parse("finetune", [*words, "adapter=corda"]), has_data=True) == source, "each plays all"
    assert activation_source(parse("finetune", words[::2]), has_data=True) == "trajectories"


def test_what_a_run_builds_on_is_looked_up_once(policy_folder: Path, tmp_path: Path) -> None:
    """Checkpoints hold the replay: each look reads gigabytes, and those of this run are no part of its start."""
    write_episodes(tmp_path / "data.h5", data_of(1.0))
    words = [f"policy={policy_folder}", f"data={tmp_path / 'data.h5'}", "env=reach-v3", "eval.episodes=1", "algo=odt"]
    with open_session(parse("finetune", [*words, f"run_dir={tmp_path / 'run'}", "threads=1"])) as session:
        new = replace(session)
        assert new.resumed is None
        save_checkpoint(session.checkpoint_dir, TrainState(3, {}, {}))
        assert new.resumed is None
        cloned = replace(session)
        assert cloned.resumed == Resume(3, cloning=True)
        save_checkpoint(session.checkpoint_dir / "online", TrainState(40, {}, {}))
        assert cloned.resumed == Resume(3, cloning=True)
        assert replace(session).resumed == Resume(40)


@pytest.mark.parametrize(
    ("words", "loss"),
    [
        (["algo.loss=l1"], "l1"),
        (["algo=bc_then_odt", "algo.bc.loss=l1"], "l1"),
        (["algo=residual", "algo.distill.loss=l1"], "l1"),
        (["algo=odt"], "mse"),
    ],
)
def test_gradients_are_those_of_the_loss_that_is_cloned(
    words: list[str], loss: str, reach_demonstrations: Trajectories
) -> None:
    """LoRA-GA and LoRA-One started from the squared error's, whatever loss they then cloned by."""
    starts = []
    for more in (words, ["algo.loss=" + loss]):
        policy = make_policy()
        config = parse("finetune", ["env=reach-v3", "adapter=lora_one", "adapter.eva.max_batches=1", *more])
        attach(policy, WindowSampler(reach_demonstrations, 6, policy.scaling), config)
        starts.append(policy.network.get_parameter("blocks.0.mlp.up_proj.lora_A.default.weight").detach())
    assert torch.equal(*starts)
    policy = make_policy()
    weight = policy.network.get_parameter("blocks.0.mlp.up_proj.weight")
    clone_loss(policy.network, WindowSampler(reach_demonstrations, 6, policy.scaling).sample(64, 0), loss).backward()
    assert weight.grad is not None
    leading = torch.linalg.svd(weight.grad)[2][0]
    assert float((starts[0][0] @ leading).abs() / starts[0][0].norm()) == pytest.approx(1, abs=1e-4)


def test_a_run_goes_on_with_what_it_began_with(tmp_path: Path) -> None:
    """With other weights or data under the same names it went on, and named the new ones for the whole run."""
    policy, data = make_policy(), data_of(1.0)
    check_origin(tmp_path, policy, data)
    check_origin(tmp_path, policy, data_of(2.0))  # nothing is trained yet
    (tmp_path / "checkpoint").mkdir()
    check_origin(tmp_path, policy, data_of(2.0))
    with pytest.raises(UserError, match=r"unfinished run, and what data= names has changed"):
        check_origin(tmp_path, policy, data)
    with pytest.raises(UserError, match=r"what policy= and data= names has changed"):
        check_origin(tmp_path, make_policy(seed=1), None)
    (tmp_path / ORIGIN_FILE).unlink()  # a run of an earlier version
    check_origin(tmp_path, policy, data)
