"""Residual learning: what it begins with, what its critics are taught, and problems with known solutions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eva_rl.batch import NStepBatch
from eva_rl.data import Episode
from eva_rl.training.online import train_online
from eva_rl.training.options import ResidualOptions
from eva_rl.training.residual.embeddings import StateActionEncoder
from eva_rl.training.residual.learner import ResidualLearner
from eva_rl.training.residual.playback import FEATURES, PROPOSALS, TARGETS, played_through
from tests.training.problems import Bandit, LinearQuadratic, TwoSteps, make_learner, make_task

QUICK: dict[str, Any] = {
    "learning_rate": 3e-3,
    "critic_learning_rate": 3e-3,
    "warmup_steps": 1,
    "critic_hidden_size": 32,
    "actor_hidden_size": 32,
    "embedding_size": 16,
    "critics": 3,
    "critic_warmup": 100,
    "policy_delay": 2,
    "learning_starts": 160,
    "scale": 1.0,
    "tau": 0.02,
    "batch_size": 64,
    "env_steps": 960,
    "size_coef": 0.0,
    "pessimism": 0.0,
    "steps_per_iteration": 80,
    "updates_per_iteration": 60,
    "exploration_noise": 0.5,
    "checkpoint_every": 0,
    "stop_at_success": False,
}


def test_the_actor_settles_at_the_end() -> None:
    options = ResidualOptions(**QUICK | {"batch_size": 8, "critic_hidden_size": 8, "actor_hidden_size": 8})
    learner = ResidualLearner(make_learner(), options, env_id="problem")
    train_online(learner, learner.new_replay(2000), make_task(TwoSteps), log=lambda *_: None)
    steps = learner._actor_steps
    assert steps == (11 * 60 - 100) / 2, "eleven iterations, less the critics' warm-up"
    assert [round(learner.schedule(part * steps // 4), 6) for part in range(1, 5)] == [1, 1, 0.5, 0]
    learner._residual = replace(options, decay=0.0)
    assert learner.schedule(steps - 1) == 1


@pytest.mark.parametrize(("begins", "expected"), [(160, 280), (480, 160)])
def test_it_settles_at_the_end_however_late_it_begins(begins: int, expected: int) -> None:
    """Learning may begin later than ``learning_starts``."""
    learner = ResidualLearner(make_learner(), ResidualOptions(**QUICK), env_id="problem")
    assert learner.options.total_updates == 280
    for index, env_steps in enumerate(range(begins, 961, 80)):
        assert learner.begin_iteration(learner.new_replay(10), env_steps=env_steps, updates=60 * index) == 60
        assert learner._actor_steps_planned == expected, "on time, and in a resumed run, too"
    assert [learner.schedule(update) for update in (0, expected)] == [1, 0]


def episode(length: int, *, terminated: bool, solved: bool = False) -> Episode:
    """Rewards 1, 2, 3, ...; observations, features and proposals tell the env step."""
    steps = np.arange(length, dtype=np.float32)
    last = steps == length - 1
    return Episode(
        observations=np.stack([np.arange(length + 1), np.ones(length + 1)], 1).astype(np.float32),
        actions=steps[:, None] / 100,
        rewards=steps + 1,
        terminations=last & terminated,
        truncations=last & (not terminated),
        successes=last & solved,
        extras={
            FEATURES: np.repeat(steps[:, None], 16, 1),
            PROPOSALS: steps[:, None] / 10,
            TARGETS: steps[:, None] / 100,
        },
    )


def all_transitions(kept: Episode, n: int, solved_value: float = 0.0) -> dict[int, tuple[float, float, float]]:
    """Return, discount and place of the last observation, for each first step that is ever drawn (gamma is 0.5)."""
    learner = ResidualLearner(make_learner(), ResidualOptions(**QUICK))
    replay = learner.new_replay(100)
    replay.add(kept, asked=1.0)
    batch = replay.sample_n_step(
        200, np.random.default_rng(0), learner.scaling, n=n, discount=0.5, solved_value=solved_value
    )
    found = {}
    for i in range(200):
        first, last = int(batch.observations[i, 0]), float(batch.next_observations[i, 0])
        assert batch.extras[FEATURES][i, 0] == first
        assert batch.actions[i, 0] == pytest.approx(first / 100)
        if batch.discounts[i] > 0 and last < len(kept.rewards):
            assert batch.next_extras[PROPOSALS][i, 0] == pytest.approx(last / 10)
        found[first] = (batch.returns[i].item(), batch.discounts[i].item(), last)
    return found


def test_n_steps_end_at_a_termination_and_nothing_follows() -> None:
    found = all_transitions(episode(4, terminated=True), n=3)
    assert found == {
        0: (1 + 2 / 2 + 3 / 4, 1 / 8, 3.0),
        1: (2 + 3 / 2 + 4 / 4, 0.0, 4.0),
        2: (3 + 4 / 2, 0.0, 4.0),
        3: (4.0, 0.0, 4.0),
    }


def test_n_steps_end_at_a_truncation_and_the_value_goes_on() -> None:
    assert all_transitions(episode(4, terminated=False), n=3) == {
        0: (1 + 2 / 2 + 3 / 4, 1 / 8, 3.0),
        1: (2 + 3 / 2 + 4 / 4, 1 / 8, 4.0),
        2: (3 + 4 / 2, 1 / 4, 4.0),
        3: (4.0, 1 / 2, 4.0),
    }


@pytest.mark.parametrize("length", [1, 3, 6])
def test_what_the_policy_would_propose_after_a_truncation_is_kept(length: int) -> None:
    """It is what it proposes there when it plays on, with contexts shorter and longer than its own (4)."""
    learner = ResidualLearner(make_learner(), ResidualOptions(**QUICK), env_id="problem")
    cut = episode(length, terminated=False)
    longer = replace(
        cut,
        observations=np.concatenate([cut.observations, np.ones((1, 2), np.float32)]),
        actions=np.concatenate([cut.actions, [[0.5]]]).astype(np.float32),
        rewards=np.append(cut.rewards, np.float32(1)),
        terminations=np.zeros(length + 1, bool),
        truncations=np.arange(length + 1) == length,
        extras={},
    )
    (played,) = played_through(learner.policy, "problem", [longer])
    replay = learner.new_replay(100)
    replay.add(cut, asked=learner.policy.conditioning.of("problem"))
    for name in (FEATURES, PROPOSALS):
        np.testing.assert_allclose(replay.extras[name][length], played.extras[name][length], atol=1e-5)


class Endless(TwoSteps):
    """An env step that is always the same, and no end in sight: ``place`` grows by one."""

    def reset(self, **_: Any) -> tuple[NDArray[np.float32], dict[str, Any]]:
        self.place = 0.0
        return np.array([0, 0], np.float32), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        self.place += 1
        return np.array([self.place, 0], np.float32), self.place, False, False, {}


def test_episodes_under_way_are_learned_from() -> None:
    """From the first iteration on, each env step once, and the last one bootstraps where the episode has come to."""
    options = ResidualOptions(**QUICK | {"env_steps": 240, "learning_starts": 80, "n_step": 2, "critic_warmup": 0})
    learner, drawn = ResidualLearner(make_learner(), options, env_id="problem"), list[NStepBatch]()
    draw = learner._draw

    def watched(*args: Any) -> tuple[NStepBatch, torch.Generator]:
        batch, generator = draw(*args)
        drawn.append(batch)
        return batch, generator

    learner._draw = watched  # type: ignore[method-assign]
    replay = learner.new_replay(2000)
    counters = train_online(learner, replay, make_task(Endless), log=lambda *_: None)
    assert counters.update == 3 * 60, "8 environments of 10 env steps an iteration, none of whose episodes has ended"
    for number in range(3):
        seen = drawn[60 * number : 60 * (number + 1)]
        places = np.concatenate([batch.observations[:, 0].numpy() for batch in seen])
        later = np.concatenate([batch.next_observations[:, 0].numpy() for batch in seen])
        assert set(places) == set(range(10 * (number + 1)))
        np.testing.assert_array_equal(later, np.minimum(places + 2, 10 * (number + 1)))
        assert all((batch.discounts > 0).all() for batch in seen)
    assert replay.num_steps == 240, "they are stored once, where the last iteration cuts them"
    for batch in drawn:
        place, at_end = batch.observations[:, 0], batch.next_observations[:, 0] - batch.observations[:, 0] == 1
        torch.testing.assert_close(batch.returns, place + 1 + torch.where(at_end, 0, 0.99 * (place + 2)))
    last = drawn[-1].next_observations[:, 0] == 30
    for name in (FEATURES, PROPOSALS):
        ends = torch.from_numpy(replay.extras[name][30 : 31 * 8 : 31])
        assert float(torch.cdist(drawn[-1].next_extras[name][last], ends).amin(1).max()) < 1e-4, name


def test_a_success_is_worth_what_is_said() -> None:
    found = all_transitions(episode(3, terminated=True, solved=True), n=2, solved_value=10.0)
    assert found[0] == (1 + 2 / 2, 1 / 4, 2.0)
    assert found[1] == (2 + 3 / 2 + 10 / 4, 0.0, 3.0)
    assert found[2] == (3 + 10 / 2, 0.0, 3.0)
    unsolved = all_transitions(episode(3, terminated=True), n=2, solved_value=10.0)
    assert unsolved[2] == (3.0, 0.0, 3.0)


def test_targets_are_those_computed_by_hand() -> None:
    """The smaller of two members on the averaged actor's action, discounted, plus scaled rewards."""
    options = ResidualOptions(**QUICK | {"critics": 2, "target_noise": 0.0, "scale": 0.5})
    learner = ResidualLearner(make_learner(), options)
    with torch.no_grad():
        learner.target_actor.head.bias.fill_(0.3)
    replay = learner.new_replay(100)
    replay.add(episode(4, terminated=True), asked=1.0)
    learner.begin_iteration(replay)
    batch, generator = learner._draw(replay, update=0)
    found = learner.targets(batch, generator)
    assert learner.target_encoder is not None
    embedded = learner.target_encoder.of_observations(batch.next_observations)
    embedded = embedded / embedded.abs().mean(1, keepdim=True)
    hidden = torch.cat([batch.next_observations, batch.next_extras[PROPOSALS]], 1)
    features = torch.nn.functional.layer_norm(batch.next_extras[FEATURES], (16,))
    actions = batch.next_extras[PROPOSALS] + 0.5 * torch.tanh(
        learner.target_actor.head(learner.target_actor.trunk(torch.cat([hidden, features, embedded], 1)))
    )
    pairs = learner.target_encoder.of_pairs(torch.cat([embedded, actions.clamp(-1, 1)], 1))
    values = []
    for member in range(2):
        x = torch.cat([batch.next_observations, embedded, pairs, actions.clamp(-1, 1)], 1)
        for layer in learner.target_critics.layers:
            x = x @ layer.linear.weight[member] + layer.linear.bias[member]
            centred = x - x.mean(1, keepdim=True)
            x = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * layer.scale[member]
            x = (x + layer.shift[member]).clamp(min=0)
        head = learner.target_critics.head
        values.append((x @ head.weight[member] + head.bias[member]).squeeze(1))
    scale = replay.mean_discounted_return
    expected = batch.returns / scale + batch.discounts * torch.minimum(*values)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, batch.returns / scale + batch.discounts * torch.maximum(*values), atol=1e-3)


