"""Online Decision Transformer: its loss on a batch computed by hand, its temperature, and problems it must solve."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from eva_rl.data import Episode
from eva_rl.data.replay import TrajectoryReplay
from eva_rl.training.odt import OnlineDecisionTransformer, odt_loss
from eva_rl.training.online import train_online
from eva_rl.training.options import ODTOptions
from tests.training.problems import Bandit, TwoSteps, make_learner, make_task, mean_return


def test_loss_of_a_batch_computed_by_hand() -> None:
    # one window of two steps, the first of them padding; one action dimension; mean 0, deviation 1/2
    mean, log_std = torch.zeros(1, 2, 1), torch.full((1, 2, 1), math.log(0.5))
    actions = torch.tensor([[[0.9], [math.tanh(0.5)]]])
    mask = torch.tensor([[False, True]])
    found = odt_loss((mean, log_std), actions, mask, torch.Generator().manual_seed(3))
    # log N(0.5; 0, 1/2) = -1/2 - log(1/2) - log(2 pi)/2, and the tanh takes log(1 - tanh(0.5)^2) away
    log_prob = -0.5 - math.log(0.5) - 0.5 * math.log(2 * math.pi) - math.log(1 - math.tanh(0.5) ** 2)
    assert found.likelihood.item() == pytest.approx(-log_prob, abs=1e-5)
    noise = torch.randn(1, 2, 1, generator=torch.Generator().manual_seed(3))[0, 1, 0].item()
    raw = 0.5 * noise
    entropy = 0.5 * noise**2 + math.log(0.5) + 0.5 * math.log(2 * math.pi) + math.log(1 - math.tanh(raw) ** 2)
    assert found.entropy.item() == pytest.approx(entropy, abs=1e-5)
    everything = odt_loss((mean, log_std), actions, None, torch.Generator().manual_seed(3))
    assert everything.likelihood.item() != pytest.approx(found.likelihood.item(), abs=1e-3)


@pytest.mark.parametrize(("target", "grows"), [(5.0, True), (-50.0, False)])
def test_the_temperature_defends_the_entropy(target: float, grows: bool) -> None:
    policy = make_learner(stochastic=True)
    options = ODTOptions(
        target_entropy=target, initial_temperature=0.1, env_steps=64, steps_per_iteration=32, updates_per_iteration=10
    )
    learner = OnlineDecisionTransformer(policy, options)
    replay = TrajectoryReplay(1000, 2, 1)
    task = make_task(Bandit)
    train_online(learner, replay, task, log=lambda *_: None)
    temperature = learner.update(replay, 100)["train/temperature"]
    assert (temperature > 0.1) == grows


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Bandit, TwoSteps])
def test_small_problems_are_solved(kind: type[gym.Env[Any, Any]]) -> None:
    """On average: one seed of three ends below what counts as solved in the second."""
    options = ODTOptions(
        learning_rate=3e-3,
        warmup_steps=10,
        weight_decay=0.0,
        initial_temperature=0.1,
        env_steps=1280,
        steps_per_iteration=80,
        updates_per_iteration=20,
    )
    returns = []
    for seed in range(3):
        policy = make_learner(stochastic=True)
        before = mean_return(policy, kind)
        learner = OnlineDecisionTransformer(policy, options, seed=seed)
        counters = train_online(learner, TrajectoryReplay(2000, 2, 1), make_task(kind), log=lambda *_: None)
        assert counters.env_steps == 1280
        assert counters.update == 320
        returns.append(mean_return(policy, kind))
    assert before < kind.solved < np.mean(returns)  # type: ignore[attr-defined]


def test_draws_depend_on_the_step_alone() -> None:
    replay = TrajectoryReplay(1000, 2, 1)
    policies = [make_learner(stochastic=True) for _ in range(2)]
    for policy in policies:
        learner = OnlineDecisionTransformer(
            policy, ODTOptions(env_steps=64, steps_per_iteration=64, learning_starts=100), seed=3
        )
        if not replay.num_episodes:
            train_online(learner, replay, make_task(Bandit), log=lambda *_: None)
        np.random.default_rng().random()
        torch.randn(7)
        learner.update(replay, 5)
    for first, second in zip(*(p.network.parameters() for p in policies), strict=True):
        assert torch.equal(first, second)


def test_labels_are_cloned_rather_than_disturbed_actions() -> None:
    """Demonstrations with noise on their actions say what the expert wanted."""
    steps = np.zeros(8, np.float32)
    last = np.arange(8) == 7
    noisy = Episode(
        observations=np.zeros((9, 2), np.float32),
        actions=steps[:, None] - 0.6,
        rewards=steps + 1,
        terminations=last & False,
        truncations=last,
        target_actions=steps[:, None] + 0.6,
    )
    policy = make_learner(stochastic=True)
    learner = OnlineDecisionTransformer(policy, ODTOptions(batch_size=8, warmup_steps=1, learning_rate=3e-3))
    replay = TrajectoryReplay(100, 2, 1)
    replay.extend([noisy], 8.0)
    for update in range(60):
        learner.update(replay, update)
    batch = replay.sample(8, np.random.default_rng(0), 4, policy.scaling)
    assert policy.network.eval()(batch).mean().item() > 0.4
