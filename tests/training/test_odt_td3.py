"""Twin critics: targets at time limits, the fixed point of a known problem, and problems that must be solved."""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from eva_rl.data import Episode
from eva_rl.data.replay import TrajectoryReplay
from eva_rl.errors import UserError
from eva_rl.training.bc import Extension
from eva_rl.training.critics import CriticEnsemble, fitting_scale, polyak_update, td_targets
from eva_rl.training.learner import step_generators
from eva_rl.training.odt_td3 import TD3DecisionTransformer
from eva_rl.training.online import train_online
from eva_rl.training.options import TD3Options
from tests.conftest import make_policy
from tests.training.problems import Bandit, TwoSteps, make_learner, make_task, mean_return


def test_a_context_of_one_env_step_is_refused() -> None:
    """Its critics had no pair of steps to learn from, and said nothing."""
    with pytest.raises(UserError, match=r"pairs of env steps .* context_length is 1"):
        TD3DecisionTransformer(make_policy(3, 1, context_length=1), TD3Options())


def test_targets_bootstrap_through_time_limits_only() -> None:
    rewards, values = torch.tensor([1.0, 1.0]), torch.tensor([10.0, 10.0])
    targets = td_targets(rewards, torch.tensor([False, True]), values, 0.9)
    assert targets.tolist() == [10.0, 1.0]


def test_the_smaller_of_two_critics_counts() -> None:
    torch.manual_seed(0)
    critics = CriticEnsemble(2, 1, 8, size=3)
    observations, actions = torch.randn(5, 4, 2), torch.randn(5, 4, 1)
    values = critics(observations, actions)
    assert values.shape == (3, 5, 4)
    smaller = critics.min_of(observations, actions, torch.tensor([2, 0]))
    assert torch.allclose(smaller, torch.minimum(values[0], values[2]))
    assert not torch.allclose(smaller, values.amin(0))


def test_a_critic_is_an_mlp_with_layer_normalisation() -> None:
    critics = CriticEnsemble(2, 1, 8, size=2)
    first, second, head = *critics.layers, critics.head
    inputs = torch.randn(5, 3)
    for member in range(2):
        plain = torch.nn.Sequential(
            torch.nn.Linear(3, 8), torch.nn.LayerNorm(8), torch.nn.ReLU(),
            torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.ReLU(), torch.nn.Linear(8, 1),
        )  # fmt: skip
        with torch.no_grad():
            for linear, mine in ((plain[0], first.linear), (plain[3], second.linear), (plain[6], head)):
                linear.weight.copy_(mine.weight[member].T)
                linear.bias.copy_(mine.bias[member, 0])
        expected = plain(inputs).squeeze(-1)
        assert torch.allclose(critics(inputs[:, :2], inputs[:, 2:])[member], expected, atol=1e-6)


def test_targets_move_by_a_share() -> None:
    slow, fast = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with torch.no_grad():
        slow.weight.fill_(0.0)
        fast.weight.fill_(1.0)
    fast.bias.requires_grad_(False)
    kept = slow.bias.clone()
    polyak_update(slow, fast, 0.1)
    assert slow.weight.item() == pytest.approx(0.1)
    assert torch.equal(slow.bias, kept)  # frozen in the source: nothing to follow


def _replay(terminated: bool) -> TrajectoryReplay:
    """Episodes of two env steps, with rewards 1 and 1."""
    replay = TrajectoryReplay(1000, 2, 1, discount=0.5)
    for _ in range(50):
        replay.add(
            Episode(
                observations=np.array([[0, 0], [0, 1], [1, 0]], np.float32),
                actions=np.zeros((2, 1), np.float32),
                rewards=np.ones(2, np.float32),
                terminations=np.array([False, terminated]),
                truncations=np.array([False, not terminated]),
            ),
            asked=1.0,
        )
    return replay


def test_critics_begin_with_the_returns_obtained() -> None:
    options = TD3Options(discount=0.5, critic_learning_rate=5e-3, critic_hidden_size=32, batch_size=16)
    learner = TD3DecisionTransformer(make_learner(), options)
    replay = _replay(terminated=True)
    before = [p.clone() for p in learner.policy.network.parameters()]
    learner.begin_iteration(replay)
    for update in range(200):
        learner.update(replay, update)
    batch = replay.sample_transitions(64, step_generators(0, 0)[0], 4, learner.scaling)
    with torch.no_grad():
        values = learner.target_critics(batch.windows.observations, batch.windows.actions)[0]
    for step, expected in ((0, 1.5 / 1.25), (1, 1 / 1.25)):
        found = values[(batch.windows.timesteps == step) & batch.acted].mean().item()
        assert found == pytest.approx(expected, abs=0.05)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.network.parameters(), strict=True))