def test_residuals_are_led_back_into_the_action_range() -> None:
    """Outside of it the gradient that leads further out is none, the one that leads back is whole."""
    actor = ResidualLearner(make_learner(), ResidualOptions(**QUICK), env_id="problem").actor
    proposals, inwards = torch.tensor([[0.9], [0.9], [-0.9], [-0.9], [0.2]]), torch.tensor([1.0, -1, -1, 1, 1])
    residuals = torch.tensor([[0.5], [0.5], [-0.5], [-0.5], [0.5]], requires_grad=True)
    actions = actor.added(proposals, residuals)
    torch.testing.assert_close(actions[:, 0].detach(), torch.tensor([1.0, 1.0, -1.0, -1.0, 0.7]))
    (actions[:, 0] * inwards).sum().backward()  # a step downhill goes against the gradient
    assert residuals.grad is not None
    assert residuals.grad[:, 0].tolist() == [1, 0, -1, 0, 1]


def linear_transitions(batch_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Observations (B, 2), actions (B, 1), and the observations that follow."""
    generator = torch.Generator().manual_seed(seed)
    observations = torch.randn(batch_size, 2, generator=generator)
    actions = torch.rand(batch_size, 1, generator=generator) * 2 - 1
    return observations, actions, observations @ torch.tensor([[0.9, 0.2], [-0.2, 0.9]]) + actions


def test_embeddings_predict_those_of_what_follows() -> None:
    """On transitions never seen, better than what is predicted without the action, and they do not collapse."""
    torch.manual_seed(0)
    encoder = StateActionEncoder(2, 1, size=16)
    optimizer = torch.optim.Adam(encoder.parameters(), 3e-3)
    for step in range(300):
        optimizer.zero_grad()
        encoder.loss(*linear_transitions(64, seed=step)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    observations, actions, following = linear_transitions(256, seed=1000)
    embedded = encoder.observations(observations)
    torch.testing.assert_close(embedded.abs().mean(1), torch.ones(256))
    assert embedded.std(0).mean() > 0.1
    loss = encoder.loss(observations, actions, following)
    assert loss < 0.3 * encoder.loss(observations, actions.flip(0), following)
    assert loss.requires_grad
    with torch.no_grad():
        expected = (encoder.pairs(embedded, actions) - encoder.observations(following)).square().mean()
    torch.testing.assert_close(loss.detach(), expected)


def test_all_see_the_averaged_embeddings() -> None:
    learner = ResidualLearner(make_learner(), ResidualOptions(**QUICK | {"tau": 0.25, "critic_warmup": 0}), seed=1)
    replay = learner.new_replay(100)
    replay.add(episode(4, terminated=True), asked=1.0)
    assert learner.encoder is not None
    assert learner.target_encoder is not None
    assert learner.actor.encoder is learner.target_actor.encoder is learner.target_encoder
    before = [p.detach().clone() for p in learner.encoder.parameters()]
    learner.update(replay, 0)
    for old, new, slow in zip(before, learner.encoder.parameters(), learner.target_encoder.parameters(), strict=True):
        torch.testing.assert_close(slow, old + 0.25 * (new - old))
        assert not torch.equal(old, new)
        assert not slow.requires_grad
    restored = ResidualLearner(make_learner(), ResidualOptions(**QUICK), seed=2)
    restored.restore(learner.tensors())
    for one, other in ((learner.target_actor, restored.target_actor), (learner.encoder, restored.encoder)):
        pairs = zip(one.parameters(), other.parameters(), strict=True)  # type: ignore[union-attr]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_without_embeddings_critics_see_the_observations_alone() -> None:
    learner = ResidualLearner(make_learner(), ResidualOptions(**QUICK | {"embedding_size": 0}))
    assert learner.critics.layers[0].linear.weight.shape[1] == 2 + 1
    replay = learner.new_replay(100)
    replay.add(episode(4, terminated=True), asked=1.0)
    assert learner.update(replay, 0)["train/encoder_loss"] == 0


def test_it_begins_as_the_frozen_policy() -> None:
    policy = make_learner()
    learner = ResidualLearner(policy, ResidualOptions(**QUICK))
    observations, starts = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32), np.ones(5, bool)
    acting = learner.acting
    for one in (policy, acting):
        one.reset(["problem"] * 5)
    rewards = np.zeros(5, np.float32)
    assert np.array_equal(acting.act(observations, rewards, starts), policy.act(observations, rewards, starts))


@pytest.mark.parametrize("first", ["zeros", "unsolved"])
def test_a_success_is_worth_something_whenever_it_comes(first: str) -> None:
    """A success after the first gradient step was worth nothing for ever, or hundreds of times the scale."""
    learner = ResidualLearner(make_learner(), ResidualOptions(**QUICK | {"stop_at_success": True, "discount": 0.9}))
    replay, unsolved = learner.new_replay(200), episode(4, terminated=False)
    replay.add(replace(unsolved, rewards=unsolved.rewards * (first != "zeros") / 100), asked=1.0)
    learner.begin_iteration(replay)
    learner.update(replay, 0)
    assert learner._solved_value == 0
    scale = learner._reward_scale
    assert (scale == 0) == (first == "zeros")
    replay.add(episode(3, terminated=True, solved=True), asked=1.0)
    seen, actions = torch.randn(5, learner.critics.layers[0].linear.weight.shape[1] - 1), torch.randn(5, 1)
    before = learner.critics(seen, actions)
    learner.begin_iteration(replay)
    assert learner._solved_value == pytest.approx(replay.highest_reward / 0.1)
    assert learner._reward_scale == learner._solved_value
    torch.testing.assert_close(
        learner.critics(seen, actions) * learner._reward_scale, before * (scale or learner._reward_scale)
    )


def test_the_best_averaged_actor_is_kept() -> None:
    """What is validated and distilled is the average; the actor that it follows was kept in its place."""
    options = ResidualOptions(**QUICK | {"keep_best": True, "eval_every": 160, "critic_warmup": 1, "tau": 0.5})
    learner, seen = ResidualLearner(make_learner(), options, seed=1), {}

    def evaluate(step: int) -> dict[str, float]:
        seen[step] = [p.detach().clone() for p in learner.target_actor.parameters()]
        return {"validation/success_rate": float(step == 480)}

    counters = train_online(
        learner, learner.new_replay(4000), make_task(TwoSteps), log=lambda *_: None, evaluate=evaluate
    )
    assert counters.best_step == 480
    kept = list(learner.target_actor.parameters())
    assert all(torch.equal(a, b) for a, b in zip(kept, seen[480], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(kept, seen[960], strict=True))


def mean_return(learner: ResidualLearner, kind: type[gym.Env[Any, Any]], steps: int) -> float:
    task, policy = make_task(kind), learner.acting
    policy.reset(["problem"] * 8)
    observations: Any = task.vec_env.reset()
    rewards, starts, total = np.zeros(8, np.float32), np.ones(8, bool), np.zeros(8)
    for _ in range(steps):
        observations, rewards, starts, _ = task.vec_env.step(policy.act(observations, rewards, starts))
        total += rewards
    return float(total.mean())


def learned(kind: type[gym.Env[Any, Any]], **others: Any) -> ResidualLearner:
    learner = ResidualLearner(make_learner(), ResidualOptions(**QUICK | others), seed=1)
    train_online(learner, learner.new_replay(4000), make_task(kind), log=lambda *_: None)
    return learner


@pytest.mark.slow
@pytest.mark.parametrize("n_step", [1, 3])
def test_credit_goes_to_what_earned_it(n_step: int) -> None:
    """What decides pays one env step later; the greedy action earns a fifth."""
    assert mean_return(learned(TwoSteps, discount=0.9, n_step=n_step), TwoSteps, steps=2) > 0.95 * TwoSteps.best


class LateTwoSteps(TwoSteps):
    """A time limit ends it, with the step that pays."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, _, info = super().step(action)
        return observation, reward, False, terminated, info


class LateBandit(Bandit):
    """A time limit ends it after one env step."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, _, _, info = super().step(action)
        return observation, reward, False, True, info


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps"), [(LateTwoSteps, 2), (LateBandit, 1)])
def test_the_step_that_a_time_limit_ends_counts(kind: type[gym.Env[Any, Any]], steps: int) -> None:
    """Its reward was never seen, which is all there is here; episodes of one such step were refused."""
    assert mean_return(learned(kind, discount=0.9), kind, steps) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    "others",
    [
        {"embedding_size": 0, "batch_size": 32},
        {"embedding_size": 16, "updates_per_iteration": 120},
    ],
)
def test_linear_quadratic_control_is_solved(others: dict[str, Any]) -> None:
    """Actions are those of the Riccati equation, for ever: truncated episodes must not look like ends."""
    discount = 0.9
    learner = learned(LinearQuadratic, discount=discount, exploration_noise=0.3, target_noise=0.0, **others)
    gain = LinearQuadratic.best_gain(discount)
    x = np.linspace(-0.5, 0.5, 16, dtype=np.float32)
    policy = learner.acting
    policy.reset(["problem"] * 16)
    actions = policy.act(np.stack([x, 0 * x], 1), np.zeros(16, np.float32), np.ones(16, bool))[:, 0]
    assert np.abs(actions + gain * x).mean() < 0.1
    assert np.abs(actions + LinearQuadratic.best_gain(0.0) * x).mean() > 0.3  # what one step alone would ask for
