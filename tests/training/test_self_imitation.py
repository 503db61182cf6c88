"""Self-imitation: which episodes are played, counted, kept and drawn, and a problem that it solves."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.data import Episode
from eva_rl.data.replay import TrajectoryReplay
from eva_rl.envs.vector import TaskVecEnv
from eva_rl.errors import EnvironmentFailedError, UserError
from eva_rl.rollouts.episodes import EpisodeRecord, play_episodes
from eva_rl.training.checkpoint import Checkpoints
from eva_rl.training.collector import OnlineCounters, TaskEnvs
from eva_rl.training.failures import NotFiniteError
from eva_rl.training.online import train_online
from eva_rl.training.optimizer import copy_of
from eva_rl.training.options import SelfImitationOptions
from eva_rl.training.self_imitation.learner import SelfImitation
from eva_rl.training.self_imitation.retries import Attempts, RetryingCollector, SmoothNoise
from tests.training.problems import make_learner

BOX = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32), gym.spaces.Box(-1, 1, (1,), np.float32)
HORIZON = 8


class Reach(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """A point on a line that has to come near a goal; ends there, or is cut off after eight env steps."""

    observation_space, action_space = BOX
    starts: list[int]
    reports = True

    def __init__(self) -> None:
        self.starts = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[NDArray[np.float32], dict[str, Any]]:
        assert seed is not None
        self.starts.append(seed)
        self._goal = np.random.default_rng(seed).uniform(-1, 1)
        self._place, self._steps = 0.0, 0
        return self._seen(), self._info()

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        self._place += 0.25 * float(action[0])
        self._steps += 1
        return self._seen(), self.paid(), self._near(), self._steps == HORIZON, self._info()

    def paid(self) -> float:
        return float(self._near())

    def _near(self) -> bool:
        return abs(self._place - self._goal) < 0.15

    def _seen(self) -> NDArray[np.float32]:
        return np.array([self._place, self._goal], np.float32)

    def _info(self) -> dict[str, Any]:
        return {"is_success": self._near()} if self.reports else {}


class Silent(Reach):
    """Does not tell of success."""

    reports = False


class Broken(Reach):
    """Pays what is not a number."""

    def paid(self) -> float:
        return float("nan")


class Failing(Reach):
    """Fails at an env step of all its environments together."""

    played, fails_at = 0, 150

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        Failing.played += 1
        if Failing.played == Failing.fails_at:
            raise EnvironmentFailedError("reach", "in an env step", "it broke")  # as checked environments do
        return super().step(action)


class Wandering(Reach):
    """Has another goal at each reset, whatever the seed."""

    resets = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[NDArray[np.float32], dict[str, Any]]:
        Wandering.resets += 1
        return super().reset(seed=Wandering.resets)


def make_task(kind: type[Reach] = Reach, n: int = 6, first: int = 100) -> TaskEnvs:
    vec_env = TaskVecEnv([kind] * n, ["reach"] * n, BOX, range(first, first + n), n)
    return TaskEnvs(vec_env, "reach", kind.reports, first_seed=first)


def envs_of(task: TaskEnvs) -> list[Reach]:
    assert isinstance(task.vec_env, TaskVecEnv)
    return [task.vec_env._hosts[0]._host.envs[row] for row in range(task.vec_env.num_envs)]  # type: ignore[union-attr]


def options(**others: Any) -> SelfImitationOptions:
    own = {
        "env_steps": 400,
        "steps_per_iteration": 100,
        "updates_per_iteration": 2,
        "updates_per_episode": 0,
        "checkpoint_every": 100,
    }
    return SelfImitationOptions(**{"exploration_noise": 0.8, "noise_steps": 4.0, "batch_size": 8} | own | others)


def collect(
    chosen: SelfImitationOptions, task: TaskEnvs
) -> tuple[DecisionTransformerPolicy, TrajectoryReplay, OnlineCounters]:
    policy, replay = make_learner(), TrajectoryReplay(2000, 2, 1)
    counters = OnlineCounters(next_seed=task.first_seed)
    learner = SelfImitation(policy, chosen, seed=3)
    RetryingCollector(policy, task, chosen).collect(learner, replay, counters)
    return policy, replay, counters


def solved_rate(policy: DecisionTransformerPolicy, episodes: int = 60) -> float:
    vec_env = make_task(n=episodes).vec_env
    assert isinstance(vec_env, TaskVecEnv)
    vec_env.seed(10_000)
    records = play_episodes(policy, vec_env, ["reach"] * episodes, episodes)
    return float(np.mean([record.success for record in records]))


def test_smooth_noise_has_its_deviation_and_its_correlation() -> None:
    noise = SmoothNoise(0.2, 5.0, torch.Generator().manual_seed(0))
    drawn = torch.stack([noise.added(torch.zeros(400, 3)) for _ in range(60)])[20:]
    assert float(drawn.std()) == pytest.approx(0.2, rel=0.03)
    for lag in (1, 5, 15):
        correlation = float((drawn[lag:] * drawn[:-lag]).mean() / drawn.square().mean())
        assert correlation == pytest.approx(np.exp(-lag / 5), abs=0.04)


def test_noise_without_a_memory_is_white_and_none_is_none() -> None:
    generator = torch.Generator().manual_seed(0)
    white = SmoothNoise(0.2, 0.0, generator)
    drawn = torch.stack([white.added(torch.zeros(2000, 1)) for _ in range(2)])
    assert abs(float((drawn[0] * drawn[1]).mean())) < 0.1 * 0.2**2
    actions = torch.ones(4, 1)
    assert torch.equal(SmoothNoise(0.0, 5.0, generator).added(actions), actions)


def test_first_attempts_are_the_policy_s_own() -> None:
    task, policy = make_task(), make_learner()
    vec_env = task.vec_env
    assert isinstance(vec_env, TaskVecEnv)
    vec_env.seed(100)
    expected: list[EpisodeRecord] = play_episodes(policy, vec_env, ["reach"] * 6, 6, stop_at_success=True)
    attempts = Attempts(vec_env, range(100, 106))
    policy.reset(["reach"] * 6)
    while attempts.alive.any():
        attempts.step(policy, None)
    episodes = attempts.finished()
    assert list(episodes) == [record.episode_seed for record in expected]
    assert [len(e.rewards) for e in episodes.values()] == [record.length for record in expected]
    assert [bool(e.successes[-1]) for e in episodes.values()] == [r.success for r in expected]  # type: ignore[index]
    assert attempts.env_steps == sum(record.length for record in expected)
    for seed, episode in episodes.items():
        assert episode.observations.shape == (len(episode.rewards) + 1, 2)
        assert episode.observations[0, 1] == np.float32(np.random.default_rng(seed).uniform(-1, 1))
        assert episode.terminations[-1] != episode.truncations[-1]
        moved = np.diff(episode.observations[:, 0])
        np.testing.assert_allclose(moved, 0.25 * episode.actions[:, 0], atol=1e-6)


def test_env_steps_before_a_failure_are_counted_and_what_was_solved_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole round of attempts was lost, and its env steps were played for nothing."""
    monkeypatch.setattr(Failing, "played", 0)
    policy, replay, chosen, task = (
        make_learner(),
        TrajectoryReplay(2000, 2, 1),
        options(steps_per_iteration=400),
        make_task(Failing),
    )
    counters, collector = OnlineCounters(next_seed=task.first_seed), RetryingCollector(policy, task, chosen)
    finished = list[int]()
    whole = collector._count_and_keep

    def kept(episodes: dict[int, Episode], *rest: Any) -> list[int]:
        finished.append(sum(len(episode.rewards) for episode in episodes.values()))
        return whole(episodes, *rest)

    monkeypatch.setattr(collector, "_count_and_keep", kept)
    with pytest.raises(EnvironmentFailedError, match="it broke"):
        collector.collect(SelfImitation(policy, chosen, seed=3), replay, counters)
    assert Failing.played == Failing.fails_at
    assert Failing.played <= counters.env_steps < Failing.played + task.vec_env.num_envs
    assert sum(finished) <= counters.env_steps
    assert finished[-1] > 0, "some attempts of the round that failed were over"


