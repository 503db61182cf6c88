"""Cloning: the loss by hand, resuming, and that it learns."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eva_rl.batch import WindowBatch
from eva_rl.data import Trajectories, WindowSampler
from eva_rl.errors import EnvironmentFailedError, UserError
from eva_rl.training.bc import VALIDATION_STEPS, Counters, learning_rate, train_bc
from eva_rl.training.checkpoint import Checkpoints, load_latest_checkpoint
from eva_rl.training.failures import FAILED_BATCH, NOT_FINITE_FILE, failures_kept
from eva_rl.training.losses import clone_loss
from eva_rl.training.options import BCOptions
from tests.conftest import make_policy

OPTIONS = BCOptions(updates=12, batch_size=8, warmup_steps=2, log_every=1)
CHECKPOINT_EVERY = 3


class Constant(torch.nn.Module):
    def forward(self, batch: WindowBatch) -> torch.Tensor:
        return torch.full_like(batch.actions, 0.5)


def hand_made() -> WindowBatch:
    actions = torch.tensor([[[9.0], [0.0], [1.0]], [[0.5], [0.5], [-0.5]]])
    return WindowBatch(
        observations=torch.zeros(2, 3, 2),
        actions=actions,
        returns_to_go=torch.zeros(2, 3, 1),
        timesteps=torch.zeros(2, 3, dtype=torch.long),
        attention_mask=torch.tensor([[False, True, True], [True, True, True]]),
    )


def test_loss_by_hand() -> None:
    batch = hand_made()
    errors = [0.5, 0.5, 0.0, 0.0, 1.0]  # the padded 9.0 does not count
    assert clone_loss(Constant(), batch).item() == pytest.approx(np.mean(np.square(errors)))
    assert clone_loss(Constant(), batch, "l1").item() == pytest.approx(np.mean(errors))
    padded_too = clone_loss(Constant(), replace(batch, attention_mask=None)).item()
    assert padded_too > 10, "counting the padding would show"


def test_loss_prefers_what_the_expert_wanted() -> None:
    batch = replace(hand_made(), target_actions=torch.full((2, 3, 1), 0.5))
    assert clone_loss(Constant(), batch).item() == 0


def test_learning_rate_warms_up_and_follows_a_cosine() -> None:
    options = BCOptions(updates=110, learning_rate=2.0, final_learning_rate=0.1, warmup_steps=10)
    rates = [learning_rate(options, update) for update in range(110)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) * 0.2)
    assert rates[60] == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert rates[-1] == pytest.approx(0.2, rel=0.01)
    assert (np.diff(rates[10:]) < 0).all()


def run(
    data: Trajectories, options: BCOptions, folder: Path | None = None
) -> tuple[dict[str, torch.Tensor], list[dict]]:
    torch.manual_seed(5)
    policy = make_policy()
    policy.network.dropout.p = 0.1  # so that the state of the random generator matters
    sampler = WindowSampler(data, 6, policy.scaling, seed=1)
    logged: list[dict] = []
    checkpoints = Checkpoints(folder, CHECKPOINT_EVERY) if folder else None
    train_bc(policy, sampler, options, log=lambda m, s: logged.append({"step": s, **m}), checkpoints=checkpoints)
    return {k: v.clone() for k, v in policy.network.state_dict().items()}, logged


def test_loss_falls(reach_demonstrations: Trajectories) -> None:
    _, logged = run(reach_demonstrations, replace(OPTIONS, updates=60))
    assert logged[-1]["train/loss"] < 0.5 * logged[0]["train/loss"]


def test_a_point_is_the_mean_since_the_last_one(reach_demonstrations: Trajectories) -> None:
    _, each = run(reach_demonstrations, OPTIONS)
    losses = [row["train/loss"] for row in each]
    _, some = run(reach_demonstrations, replace(OPTIONS, log_every=5))
    assert [row["step"] for row in some] == [1, 5, 10, 12]
    expected = [losses[0], np.mean(losses[1:5]), np.mean(losses[5:10]), np.mean(losses[10:])]
    assert [row["train/loss"] for row in some] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("log_every", "last"), [(1, 6), (5, 9)])
def test_resumed_equals_uninterrupted(
    log_every: int, last: int, tmp_path: Path, reach_demonstrations: Trajectories
) -> None:
    options = replace(OPTIONS, log_every=log_every)
    whole, logged = run(reach_demonstrations, options, tmp_path / "whole")

    class KilledError(Exception):
        pass

    def die(metrics: object, step: int) -> None:
        if step >= 8:
            raise KilledError

    torch.manual_seed(5)
    policy = make_policy()
    policy.network.dropout.p = 0.1
    sampler = WindowSampler(reach_demonstrations, 6, policy.scaling, seed=1)
    with pytest.raises(KilledError):
        train_bc(policy, sampler, options, log=die, checkpoints=Checkpoints(tmp_path / "parts", CHECKPOINT_EVERY))
    state = load_latest_checkpoint(tmp_path / "parts")
    assert state is not None
    assert state.step == last
    torch.manual_seed(99)  # a new process starts elsewhere
    resumed, tail = run(reach_demonstrations, options, tmp_path / "parts")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    assert [row["train/loss"] for row in tail] == [row["train/loss"] for row in logged if row["step"] > last]


@pytest.mark.parametrize(
    ("where", "stopped"),
    [
        ("before", KeyboardInterrupt()),
        ("inside", KeyboardInterrupt()),
        ("inside", EnvironmentFailedError("reach-v3", "at step 3", "it broke")),
    ],
)
def test_an_end_at_a_validation_is_saved_and_the_validation_played_again(
    where: str, stopped: BaseException, tmp_path: Path, reach_demonstrations: Trajectories
) -> None:
    """Nothing was saved where an interruption came while a validation was due or played."""
    logged: list[tuple[int, dict[str, float]]] = []

    def end(metrics: Mapping[str, float], step: int) -> None:
        logged.append((step, dict(metrics)))
        if where == "before" and step == 5 and len(logged) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    def validate(update: int) -> dict[str, float]:
        if where == "inside" and update == 5:
            raise stopped
        return {"validation/success_rate": 1.0, VALIDATION_STEPS: 7.0}

    def train(evaluate: Callable[[int], Mapping[str, float]]) -> Counters:
        torch.manual_seed(5)
        policy = make_policy()
        sampler = WindowSampler(reach_demonstrations, 6, policy.scaling, seed=1)
        saved = Checkpoints(tmp_path, 1000)
        return train_bc(policy, sampler, OPTIONS, log=end, evaluate=evaluate, eval_every=5, checkpoints=saved)

    with pytest.raises(type(stopped)):
        train(validate)
    state = load_latest_checkpoint(tmp_path)
    assert state is not None
    assert state.step == 5
    logged.clear()
    counters = train(lambda _: {"validation/success_rate": 1.0, VALIDATION_STEPS: 7.0})
    assert [step for step, metrics in logged if "validation/success_rate" in metrics] == [5, 10]
    assert [step for step, metrics in logged if "train/loss" in metrics] == list(range(6, 13))
    assert counters.validation_steps == 14


def test_damaged_checkpoint_is_reported_and_the_one_before_used(
    tmp_path: Path, reach_demonstrations: Trajectories, caplog: pytest.LogCaptureFixture
) -> None:
    run(reach_demonstrations, OPTIONS, tmp_path)
    newest = tmp_path / "step_000000012" / "state.safetensors"
    content = bytearray(newest.read_bytes())
    content[-3] ^= 1
    newest.write_bytes(content)
    state = load_latest_checkpoint(tmp_path)
    assert state is not None
    assert state.step == 9
    assert "damaged" in caplog.text
    (tmp_path / "step_000000009" / "state.json").write_text("{")
    with pytest.raises(UserError, match="All checkpoints"):
        load_latest_checkpoint(tmp_path)


def test_only_the_newest_checkpoints_stay(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    run(reach_demonstrations, OPTIONS, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000000009", "step_000000012"]


def test_a_loss_that_is_not_finite_stops_before_it_does_harm(
    tmp_path: Path, reach_demonstrations: Trajectories
) -> None:
    policy = make_policy()
    rewards = reach_demonstrations.rewards.copy()
    rewards[700] = np.nan
    sampler = WindowSampler(replace(reach_demonstrations, rewards=rewards), 6, policy.scaling, seed=1)
    with pytest.raises(UserError, match=r"loss \(nan\).* at step \d+"), failures_kept(tmp_path):
        train_bc(policy, sampler, replace(OPTIONS, updates=200), log=lambda m, s: None)
    assert load_file(tmp_path / FAILED_BATCH)["returns_to_go"].isnan().any()
    assert "is not finite at step" in json.loads((tmp_path / NOT_FINITE_FILE).read_text())["reason"]
    with pytest.raises(UserError, match="of another kind"), failures_kept(tmp_path):
        raise UserError("of another kind: the data are not finite")
    assert not (tmp_path / NOT_FINITE_FILE).exists()
    assert all(torch.isfinite(p).all() for p in policy.network.parameters())