def test_a_broken_off_episode_teaches_no_returns() -> None:
    """Its returns end where it was broken off; critics that begin with returns, and the clone, leave it out."""
    replay = TrajectoryReplay(1000, 2, 1)
    broken = Episode(
        observations=np.ones((5, 2), np.float32),
        actions=np.ones((4, 1), np.float32),
        rewards=np.full(4, 100, np.float32),
        terminations=np.zeros(4, bool),
        truncations=np.array([False, False, False, True]),
    )
    replay.add(broken, asked=1.0, complete=False)
    learner = TD3DecisionTransformer(make_learner(), TD3Options(critic_warmup=1, batch_size=4, policy_delay=1))
    assert learner.update(replay, 0)["train/critic_loss"] == 0
    later = learner.update(replay, 1)
    assert later["train/critic_loss"] > 0, "temporal differences need no whole episode"
    assert later["train/clone_loss"] == 0


def test_rewards_of_zero_are_no_scale() -> None:
    """The first reward after them counted as a hundred million."""
    learner, replay = TD3DecisionTransformer(make_learner(), TD3Options(critic_warmup=0)), _replay(terminated=True)
    nothing = TrajectoryReplay(1000, 2, 1, discount=0.5)
    for kept in replay.episodes():
        nothing.add(dataclasses.replace(kept, rewards=np.zeros(2, np.float32)), asked=0.0)
    learner.begin_iteration(nothing)
    learner.update(nothing, 0)
    assert learner._reward_scale == 0
    learner.begin_iteration(replay)
    assert learner.update(replay, 1)["train/critic_loss"] < 10
    assert learner._reward_scale == pytest.approx(1.25)


def test_critics_keep_their_values_when_rewards_get_another_scale() -> None:
    """A first reward that was small, or rare, made all later ones large for ever."""
    torch.manual_seed(0)
    critics, seen, done, paid = CriticEnsemble(3, 2, 16, 2), torch.randn(64, 3), torch.randn(64, 2), torch.randn(64)
    target, optimizer = deepcopy(critics), torch.optim.Adam(critics.parameters(), 1e-2)

    def gradients(scale: float) -> list[Tensor]:
        optimizer.zero_grad()
        (critics(seen, done) - 100 * paid / scale).square().mean().backward()
        return [parameter.grad.clone() for parameter in critics.parameters() if parameter.grad is not None]

    for _ in range(20):
        gradients(1.0)
        optimizer.step()
    before, values, slow = gradients(1.0), critics(seen, done), target(seen, done)
    first = {parameter: deepcopy(optimizer.state[parameter]) for parameter in critics.parameters()}
    assert fitting_scale(1.0, 4.0, critics, target, optimizer) == 1, "not several times as large"
    assert fitting_scale(0.0, 8.0, critics, target, optimizer) == 8, "the first"
    torch.testing.assert_close(critics(seen, done), values, rtol=0, atol=0)
    assert fitting_scale(1.0, 8.0, critics, target, optimizer) == 8
    torch.testing.assert_close(8 * critics(seen, done), values)
    torch.testing.assert_close(8 * target(seen, done), slow)
    last = set(critics.head.parameters())
    for parameter, old, new in zip(critics.parameters(), before, gradients(8.0), strict=True):
        factor = 1 / 8 if parameter in last else 1 / 64
        torch.testing.assert_close(new, factor * old, rtol=1e-4, atol=1e-7)
        now = optimizer.state[parameter]
        torch.testing.assert_close(now["exp_avg"], factor * first[parameter]["exp_avg"])
        torch.testing.assert_close(now["exp_avg_sq"], factor**2 * first[parameter]["exp_avg_sq"])


def test_targets_never_move_beyond_what_they_follow() -> None:
    options = TD3Options(critic_warmup=0, tau=1.0, policy_delay=4, batch_size=4)
    learner, replay = TD3DecisionTransformer(make_learner(), options), _replay(terminated=True)
    for update in range(5):
        learner.update(replay, update)
    for slow, fast in zip(learner.target_network.parameters(), learner.policy.network.parameters(), strict=True):
        assert torch.equal(slow, fast)


def test_the_warm_up_counts_the_policy_s_own_steps() -> None:
    """It was over before the first of them, since the critics' steps counted."""
    options = TD3Options(critic_warmup=20, policy_delay=2, warmup_steps=9, batch_size=4, learning_rate=1.0)
    learner, replay = TD3DecisionTransformer(make_learner(), options), _replay(terminated=True)
    rates = []
    for update in (20, 22):
        learner.update(replay, update)
        rates.append(learner.optimizer.param_groups[0]["lr"])
    assert rates == [pytest.approx(1 / 9), pytest.approx(2 / 9)]