def test_only_failed_starts_are_retried_and_only_solved_episodes_kept() -> None:
    task = make_task()
    _, replay, counters = collect(options(steps_per_iteration=1, retries=3), task)
    starts = [seed for env in envs_of(task) for seed in env.starts]
    assert counters.next_seed == 106
    assert counters.episodes == 6
    tried = {seed: starts.count(seed) for seed in range(100, 106)}
    assert set(starts) == set(tried)
    solved_first = sum(counters.successes)
    assert list(tried.values()).count(1) == solved_first
    assert max(tried.values()) <= 4
    assert counters.retries == len(starts) - 6
    kept = list(replay.episodes())
    assert len(kept) == solved_first + counters.retries_solved > 0
    goals = [episode.observations[0, 1] for episode in kept]
    assert len(set(goals)) == len(goals), "a start that is solved is not tried again"
    assert all(episode.terminations[-1] for episode in kept)


def test_an_environment_that_ignores_the_seed_is_refused_unless_nothing_is_retried() -> None:
    """Retries played other starts than those that had failed, and nobody noticed."""
    with pytest.raises(UserError, match=r"reach starts elsewhere when it is reset with the same seed.*algo\.retries=0"):
        collect(options(steps_per_iteration=1, retries=1), make_task(Wandering))
    _, _, counters = collect(options(steps_per_iteration=1, retries=0), make_task(Wandering))
    assert counters.episodes == 6


