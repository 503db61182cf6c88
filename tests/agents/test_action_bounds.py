"""What a policy may do is the task's: its action bounds are held against the environment's by every entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eva_rl import evaluate, load_policy
from eva_rl.agents.policy_folder import save_policy
from eva_rl.batch import InputScaling
from eva_rl.cli.loading import check_alike
from eva_rl.envs import EnvSpec
from eva_rl.errors import UserError
from eva_rl.finetune import command as finetune
from eva_rl.rollouts.evaluation import evaluate_policy
from tests.conftest import make_policy

REFUSED = "Pendulum-v1 takes actions from -2 to 2, the policy acts from -1 to 1."


@pytest.mark.parametrize("make", [InputScaling.create, None])
def test_the_highest_action_lies_within_the_bounds(make: Any) -> None:
    """0.7 became 0.70000005, which an environment that looks at its actions refuses."""
    for low, high in ((-1.0, 0.7), (-1.0, 0.2), (-0.3, 0.1), (0.0, 0.9), (-2.0, 2.0), (-1.0, 1.0)):
        policy = make_policy(3, 1)
        if make is None:
            policy.set_action_bounds(low, high)
        else:
            policy.scaling = make([0.0] * 3, [1.0] * 3, 1.0, [low], [high])
        ends = policy.scaling.raw_actions(torch.tensor([[-1.0], [1.0]])).numpy()
        assert np.float32(low) <= ends[0, 0] <= low + 1e-6
        assert high - 1e-6 <= ends[1, 0] <= np.float32(high)


def test_uneven_bounds_are_saved_as_they_are(tmp_path: Path) -> None:
    policy = make_policy(3, 1)
    for high in (0.1, 0.2, 0.3, 0.7):
        policy.set_action_bounds(-1, high)
        save_policy(tmp_path / str(high), policy)
        again = load_policy(tmp_path / str(high)).scaling
        assert torch.equal(again.action_center, policy.scaling.action_center)
        assert torch.equal(again.action_half_range, policy.scaling.action_half_range)


def test_bounds_are_compared_in_every_dimension() -> None:
    policy = make_policy(3, 2)
    low, high = policy.action_bounds
    np.testing.assert_allclose([low, high], [[-1, -1], [1, 1]])
    policy.check_action_bounds((-1.0, -1.0), (1.0, 1.0), "x")
    policy.check_action_bounds((-np.inf, -1.0), (np.inf, 1.0), "x")
    for bounds in (((-1.0, -2.0), (1.0, 1.0)), ((-0.4, -0.4), (0.4, 0.4)), ((0.0, 0.0), (1.0, 1.0))):
        with pytest.raises(UserError, match="x takes actions from"):
            policy.check_action_bounds(*bounds, "x")
        policy.set_action_bounds(*bounds)
        policy.check_action_bounds(*bounds, "x")
        policy.set_action_bounds(-1, 1)
    for wrong in ((1, -1), (0, 0), (-np.inf, 1), (np.nan, 1)):
        with pytest.raises(UserError, match="low below high"):
            policy.set_action_bounds(*wrong)


def test_python_and_commands_refuse_and_stretch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = make_policy(3, 1)
    with pytest.raises(UserError, match=REFUSED):
        evaluate_policy(policy, "Pendulum-v1", episodes=1, horizon=4)
    save_policy(tmp_path / "base", policy)
    typed = [f"policy={tmp_path / 'base'}", "env=Pendulum-v1", "env.horizon=4", "eval.episodes=1"]
    for main, more in ((evaluate.main, []), (finetune.main, ["algo=odt_td3", f"run_dir={tmp_path / 'run'}"])):
        assert main([*typed, *more]) == 2
        message = " ".join(capsys.readouterr().err.split())
        assert REFUSED in message
        assert "add policy.action_bounds=[-2,2]" in message
    assert not (tmp_path / "run").exists()
    assert evaluate.main([*typed, "policy.action_bounds=[-2,2]"]) == 0
    assert evaluate.main([*typed, "policy.action_bounds=[-2]"]) == 2
    assert "expected two numbers" in " ".join(capsys.readouterr().err.split())
    actions: list[np.ndarray] = []
    policy.set_action_bounds(-2, 2)
    evaluate_policy(policy, "Pendulum-v1", episodes=1, horizon=20, on_actions=actions.append)
    assert np.abs(np.concatenate(actions)).max() <= 2


def test_a_dimension_without_room_is_scaled_to_nothing() -> None:
    """0 / 0 ended training with a loss that is not a number."""
    scaling = InputScaling.create([0], [1], 1, [-1, 0.5], [1, 0.5])
    scaled = scaling.actions(torch.tensor([[0.25, 0.5]]))
    assert scaled.tolist() == [[0.25, 0]]
    assert scaling.raw_actions(scaled).tolist() == [[0.25, 0.5]]


@pytest.mark.parametrize(("low", "high"), [(0.0, np.inf), (-np.inf, np.inf), (-3e38, 3e38)])
def test_actions_without_bounds_are_refused_before_training(low: float, high: float) -> None:
    with pytest.raises(UserError, match="has actions without bounds"):
        check_alike([EnvSpec("Own-v0", 3, 1, (low,), (high,), 10, False, "")])
