"""Whole episodes in vectorised environments: counting, seeds and boundaries, on real environments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray

from eva_rl.envs import TaskVecEnv, make_vec_env
from eva_rl.rollouts.episodes import EpisodeRecord, play_episodes
from tests.conftest import make_policy


class CountingEnv(gym.Env[Any, Any]):
    """Episode k lasts ``lengths[k]`` steps; the observation and the reward are the number of the step."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths, self._episode, self._step = lengths, -1, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self._episode, self._step = self._episode + 1, 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._step += 1
        done = self._step == self._lengths[self._episode % len(self._lengths)]
        info = {"is_success": self._step == 3, "success_now": self._step == 3}
        return np.full(1, self._step, np.float32), float(self._step), done, False, info


class Notes:
    """A policy that writes down what it is given."""

    observation_dim = action_dim = 1

    def __init__(self) -> None:
        self.seen: list[tuple[list[float], list[float], list[bool]]] = []

    def reset(self, env_ids: Sequence[str]) -> None:
        self.env_ids = list(env_ids)

    def act(
        self, observations: NDArray[np.float32], rewards: NDArray[np.float32], episode_starts: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        self.seen.append((observations[:, 0].tolist(), rewards.tolist(), episode_starts.tolist()))
        return np.zeros_like(observations)


def counting_envs(*lengths: Sequence[int]) -> TaskVecEnv:
    box = (CountingEnv.observation_space, CountingEnv.action_space)
    makers = [partial(CountingEnv, each) for each in lengths]
    return TaskVecEnv(makers, ["counting"] * len(lengths), box, range(10, 10 + len(lengths)), len(lengths))


def test_episodes_are_counted_and_seen_exactly() -> None:
    notes = Notes()
    finished: list[EpisodeRecord] = []
    records = play_episodes(notes, counting_envs([2, 4], [3]), ["a", "b"], 4, finished.append)
    assert [(r.env_id, r.length, r.episode_return) for r in records] == [
        ("a", 2, 3.0),
        ("b", 3, 6.0),
        ("a", 4, 10.0),
        ("b", 3, 6.0),
    ]
    assert [(r.success, r.success_at_end, r.first_success) for r in records] == [
        (False, False, -1),
        (True, True, 2),
        (True, False, 2),
        (True, True, 2),
    ]
    assert [r.episode_seed for r in records] == [10, 11, 12, 13]
    assert sorted(finished, key=lambda r: r.episode_seed) == records
    assert [r.env_id for r in finished] == ["a", "b", "b", "a"]
    assert notes.seen == [
        ([0, 0], [0, 0], [True, True]),
        ([1, 1], [1, 1], [False, False]),
        ([2, 2], [2, 2], [False, False]),  # a has ended and waits
        ([0, 0], [0, 0], [True, True]),
        ([1, 1], [1, 1], [False, False]),
        ([2, 2], [2, 2], [False, False]),
        ([3, 3], [3, 3], [False, False]),
    ]


def test_no_more_episodes_than_asked_for_are_played() -> None:
    """Environments that are not needed in the last round rest."""
    records = play_episodes(Notes(), counting_envs([2], [3], [4]), ["a", "b", "c"], 4)
    assert [(r.env_id, r.episode_seed) for r in records] == [("a", 10), ("b", 11), ("c", 12), ("a", 13)]


def test_no_episodes_are_none() -> None:
    """What a process plays where there are fewer episodes than processes; it was an error of range()."""
    notes = Notes()
    assert play_episodes(notes, counting_envs([2], [3]), ["a", "b"], 0) == []
    assert notes.seen == []


@pytest.mark.parametrize("episodes", range(1, 12))
@pytest.mark.parametrize("lengths", [([3],), ([1, 4], [2]), ([2], [3, 1], [1], [5, 2], [1, 1, 4])])
def test_every_episode_is_whole_and_in_its_place(lengths: tuple[list[int], ...], episodes: int) -> None:
    """Record i of round k is environment i's k-th episode, and its return the sum of its step numbers."""
    n = min(len(lengths), episodes)
    found = play_episodes(Notes(), counting_envs(*lengths), [str(i) for i in range(len(lengths))], episodes)
    expected = [(str(k % n), lengths[k % n][k // n % len(lengths[k % n])]) for k in range(episodes)]
    assert [(r.env_id, r.length) for r in found] == expected
    assert [r.episode_return for r in found] == [length * (length + 1) / 2 for _, length in expected]
    assert [r.first_success for r in found] == [2 if length >= 3 else -1 for _, length in expected]
    assert [r.success_at_end for r in found] == [length == 3 for _, length in expected]


def test_an_episode_that_is_stopped_at_success_is_the_same_up_to_there() -> None:
    """The waiting environment stays in the batch, so that the others' actions are the same to the bit."""
    whole, stopped = (
        play_episodes(Notes(), counting_envs([5], [2]), ["a", "b"], 2, stop_at_success=stop) for stop in (False, True)
    )
    assert [(r.success, r.first_success) for r in whole] == [(r.success, r.first_success) for r in stopped]
    assert [(r.length, r.stopped) for r in whole] == [(5, False), (2, False)]
    assert [(r.length, r.stopped) for r in stopped] == [(3, True), (2, False)]


def test_actions_of_environments_that_wait_are_not_handed_on() -> None:
    taken: list[int] = []
    play_episodes(Notes(), counting_envs([1], [3]), ["a", "b"], 2, on_actions=lambda rows: taken.append(len(rows)))
    assert taken == [2, 1, 1]


@pytest.mark.parametrize("window", ["cached", "full"])
def test_the_number_of_environments_does_not_change_an_episode(window: str) -> None:
    """Episodes begin together, so that a context has the same length at the same step of every episode."""
    results = []
    for n in (1, 3, 6):
        policy = make_policy(11, 3)
        policy.window = "full" if window == "full" else "cached"
        vec_env = make_vec_env("Hopper-v5", n, seed=20, horizon=40)
        records = play_episodes(policy, vec_env, ["Hopper-v5"] * n, 6)
        vec_env.close()
        results.append(records)
    for other in results[1:]:
        assert [r.episode_seed for r in results[0]] == [r.episode_seed for r in other] == list(range(20, 26))
        assert [r.length for r in results[0]] == [r.length for r in other]
        np.testing.assert_allclose(*([r.episode_return for r in rs] for rs in (results[0], other)), rtol=1e-3)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_worker_processes_give_the_same_episodes_to_the_bit(workers: int) -> None:
    results = []
    for number in (0, workers):
        vec_env = make_vec_env("push-v3", 5, seed=3, horizon=12, workers=number)
        results.append(play_episodes(make_policy(), vec_env, ["push-v3"] * 5, 7))
        assert len(vec_env.processes) == number
        vec_env.close()
    assert results[0] == results[1]