def test_retries_count_as_retries_whatever_their_noise() -> None:
    _, replay, counters = collect(options(steps_per_iteration=1, retries=2, exploration_noise=0.0), make_task())
    assert counters.episodes == 6
    failed = 6 - sum(counters.successes)
    assert (counters.retries, counters.retries_solved) == (2 * failed, 0), "the same actions fail again"
    assert replay.num_episodes == sum(counters.successes)


def test_a_snapshot_plays_every_other_retry_and_the_first_without_noise() -> None:
    task, policy, other = make_task(n=10), make_learner(), make_learner()
    with torch.no_grad():
        other.network.action_head.bias.add_(1.0)  # always to the right
    acted: list[tuple[bool, bool]] = []

    class Watched(RetryingCollector):
        def _attempt(self, seeds: Any, noise: Any, *others: Any, **more: Any) -> list[int]:
            acts_as_other = torch.equal(policy.network.action_head.bias, other.network.action_head.bias)
            acted.append((acts_as_other, noise is not None))
            return super()._attempt(seeds, noise, *others, **more)

    chosen = options(steps_per_iteration=1, retries=4)
    snapshot = {name: parameter.detach().clone() for name, parameter in other.network.named_parameters()}
    before = {name: parameter.clone() for name, parameter in policy.network.named_parameters()}
    replay, counters = TrajectoryReplay(2000, 2, 1), OnlineCounters(next_seed=100)
    Watched(policy, task, chosen, snapshot).collect(SelfImitation(policy, chosen, seed=3), replay, counters)
    assert acted == [(False, False), (True, False), (False, True), (True, True), (False, True)][: len(acted)]
    assert len(acted) > 3
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.network.named_parameters())
    assert counters.retries_solved > 0
    assert counters.episodes == 10


def test_every_env_step_is_counted_and_none_is_played_beyond_the_last() -> None:
    task = make_task(n=4)
    played = [0]

    class Counted(Reach):
        def step(self, action: Any) -> Any:
            played[0] += 1
            return super().step(action)

    task = make_task(Counted, n=4)
    _, _, counters = collect(options(env_steps=101, steps_per_iteration=500), task)
    assert counters.env_steps == played[0]
    assert 101 <= counters.env_steps < 101 + 4


class Hopeless(Reach):
    """Cannot be solved."""

    def _near(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("lengths", "attempt_length", "expected"),
    [((2, 3, 7), 1.5, 5), ((2, 4), 1.0, 3), ((4,), 3.0, HORIZON), ((2, 3, 7), 0.0, HORIZON), ((), 1.5, HORIZON)],
)
def test_an_attempt_that_takes_too_long_is_given_up(
    lengths: tuple[int, ...], attempt_length: float, expected: int
) -> None:
    """After so many times the median length of what was solved or demonstrated, rounded up; it has failed."""
    task, policy, replay = make_task(Hopeless, n=4), make_learner(), TrajectoryReplay(2000, 2, 1)
    for length in lengths:
        replay.add(episode(length), 0.0, demonstrated=length != 3)
    replay.add(episode(50, solved=False), 0.0)
    chosen, counters = options(steps_per_iteration=1, retries=2, attempt_length=attempt_length), OnlineCounters()
    RetryingCollector(policy, task, chosen).collect(SelfImitation(policy, chosen, seed=3), replay, counters)
    assert counters.lengths == [expected] * 4
    assert counters.failures == counters.episodes == 4
    assert (counters.retries, counters.retries_solved) == (8, 0)
    assert counters.env_steps == 12 * expected
    assert replay.num_episodes == len(lengths) + 1


