"""Back into one network: what is kept of an env step, what is cloned, and that the clone does what it was shown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from eva_rl.data import Episode
from eva_rl.data.selection import until_success
from eva_rl.envs import make_vec_env
from eva_rl.finetune.residual import as_many
from eva_rl.training.bc import train_bc
from eva_rl.training.collector import TaskEnvs
from eva_rl.training.online import train_online
from eva_rl.training.options import DistillOptions, ResidualOptions
from eva_rl.training.residual.actor import frozen_copy
from eva_rl.training.residual.distillation import LabelledWindows, roll_out
from eva_rl.training.residual.learner import ResidualLearner
from eva_rl.training.residual.playback import FEATURES, PROPOSALS, played_through
from tests.conftest import make_policy
from tests.training.problems import LinearQuadratic, make_learner, make_task
from tests.training.residual.test_learner import QUICK


def taught() -> tuple[ResidualLearner, list[Episode]]:
    """A learner whose residual is 0.4 everywhere, and episodes in which it acted with noise."""
    learner = ResidualLearner(make_learner(), ResidualOptions(**QUICK | {"learning_starts": 10**6, "env_steps": 160}))
    with torch.no_grad():
        for actor in (learner.actor, learner.target_actor):
            actor.head.bias.fill_(float(np.arctanh(0.4)))
    replay = learner.new_replay(1000)
    train_online(learner, replay, make_task(LinearQuadratic), log=lambda *_: None)
    return learner, list(replay.episodes())


def test_what_is_played_again_computes_what_it_computed_before() -> None:
    learner, episodes = taught()
    assert len(episodes) == 16
    again = played_through(learner.policy, "problem", [replace(episode, extras={}) for episode in episodes])
    for before, after in zip(episodes, again, strict=True):
        for name in (FEATURES, PROPOSALS):
            np.testing.assert_allclose(after.extras[name], before.extras[name], atol=1e-4)
        assert np.abs(np.diff(after.extras[FEATURES], axis=0)).max() > 1e-3  # they do differ from step to step


def test_windows_hold_what_the_residual_policy_would_do() -> None:
    learner, episodes = taught()
    windows = LabelledWindows(learner.acting, "problem", 4, seed=0)
    windows.add(episodes)
    batch = windows.sample(64, step=3)
    assert batch.target_actions is not None
    assert batch.attention_mask is not None
    early = batch.timesteps[:, -1] < 4  # later the cache of the policy that acted and a window may differ a little
    newest = batch.target_actions[:, -1, 0]
    everything = np.concatenate([e.extras[PROPOSALS][:, 0] for e in episodes])
    expected = np.clip(everything + 0.4, -1, 1)
    distance = np.abs(newest.numpy()[:, None] - expected).min(1)
    assert distance[early].max() < 1e-5
    assert distance.max() < 1e-3
    # asked for 1 at first, and rewards are negative: more and more is to come
    rewards = np.concatenate([[0.0], np.cumsum(episodes[0].rewards)])[:-1]
    np.testing.assert_allclose(windows._episodes[0].returns_to_go, 1 - rewards, atol=1e-5)
    assert torch.equal(windows.sample(64, step=3).observations, batch.observations)


def test_labels_are_what_the_residual_policy_does_where_it_acts() -> None:
    """In windows as in env steps, when its residuals depend on what it sees."""
    learner = ResidualLearner(make_learner(), ResidualOptions(**QUICK))
    with torch.no_grad():
        learner.target_actor.head.weight.normal_(0, 0.3)
    windows = LabelledWindows(learner.acting, "problem", 4, seed=0)
    windows.add(roll_out(learner.acting, make_task(LinearQuadratic), 160)[0])
    batch = windows.sample(64, step=0)
    assert batch.target_actions is not None
    early = batch.timesteps[:, -1] < 4
    executed = batch.actions[early, -1]
    assert executed.std() > 0.05
    torch.testing.assert_close(batch.target_actions[early, -1], executed, atol=1e-5, rtol=0)


def test_noise_asks_the_residual_policy_beside_what_was_observed() -> None:
    learner, episodes = taught()
    with torch.no_grad():
        learner.target_actor.head.weight.normal_(0, 0.3)
    still, noisy = (LabelledWindows(learner.acting, "problem", 4, seed=0, noise=noise) for noise in (0.0, 0.5))
    for windows in (still, noisy):
        windows.add(episodes)
    batch, again, plain = noisy.sample(500, step=3), noisy.sample(500, step=3), still.sample(500, step=3)
    noise = batch.observations - plain.observations
    levels = noise.flatten(1).std(1)
    assert noise.mean().abs() < 0.03
    assert 0.9 < noise.std() / (0.5 / 3**0.5) < 1.1  # a uniform level has a mean square of a third of the highest
    assert levels.min() < 0.1
    assert levels.max() > 0.4
    assert torch.equal(batch.actions, plain.actions)
    assert batch.target_actions is not None
    assert plain.target_actions is not None
    assert again.target_actions is not None
    assert (batch.target_actions - plain.target_actions).abs().mean() > 0.01
    assert torch.equal(again.target_actions, batch.target_actions)
    fresh = noisy.of(episodes).sample(500, step=3)
    assert torch.equal(fresh.observations, plain.observations)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_a_share_of_a_batch_is_the_clone_s_own(share: float) -> None:
    learner, episodes = taught()
    windows = LabelledWindows(learner.acting, "problem", 4, seed=0, clone_share=share)
    windows.add(episodes[:-1])
    assert len(windows.sample(64, step=1)) == 64, "it has not acted yet"
    far = replace(episodes[-1], observations=episodes[-1].observations + 1000, extras={})
    windows.add([far], of_clone=True)
    counts = [int((windows.sample(64, step).observations[:, -1, 0] > 500).sum()) for step in range(40)]
    if share:
        assert set(counts) == {64 * share}
    else:
        assert np.mean(counts) == pytest.approx(64 / len(episodes), rel=0.4)


@pytest.mark.slow
def test_the_clone_does_what_the_residual_policy_does() -> None:
    """Also in the env steps that it reaches itself."""
    learner, episodes = taught()
    student = frozen_copy(learner.policy)
    student.network.requires_grad_(True)
    windows = LabelledWindows(learner.acting, "problem", 4, seed=0)
    windows.add(episodes)
    options = DistillOptions(updates=150, learning_rate=1e-2, warmup_steps=5)
    task = make_task(LinearQuadratic)

    def error() -> float:
        own = windows.of(roll_out(student, task, 160)[0]).sample(256, step=0)
        assert own.target_actions is not None
        return float((own.target_actions - own.actions)[:, -1].abs().mean())

    before = error()
    train_bc(student, windows, options, log=lambda *_: None)
    windows.add(roll_out(student, task, 160)[0])
    train_bc(student, windows, options, log=lambda *_: None)
    assert before > 0.3
    assert error() < 0.05


@pytest.mark.parametrize("env_steps", [1, 16, 40])
def test_a_round_begins_after_the_episodes_of_the_one_before(env_steps: int) -> None:
    """A run's rounds skipped so many that they came into the episodes of other seeds."""
    vec_env = make_vec_env("push-v3", 2, horizon=5)
    task = TaskEnvs(vec_env, "metaworld/push-v3", reports_success=True, first_seed=700)
    episodes, after = roll_out(make_policy(), task, env_steps)
    assert sum(len(episode.actions) for episode in episodes) == 2 * max(1, env_steps // 2)
    begun = 1 + max(1, env_steps // 2) // 5  # in each environment
    assert after == 700 + 2 * begun == vec_env.arrays.next_seeds.min()
    vec_env.close()


def test_a_demonstration_ends_at_its_first_success() -> None:
    steps = np.arange(5, dtype=np.float32)
    whole = Episode(
        observations=np.arange(12, dtype=np.float32).reshape(6, 2),
        actions=steps[:, None],
        rewards=steps,
        terminations=np.zeros(5, bool),
        truncations=steps == 4,
        successes=steps >= 2,
    )
    cut = until_success(whole)
    assert cut.rewards.tolist() == [0, 1, 2]
    assert cut.terminations.tolist() == [False, False, True]
    assert not cut.truncations.any()
    assert cut.observations.shape == (4, 2)
    assert until_success(replace(whole, successes=np.zeros(5, bool))).rewards.tolist() == [0, 1, 2, 3, 4]


def test_demonstrations_are_at_most_as_many_as_what_was_played() -> None:
    """A large data set hid the states in which the clone has to act."""

    def of_length(length: int) -> Episode:
        zeros, ends = np.zeros((length + 1, 2), np.float32), np.arange(length) == length - 1
        return Episode(zeros, zeros[1:, :1], zeros[1:, 0], ends, ~ends & False)

    data = [of_length(length) for length in (5, 7, 9, 11) * 10]
    assert as_many(data, 320, seed=0) == data, "as many as there are"
    assert as_many([], 320, seed=0) == []
    some = as_many(data, 100, seed=0)
    assert 100 <= sum(len(episode.rewards) for episode in some) < 100 + 11
    assert {len(episode.rewards) for episode in some} == {5, 7, 9, 11}, "of all that there are"
    assert some != as_many(data, 100, seed=1)
