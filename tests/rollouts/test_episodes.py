"""Whole episodes in vectorised environments: counting, seeds and boundaries, on real environments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv

from eva_rl.envs import make_vec_env
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
        return np.zeros(1, np.float32), {"episode_seed": 10 + self._episode}

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


def test_episodes_are_counted_and_seen_exactly() -> None:
    notes = Notes()
    vec_env = DummyVecEnv([lambda: CountingEnv([2, 4]), lambda: CountingEnv([3])])
    finished: list[EpisodeRecord] = []
    records = play_episodes(notes, vec_env, ["a", "b"], 2, finished.append)
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
    assert [r.episode_seed for r in records] == [10, 10, 11, 11]
    assert sorted(map(id, finished)) == sorted(map(id, records))
    assert notes.seen == [
        ([0, 0], [0, 0], [True, True]),
        ([1, 1], [1, 1], [False, False]),
        ([0, 2], [2, 2], [True, False]),  # the first observation of a's next episode, never its last one
        ([1, 0], [1, 3], [False, True]),
        ([2, 1], [2, 1], [False, False]),
        ([3, 2], [3, 2], [False, False]),
    ]


@pytest.mark.parametrize("window", ["cached", "full"])
def test_the_number_of_environments_does_not_change_an_episode(window: str) -> None:
    """With a context of one step both windows show the same, so batching alone is tested."""
    results = []
    for n in (1, 3):
        policy = make_policy(11, 3, context_length=1)
        policy.window = "full" if window == "full" else "cached"
        vec_env = make_vec_env("Hopper-v5", n, seed=20)
        records = play_episodes(policy, vec_env, ["Hopper-v5"] * n, 3 // n)
        vec_env.close()
        results.append(records)
    assert [r.episode_seed for r in results[0]] == [r.episode_seed for r in results[1]] == [20, 21, 22]
    assert [r.length for r in results[0]] == [r.length for r in results[1]]
    np.testing.assert_allclose(*([r.episode_return for r in rs] for rs in results), rtol=1e-3)