def test_retries_say_how_often_they_succeed() -> None:
    _, replay, counters = collect(options(), make_task())
    metrics = counters.metrics()
    assert metrics["rollout/retry_success_rate"] == counters.retries_solved / counters.retries
    assert metrics["rollout/success_rate"] == np.mean(counters.successes)
    assert replay.num_solved == replay.num_episodes


def episode(length: int, *, solved: bool = True) -> Episode:
    last = np.arange(length) == length - 1
    return Episode(
        observations=np.full((length + 1, 2), length, np.float32),
        actions=np.zeros((length, 1), np.float32),
        rewards=np.ones(length, np.float32),
        terminations=last & solved,
        truncations=last & ~np.array(solved),
        successes=last & solved,
    )


def imitated(episodes: int) -> TrajectoryReplay:
    """A replay with so many demonstrations."""
    replay = TrajectoryReplay(1000, 2, 1)
    for _ in range(episodes):
        replay.add(episode(4), 0.0, demonstrated=True)
    return replay


@pytest.mark.parametrize(
    ("kinds", "lengths", "expected"),
    [
        ("dfr", (3, 8, 4), (0.3, 0.7 * 8 / 20, 0.7 * 12 / 20)),
        ("ddff", (4, 16, 10, 15), (0.3 * 4 / 20, 0.3 * 16 / 20, 0.7 * 10 / 25, 0.7 * 15 / 25)),
        ("df", (5, 20), (0.3, 0.7)),
        ("fr", (9, 3), (0.5, 0.5)),
        ("d", (7,), (1.0,)),
        ("r", (7,), (1.0,)),
    ],
)
def test_each_kind_of_episode_has_its_share_of_a_batch(
    kinds: str, lengths: tuple[int, ...], expected: tuple[float, ...]
) -> None:
    """Demonstrations have 0.3 of it, where there are others; solved retries count three times."""
    replay = TrajectoryReplay(1000, 2, 1)
    replay.add(episode(50, solved=False), 0.0)
    for kind, length in zip(kinds, lengths, strict=True):
        replay.add(episode(length), 0.0, demonstrated=kind == "d", retried=kind == "r")
    weights = replay.imitation_weights(0.3, 3.0)
    drawn = weights[1:] * lengths
    assert drawn / drawn.sum() == pytest.approx(expected)
    assert weights[0] == 0, "an episode that failed is not imitated"


def test_what_is_never_to_be_drawn_stands_aside_only_for_others() -> None:
    """Demonstrations alone, and a share of none: the run ended, as if there were no episode."""
    replay = TrajectoryReplay(1000, 2, 1)
    replay.add(episode(4), 0.0, demonstrated=True)
    assert replay.imitation_weights(0.0, 10.0).tolist() == [1]
    replay.add(episode(3), 0.0, retried=True)
    assert replay.imitation_weights(0.0, 0.0).tolist() == [1, 0]
    assert (replay.imitation_weights(0.0, 10.0) > 0).tolist() == [False, True]
    only = TrajectoryReplay(1000, 2, 1)
    only.add(episode(3), 0.0, retried=True)
    assert not SelfImitation(make_learner(), options(retry_weight=0.0)).can_learn(only, failures=1)


def test_windows_show_the_returns_that_were_asked_for() -> None:
    policy, replay = make_learner(target=10.0), TrajectoryReplay(1000, 2, 1)
    replay.add(episode(3), 10.0)
    weights = replay.imitation_weights(0.0, 0.0)
    rows = np.random.default_rng(0)
    batch = replay.sample_as_asked(64, rows, 4, policy.scaling, weights)
    mask = batch.attention_mask
    assert mask is not None
    shown = {tuple(row[real].squeeze(-1).tolist()) for row, real in zip(batch.returns_to_go, mask, strict=True)}
    assert shown == {(10.0,), (10.0, 9.0), (10.0, 9.0, 8.0)}  # one reward a step, whatever was obtained


@pytest.mark.parametrize("demonstrated", [False, True])
def test_there_is_nothing_to_learn_from_failures_alone(demonstrated: bool) -> None:
    learner, replay = SelfImitation(make_learner(), options()), TrajectoryReplay(1000, 2, 1)
    replay.add(episode(4, solved=False), 0.0)
    assert not learner.can_learn(replay, failures=1)
    replay.add(episode(4, solved=not demonstrated), 0.0, demonstrated=demonstrated)
    assert learner.can_learn(replay, failures=1)


