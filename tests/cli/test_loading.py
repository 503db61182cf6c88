"""Policies of other projects from the command line: the normalisation that their folders do not hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eva_rl.agents import export_huggingface, load_base_policy, save_policy
from eva_rl.cli.loading import describe_demonstrations, load_task_data, open_policy, unused_for_files
from eva_rl.configs.groups import DataOptions, PolicyOptions
from eva_rl.data import Trajectories, write_episodes
from eva_rl.envs import env_spec
from eva_rl.errors import UserError
from eva_rl.evaluate import main as evaluate
from eva_rl.finetune.command import main as finetune
from tests.conftest import make_policy

CPU = torch.device("cpu")


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder as Hugging Face's hub has them: config and weights."""
    export_huggingface(make_policy(), tmp_path / "hf")
    (tmp_path / "hf/eva_rl.json").unlink()
    return tmp_path / "hf"


@pytest.fixture
def file(tmp_path: Path, reach_demonstrations: Trajectories) -> Path:
    write_episodes(tmp_path / "reach.h5", reach_demonstrations)
    return tmp_path / "reach.h5"


def test_keys_for_each_number(foreign: Path) -> None:
    options = PolicyOptions(path=str(foreign), target_return=5.0, return_scale=200.0)
    with pytest.raises(UserError, match=r"policy\.observation_mean=\[\.\.\.\].*policy\.observations_from=SOURCE"):
        open_policy(options, CPU)
    options = replace(options, observation_mean=[0.5], observation_std=[float(i + 1) for i in range(39)])
    policy = open_policy(options, CPU)
    assert policy.scaling.observation_mean.tolist() == [0.5] * 39
    assert policy.scaling.observation_std.tolist() == list(range(1, 40))
    assert (policy.scaling.return_scale, policy.conditioning.target_return) == (200.0, 5.0)
    with pytest.raises(UserError, match=r"observation_std\[0\] is -1"):
        open_policy(replace(options, observation_std=[-1.0]), CPU)
    with pytest.raises(UserError, match="expected one of them"):
        open_policy(replace(options, observations_from="x.h5"), CPU)


def test_statistics_of_data(foreign: Path, file: Path, reach_demonstrations: Trajectories) -> None:
    policy = open_policy(PolicyOptions(path=str(foreign), target_return=5.0, observations_from=str(file)), CPU)
    expected = torch.tensor(reach_demonstrations.observations)
    torch.testing.assert_close(policy.scaling.observation_mean, expected.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(policy.scaling.observation_std, expected.std(0, correction=0) + 1e-6, atol=1e-5, rtol=0)


def test_demonstrations_are_described_and_odd_ones_warned_of(
    reach_demonstrations: Trajectories, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    policy, spec = make_policy(), env_spec("reach-v3")
    high = float(reach_demonstrations.returns.max())
    policy.set_target_return(high, spec.env_id)
    policy.scaling = replace(policy.scaling, return_scale=high)
    describe_demonstrations(reach_demonstrations, policy, spec)
    number = reach_demonstrations.num_episodes
    assert f"Demonstrations: {number} episodes, returns from" in " ".join(capsys.readouterr().err.split())
    assert caplog.text == ""
    describe_demonstrations(reach_demonstrations, policy, env_spec("reach-v3", 10))
    assert (
        f"an episode has {reach_demonstrations.lengths.max()} env steps, and metaworld/reach-v3 ends after 10"
        in caplog.text
    )
    policy.set_target_return(-high, spec.env_id)
    policy.scaling = replace(policy.scaling, return_scale=high / 1000)
    describe_demonstrations(reach_demonstrations, policy, spec)
    assert "lies far from what the demonstrations return" in caplog.text
    assert "it would see numbers up to 1000" in caplog.text


def test_keys_of_collecting_are_not_ignored_beside_a_file(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A study of five demonstrations trained on the whole file, the same for all seeds."""
    options = DataOptions(source=str(file), episodes=2)
    whole = load_task_data("reach-v3", options, tmp_path)
    assert "data.episodes=2 says how many episodes to collect" in caplog.text
    assert "Use data.sample=2 to draw so many" in caplog.text
    assert unused_for_files(replace(options, episodes=25)) == ""
    assert "Leave them out" in unused_for_files(replace(options, episodes=25, only_successes=False))
    options = replace(options, episodes=25, sample=1)
    drawn = [load_task_data("reach-v3", replace(options, seed=seed), tmp_path) for seed in range(9)]
    assert {data.num_episodes for data in drawn} == {1}
    assert whole.num_episodes > 1 < len({float(data.returns[0]) for data in drawn})


def test_own_policies_have_their_own(tmp_path: Path) -> None:
    save_policy(tmp_path / "own", make_policy())
    with pytest.raises(UserError, match=r"says its observation_mean, observation_std itself"):
        open_policy(PolicyOptions(path=str(tmp_path / "own"), observation_mean=[0.0], observation_std=[1.0]), CPU)


def test_the_commands_take_them(foreign: Path, file: Path, tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    shared: list[Any] = [f"policy={foreign}", "env=reach-v3", "env.horizon=5", "eval.episodes=1", "device=cpu"]
    given = ["policy.observation_mean=[0]", "policy.observation_std=[1]", "policy.target_return=9"]
    assert evaluate([*shared, *given]) == 0
    assert evaluate([*shared, *given[:2], "targets=[9]"]) == 0
    assert evaluate(shared) == 2
    run = [*shared, f"data={file}", f"run_dir={tmp_path / 'run'}", "algo.updates=1", "adapter=head", "tracker=[]"]
    assert finetune([*run, "policy.observations_from=data"]) == 0
    policy = load_base_policy(tmp_path / "run")
    expected = torch.tensor(reach_demonstrations.observations).mean(0)
    torch.testing.assert_close(policy.scaling.observation_mean, expected, atol=1e-5, rtol=0)
    assert policy.conditioning.target_return == pytest.approx(policy.conditioning.of("metaworld/reach-v3"))
    assert policy.conditioning.target_return > 0
