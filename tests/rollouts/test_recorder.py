"""Whole episodes out of vectorised environments, and an agent trained on the spot that plays them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from eva_rl import envs
from eva_rl.collect import main
from eva_rl.data import read_episodes
from eva_rl.errors import UserError
from eva_rl.rollouts.recorder import EpisodeRecorder
from eva_rl.rollouts.trained_experts import TrainedExpert, collect_trained


def test_recorded_episodes_are_those_of_a_plain_loop() -> None:
    vec_env = envs.make_vec_env("mujoco/hopper", 2, seed=7, horizon=40)
    rng = np.random.default_rng(0)
    observations: Any = vec_env.reset()
    recorder = EpisodeRecorder(observations, reports_success=False)
    finished = []
    for _ in range(90):
        actions = rng.uniform(-1, 1, (2, 3)).astype(np.float32)
        observations, rewards, dones, infos = vec_env.step(actions)
        finished += recorder.step(actions, observations, rewards, dones, infos)
    vec_env.close()
    assert {bool(e.terminations[-1]) for _, e in finished} == {True, False}
    played = [0, 0]
    for index, episode in finished:
        env = envs.make_env("mujoco/hopper", horizon=40)
        observation, _ = env.reset(seed=7 + index + 2 * played[index])
        played[index] += 1
        for t, action in enumerate(episode.actions):
            np.testing.assert_array_equal(episode.observations[t], observation)
            observation, reward, terminated, truncated, _ = env.step(action)
            assert episode.rewards[t] == pytest.approx(reward, rel=1e-6)
            assert (episode.terminations[t], episode.truncations[t]) == (terminated, truncated)
        np.testing.assert_array_equal(episode.observations[-1], observation)
        assert episode.successes is None
    begun = recorder.unfinished()
    assert all(e.truncations[-1] and not e.terminations.any() for e in begun)
    assert sum(len(e.rewards) for e in begun) + sum(len(e.rewards) for _, e in finished) == 180


def test_an_agent_is_trained_and_plays(tmp_path: Path) -> None:
    out = tmp_path / "hopper.h5"
    arguments = ["env=mujoco/hopper", "env.horizon=30", "expert=sac", "expert.steps=150", "episodes=3", f"out={out}"]
    assert main(arguments) == 0
    data = read_episodes(out)
    assert (data.num_episodes, data.env_id) == (3, "Hopper-v5")
    assert data.lengths.max() <= 30
    assert len({row.tobytes() for row in data.observations[data.offsets[:-1]]}) == 3


def test_a_return_that_is_not_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eva_rl.rollouts.trained_experts.EVALUATE_EVERY", 100)
    with pytest.raises(UserError, match=r"a mean return of .* 120 env steps, expert\.until=1e\+06"):
        collect_trained("mujoco/hopper", 1, TrainedExpert(max_steps=120, until=1e6, horizon=20))


def test_training_ends_when_it_is_good_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eva_rl.rollouts.trained_experts.EVALUATE_EVERY", 60)
    data = collect_trained("mujoco/hopper", 1, TrainedExpert(max_steps=10_000, until=-1e6, horizon=20))
    assert "steps=60&" in data.source


def test_meta_world_has_agents_too() -> None:
    data = collect_trained("reach-v3", 2, TrainedExpert(max_steps=110, horizon=10))
    assert isinstance(envs.make_env("reach-v3"), gym.Env)
    assert data.successes is not None
    assert data.num_steps == 20