@pytest.mark.parametrize("solved", [False, True])
def test_a_policy_that_solved_all_it_met_is_left_as_it_is(solved: bool) -> None:
    """Half of the iterations meet no failure; what those before them failed at is learned from once."""

    class Turns(Reach):
        """Cannot be solved, or is at its first step, by seeds of ten."""

        def _near(self) -> bool:
            return self._steps > 0 and (solved or self.starts[-1] // 10 % 2 == 1)

    task, policy = make_task(Turns, n=10), make_learner()
    chosen = options(retries=0, attempt_length=0, steps_per_iteration=1, env_steps=180, checkpoint_every=0)
    learner, replay = SelfImitation(policy, chosen), TrajectoryReplay(2000, 2, 1)
    steps: list[float] = []

    def log(metrics: Mapping[str, float], _: int) -> None:
        steps.append(metrics["time/gradient_steps"])

    replay.add(episode(4), 0.0, demonstrated=True)
    counters = train_online(learner, replay, task, log=log, collector=RetryingCollector(policy, task, chosen))
    if solved:
        assert counters.update == 0
        assert counters.failures == 0
    else:
        assert steps == [2, 2, 4, 4]
        assert counters.failures == counters.failures_learned == 20


def test_an_env_that_reports_no_success_is_refused() -> None:
    with pytest.raises(UserError, match=r"reach reports no success, not even.*is_success.*algo=residual"):
        collect(options(), make_task(Silent))


def test_a_reward_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NotFiniteError, match="a reward of the environment"):
        collect(options(), make_task(Broken))


def test_the_learning_rate_falls_to_zero_in_every_iteration() -> None:
    chosen, replay = options(updates_per_iteration=20, warmup_steps=4), imitated(1)
    learner, rates = SelfImitation(make_learner(), chosen), list[float]()
    for update in range(40):
        if update % 20 == 0:
            assert learner.begin_iteration(replay) == 20
        learner.update(replay, update)
        rates.append(learner.optimizer.param_groups[0]["lr"] / chosen.learning_rate)
    assert rates[:20] == rates[20:]
    assert max(rates) == 1 == rates[4]
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:20] == sorted(rates[4:20], reverse=True)
    assert rates[0] == pytest.approx(0.2)
    assert 0 < rates[19] < 0.02


@pytest.mark.parametrize(
    ("episodes", "restart", "per_episode", "expected"),
    [
        (3, True, 1.0, 5),
        (12, True, 1.0, 12),
        (12, True, 0.5, 6),
        (7, True, 0.75, 6),
        (12, True, 0.0, 5),
        (12, False, 1.0, 5),
    ],
)
def test_more_is_cloned_for_longer(episodes: int, restart: bool, per_episode: float, expected: int) -> None:
    """One gradient step for each solved episode where those are more, if they are cloned anew."""
    policy, replay = make_learner(), imitated(episodes)
    start = {name: p.detach().clone() for name, p in policy.network.named_parameters()} if restart else None
    chosen = options(updates_per_iteration=5, updates_per_episode=per_episode, warmup_steps=0)
    learner = SelfImitation(policy, chosen, start=start)
    replay.add(episode(4, solved=False), 0.0)
    assert learner.begin_iteration(replay) == expected
    rates = [learner.schedule(update) for update in range(expected)]
    assert rates[0] == 1
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.2


