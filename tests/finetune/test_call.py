from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import eva_rl
from eva_rl import eva
from eva_rl.adapters.switching import AdaptedPolicy
from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.data import Episode, Trajectories
from eva_rl.errors import UserError
from eva_rl.finetune.results import warn_of_worse_data
from eva_rl.rollouts.evaluation import EvaluationResult, evaluate_policy
from tests import forks
from tests.conftest import make_policy
from tests.data.making import random_trajectories

SMALL = {
    "env.horizon": 24,
    "algo.updates": 2,
    "algo.batch_size": 4,
    "adapter.rank": 2,
    "adapter.targets": ["q_proj", "v_proj"],
    "eval.episodes": 2,
    "eval.every": 0,
    "threads": 1,
    "tracker": [],
}


def test_one_call_takes_objects_and_the_next_its_result(
    policy: DecisionTransformerPolicy, reach_demonstrations: Trajectories, tmp_path: Path
) -> None:
    done = eva_rl.finetune_policy(policy, "reach-v3", reach_demonstrations, run_dir=tmp_path / "a b", settings=SMALL)
    assert done.summary["env"] == "metaworld/reach-v3"
    assert done.summary["data"]["episodes"] == 4
    assert done.summary["trainable_parameters"] > 0
    played = evaluate_policy(done.policy, "reach-v3", episodes=2, horizon=24)
    assert played.success_rate == done.summary["eval/success_rate"]
    with pytest.raises(UserError, match="holds a finished run"):
        eva_rl.finetune_policy(policy, "reach-v3", reach_demonstrations, run_dir=done.run_dir, settings=SMALL)
    done.policy.adapters.merge()  # an adapter at work, merged or not, is part of what is fine-tuned next
    again = eva_rl.finetune_policy(
        done.policy, "reach-v3", reach_demonstrations, run_dir=tmp_path / "b", settings=SMALL
    )
    assert again.summary["eval_before/mean_reward"] == pytest.approx(done.summary["eval/mean_reward"], rel=1e-4)
    assert done.policy.adapters.names, "the caller's own is as it was"


def test_the_base_is_fine_tuned_where_no_adapter_is_active(
    policy: DecisionTransformerPolicy, reach_demonstrations: Trajectories, tmp_path: Path
) -> None:
    """Policies that were loaded with adapters for several tasks have none active at first; the call was refused."""
    done = eva_rl.finetune_policy(policy, "reach-v3", reach_demonstrations, run_dir=tmp_path / "a", settings=SMALL)
    assert isinstance(done.policy, AdaptedPolicy)
    done.policy.adapters.use(None)
    again = eva_rl.finetune_policy(
        done.policy, "reach-v3", reach_demonstrations, run_dir=tmp_path / "b", settings=SMALL
    )
    before = "eval_before/mean_reward"
    assert again.summary[before] == done.summary[before]
    assert done.policy.adapters.names, "the caller's own is as it was"


def test_data_are_held_against_the_task_with_its_arguments(tmp_path: Path) -> None:
    """The task was made without them, and refused where it needs some, or is another one with them."""
    settings = {"env.kwargs": {"must": 3}}
    data, env = random_trajectories(dims=(2, 1)), "tests.envs.own_envs:OwnNeedy-v0"
    far = replace(data, actions=5 + data.actions, target_actions=None)
    with pytest.raises(UserError, match=r"actions, row 0: \d.* outside the bounds -2 to 2"):
        eva_rl.finetune_policy("mt40", env, far, run_dir=tmp_path / "a", settings=settings)
    with pytest.raises(UserError, match=r"OwnNeedy-v0\?must=3 has 2 numbers in an observation"):
        eva_rl.finetune_policy("mt40", env, data, run_dir=tmp_path / "b", settings=settings)


def test_policies_show_what_they_are() -> None:
    shown = repr(make_policy())
    assert shown.startswith("DecisionTransformerPolicy(metaworld/reach-v3: 0.0")
    assert "observations 39, actions 4, context 6, target return 1000)" in shown


def test_data_and_results_are_shown_in_a_line() -> None:
    """Not by all their numbers."""
    assert repr(data_of(2.5)) == (
        "Trajectories(test: 1 episode, 4 env steps, observations 39, actions 4, mean return 10)"
    )
    result = evaluate_policy(make_policy(), "metaworld/reach-v3", episodes=1, seed=0, horizon=3)
    assert repr(result).startswith("EvaluationResult(metaworld/reach-v3: 1 episode, mean_reward ")
    found = eva.compute(nn.Linear(4, 3), [torch.randn(16, 4)], targets="all-linear", rank=2)
    assert re.fullmatch(
        r"EvaResult\(1 layers?, \d+ parameters of LoRA, .*% of the variance explained .*\)", repr(found)
    )