def test_a_resumed_target_network_has_the_policy_s_frozen_weights() -> None:
    """Which another process may have found otherwise, such as singular vectors of another sign."""

    def made(scale: float) -> TD3DecisionTransformer:
        policy = make_learner()
        frozen = policy.network.embed_state.weight.requires_grad_(False)
        learner = TD3DecisionTransformer(policy, TD3Options(critic_hidden_size=8))
        with torch.no_grad():
            for network in (policy.network, learner.target_network):
                network.embed_state.weight.mul_(scale)
        assert frozen is policy.network.embed_state.weight
        return learner

    one, other = made(1.0), made(-1.0)
    with torch.no_grad():  # as the adapter's extension does, just before
        other.policy.network.embed_state.weight.copy_(one.policy.network.embed_state.weight)
    other.restore(one.tensors())
    for name, value in one.target_network.state_dict().items():
        assert torch.equal(other.target_network.state_dict()[name], value), name


def test_an_adapter_s_method_is_told_of_the_policy_s_own_steps() -> None:
    """At every second step of the critics it was told of odd numbers alone, and AdaLoRA never pruned."""

    class Told(Extension):
        steps: ClassVar[list[int]] = []
        learning_rate_factor = None

        def penalty(self) -> torch.Tensor:
            return torch.zeros(())

        def after_step(self, update: int) -> None:
            self.steps.append(update)

        def tensors(self) -> dict[str, torch.Tensor]:
            return {}

        def restore(self, tensors: Any) -> None:
            pass

    options = TD3Options(
        critic_warmup=3, policy_delay=2, batch_size=4, env_steps=50, steps_per_iteration=10, updates_per_iteration=2
    )
    learner, replay = TD3DecisionTransformer(make_learner(), options, extension=Told()), _replay(terminated=True)
    for update in range(6):
        learner.update(replay, update)
    resumed = TD3DecisionTransformer(make_learner(), options, extension=Told())
    resumed.restore(learner.tensors())
    for update in range(6, 10):
        resumed.update(replay, update)
    assert Told.steps == [1, 2, 3]
    assert options.total_updates == 3


@pytest.mark.parametrize(("terminated", "second"), [(True, 1.0), pytest.param(False, None, marks=pytest.mark.slow)])
def test_critics_find_the_values(terminated: bool, second: float | None) -> None:
    """Discounted returns are 1.5 and 1, their mean, 1.25, is what rewards are divided by."""
    policy = make_learner()
    options = TD3Options(
        discount=0.5,
        critic_warmup=0,
        policy_delay=10**6,
        critic_learning_rate=5e-3,
        critic_hidden_size=32,
        target_noise=0.0,
        tau=0.1,
        batch_size=16,
    )
    learner = TD3DecisionTransformer(policy, options)
    replay = _replay(terminated)
    learner.begin_iteration(replay)
    for update in range(250):
        learner.update(replay, update)
    with torch.no_grad():
        batch = replay.sample_transitions(64, step_generators(0, 0)[0], 4, learner.scaling)
        values, *_ = learner.critics(batch.windows.observations, batch.windows.actions)
    last = values[batch.windows.timesteps == 1].mean().item()
    if second is not None:
        first = values[(batch.windows.timesteps == 0) & batch.acted].mean().item()
        assert last == pytest.approx(1 / 1.25, abs=0.05)  # nothing after an end
        assert first == pytest.approx(1.5 / 1.25, abs=0.05)
    else:  # a time limit: what would have followed counts
        assert abs(last - 1 / 1.25) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Bandit, TwoSteps])
def test_small_problems_are_solved(kind: type[gym.Env[Any, Any]]) -> None:
    policy = make_learner()
    before = mean_return(policy, kind)
    options = TD3Options(
        learning_rate=1e-2,
        warmup_steps=10,
        weight_decay=0.0,
        critic_learning_rate=3e-3,
        critic_hidden_size=32,
        critic_warmup=50,
        exploration_noise=0.8,
        tau=0.05,
        q_coef=2.5,
        batch_size=32,
        env_steps=800,
        steps_per_iteration=80,
        updates_per_iteration=20,
    )
    learner = TD3DecisionTransformer(policy, options)
    train_online(learner, TrajectoryReplay(2000, 2, 1), make_task(kind), log=lambda *_: None)
    assert before < kind.solved < mean_return(policy, kind)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_without_the_critics_it_only_clones() -> None:
    """The greedy critic weight at zero: the policy goes where the data are, however little they pay."""
    policy = make_learner()
    learner = TD3DecisionTransformer(
        policy,
        TD3Options(
            learning_rate=5e-3, q_coef=0.0, critic_warmup=0, critic_hidden_size=32, warmup_steps=1, batch_size=32
        ),
    )
    replay = _replay(terminated=True)
    for update in range(200):
        learner.update(replay, update)
    batch = replay.sample(16, np.random.default_rng(0), 4, learner.scaling)
    with torch.no_grad():
        assert policy.network(batch).abs().max().item() < 0.05