def test_every_iteration_clones_anew_where_there_is_a_start() -> None:
    """What earlier iterations made of the parameters and of the optimiser's moments is gone after its first step."""
    chosen, replay = options(updates_per_iteration=2, learning_rate=1e-2), imitated(1)
    start = {name: p.detach().clone() for name, p in make_learner().network.named_parameters()}

    def after(updates: Sequence[int], start: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        learner = SelfImitation(make_learner(), chosen, start=start)
        for update in updates:
            if update % 2 == 0:
                assert learner.begin_iteration(replay) == 2
            learner.update(replay, update)
        return {name: p.detach() for name, p in learner.parameters.items()}

    def distance(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
        return max(float((one[name] - other[name]).abs().max()) for name in one)

    assert distance(after([4, 5], start), after([0, 1, 2, 3, 4, 5], start)) == 0
    assert distance(after([4, 5], None), after([0, 1, 2, 3, 4, 5], None)) > 1e-3
    assert distance(after([4, 5], start), after([4], start)) > 1e-3, "the second step goes on from the first"


def test_cloning_anew_leaves_the_parameters_as_they_were_where_the_loss_is_not_finite() -> None:
    replay = imitated(1)
    learner = SelfImitation(make_learner(), options(updates_per_iteration=2), start=None)
    start = copy_of(learner.parameters)
    learner = SelfImitation(learner.policy, options(updates_per_iteration=2), start=start)
    for update in (0, 1):
        learner.update(replay, update)
    before = copy_of(learner.parameters)
    replay.actions[:] = np.nan
    learner.begin_iteration(replay)
    with pytest.raises(NotFiniteError, match="the policy's loss"):
        learner.update(replay, 2)
    assert any(not torch.equal(start[name], before[name]) for name in start)
    for name, parameter in learner.parameters.items():
        assert torch.equal(parameter, before[name])


def test_what_is_refreshed_is_what_iterations_begin_with() -> None:
    """The policy acts with what it has learned until then; a checkpoint holds what the next iteration begins with."""
    replay, chosen = imitated(1), options(updates_per_iteration=2, refresh_every=100)
    learner = SelfImitation(make_learner(), chosen)
    learner = SelfImitation(learner.policy, chosen, start=copy_of(learner.parameters))
    learner.begin_iteration(replay)
    learner.update(replay, 0)
    learned = copy_of(learner.parameters)
    name, changed = next(iter(learner.parameters.items()))
    with learner.refreshing():
        assert not torch.equal(changed, learned[name])
        with torch.no_grad():
            changed.fill_(0.5)
    assert all(torch.equal(parameter, learned[key]) for key, parameter in learner.parameters.items())
    assert bool((learner.state_of()[name] == 0.5).all())

    resumed = SelfImitation(make_learner(), chosen, start=copy_of(learner.parameters))
    resumed.restore(learner.tensors())
    for one in (learner, resumed):
        one.begin_iteration(replay)
        one.update(replay, 1)
    assert all(torch.equal(resumed.parameters[key], parameter) for key, parameter in learner.parameters.items())
    assert float((changed.detach() - 0.5).abs().max()) < 0.1, "one gradient step away"

    going_on = SelfImitation(make_learner(), chosen)
    before = copy_of(going_on.parameters)
    with going_on.refreshing(), torch.no_grad():
        going_on.parameters[name].add_(1)
    assert torch.equal(going_on.parameters[name], before[name] + 1), "without restart the policy itself"
    assert not going_on.state_of()


class StopError(Exception):
    """The run is over, whatever it was about to do."""


def run(folder: Path | None, stop_at: int | None = None) -> tuple[OnlineCounters | None, dict[str, torch.Tensor]]:
    task, chosen, policy = make_task(), options(), make_learner()
    learner = SelfImitation(policy, chosen, seed=5)

    def log(_: Mapping[str, float], step: int) -> None:
        if stop_at is not None and step >= stop_at:
            raise StopError

    counters = None
    with contextlib.suppress(StopError):
        counters = train_online(
            learner,
            TrajectoryReplay(2000, 2, 1),
            task,
            log=log,
            checkpoints=Checkpoints(folder) if folder else None,
            collector=RetryingCollector(policy, task, chosen),
        )
    return counters, learner.tensors()


def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path: Path) -> None:
    whole, expected = run(None)
    assert run(tmp_path, stop_at=250)[0] is None
    resumed, found = run(tmp_path)
    assert whole is not None
    assert resumed is not None
    assert (resumed.env_steps, resumed.update, resumed.next_seed) == (whole.env_steps, whole.update, whole.next_seed)
    assert (resumed.retries, resumed.retries_solved) == (whole.retries, whole.retries_solved)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


@pytest.mark.slow
def test_a_policy_learns_the_starts_that_it_failed() -> None:
    policy, task = make_learner(), make_task(n=10)
    chosen = options(
        env_steps=4000, learning_rate=3e-3, updates_per_iteration=10, batch_size=32, retries=6, checkpoint_every=0
    )
    before = solved_rate(policy)
    learner = SelfImitation(policy, chosen)
    collector = RetryingCollector(policy, task, chosen)
    train_online(learner, TrajectoryReplay(10_000, 2, 1), task, log=lambda *_: None, collector=collector)
    policy.network.eval()
    after = solved_rate(policy)
    assert before < 0.6
    assert after >= 0.9