def data_of(reward: float) -> Trajectories:
    rewards = np.full(4, reward, np.float32)
    ends = np.arange(4) == 3
    episode = Episode(np.zeros((5, 39), np.float32), np.zeros((4, 4), np.float32), rewards, ends & False, ends)
    return Trajectories.from_episodes([episode], env_id="metaworld/reach-v3", source="test")


def test_data_that_are_worse_than_the_policy_are_said(
    policy: DecisionTransformerPolicy, capsys: pytest.CaptureFixture[str]
) -> None:
    before: EvaluationResult = evaluate_policy(policy, "reach-v3", episodes=1, horizon=24)
    warn_of_worse_data(data_of(before.mean_reward / 40), before)
    assert "cloning will make it worse" in " ".join(capsys.readouterr().err.split())
    warn_of_worse_data(data_of(before.mean_reward), before)
    warn_of_worse_data(None, before)
    assert capsys.readouterr().err == ""
    (episode,) = before.episodes
    negative = replace(before, episodes=(replace(episode, episode_return=-8.0),))
    warn_of_worse_data(data_of(-7.0 / 4), negative)
    assert capsys.readouterr().err == ""
    warn_of_worse_data(data_of(-38.0 / 4), negative)
    assert "cloning will make it worse" in " ".join(capsys.readouterr().err.split())


def test_an_interrupted_call_with_objects_is_continued(
    policy: DecisionTransformerPolicy, reach_demonstrations: Trajectories, tmp_path: Path
) -> None:
    run_dir, settings = tmp_path / "run", SMALL | {"algo.updates": 4, "checkpoint.every": 2}
    call = partial(eva_rl.finetune_policy, env="reach-v3", data=reach_demonstrations, settings=settings)
    assert forks.killed_at_checkpoint(lambda: bool(call(policy, run_dir=run_dir)) - 1, 2, tmp_path / "log"), (
        tmp_path / "log"
    ).read_text()
    with pytest.raises(UserError, match=r"other settings of policy\.path"):
        call(make_policy(seed=1), run_dir=run_dir)
    with pytest.raises(UserError, match=r"other settings of data\.source"):
        call(policy, data=data_of(1.0), run_dir=run_dir)
    done = call(policy, run_dir=run_dir)
    whole = call(policy, run_dir=tmp_path / "whole")
    assert done.summary["eval/mean_reward"] == whole.summary["eval/mean_reward"]
    for given in (done.summary["policy"], done.summary["data"]["source"]):
        assert Path(given).exists()


@pytest.mark.parametrize("key", ["run_dir", "env", "env.id", "policy.path", "data", "adapter.method"])
def test_settings_do_not_override_arguments(key: str, tmp_path: Path) -> None:
    """It trained in the other folder, and looked for the result in the first."""
    with pytest.raises(UserError, match=r"that is an argument of its own\. Give \w+=\.\.\. instead"):
        eva_rl.finetune_policy("mt40-small", "reach-v3", run_dir=tmp_path / "run", settings={key: "x"})
    assert not (tmp_path / "run").exists()


def test_settings_are_whole_keys(tmp_path: Path) -> None:
    settings = {"algo": {"updates": 3}}
    with pytest.raises(UserError, match=r"write the whole key, algo\.updates"):
        eva_rl.finetune_policy("mt40-small", "reach-v3", run_dir=tmp_path / "run", settings=settings)


def test_arrays_are_data_and_networks_are_no_policy(tmp_path: Path) -> None:
    steps = {"observations": np.zeros((4, 39)), "actions": np.full((4, 4), 2.0), "rewards": np.zeros(4)}
    with pytest.raises(UserError, match="outside the bounds -1 to 1"):  # read, and found wanting
        eva_rl.finetune_policy(make_policy(), "reach-v3", steps, run_dir=tmp_path / "run", settings=SMALL)
    network: Any = nn.Linear(3, 3)
    with pytest.raises(UserError, match="policy is a Linear: expected the name or the folder of a policy"):
        eva_rl.finetune_policy(network, "reach-v3", run_dir=tmp_path / "other")
    with pytest.raises(UserError, match="Unknown policy"):
        eva_rl.load_policy("x" * 300)


def test_a_folder_that_is_refused_is_left_as_it_was(policy: DecisionTransformerPolicy, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run of eva-rl"):
        eva_rl.finetune_policy(policy, "reach-v3", run_dir=tmp_path, settings=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
