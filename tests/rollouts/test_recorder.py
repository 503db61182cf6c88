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


def rows(*values: float) -> Any:
    return np.array([[value] for value in values], np.float32)


def test_steps_by_hand() -> None:
    """Two environments; the first ends at its second step by itself, the second is cut by a limit at its third."""
    recorder = EpisodeRecorder(rows(0, 10), reports_success=False)
    none: dict[str, Any] = {}
    flags = np.array
    assert not recorder.step(rows(1, 2), rows(1, 11), flags([0.5, 1.5]), flags([False, False]), [none, none])
    end = {"terminal_observation": [2.0], "is_success": True}
    ((index, first),) = recorder.step(rows(3, 4), rows(50, 12), flags([1, 2]), flags([True, False]), [end, none])
    assert index == 0
    assert first.observations[:, 0].tolist() == [0, 1, 2]
    assert (first.actions[:, 0].tolist(), first.rewards.tolist()) == ([1, 3], [0.5, 1])
    assert (first.terminations.tolist(), first.truncations.tolist()) == ([False, True], [False, False])
    assert first.successes is not None, "an environment that tells of success without having said so"
    assert first.successes.tolist() == [False, True]
    cut = {"terminal_observation": [13.0], "TimeLimit.truncated": True}
    ((index, second),) = recorder.step(rows(5, 6), rows(51, 60), flags([1, 2]), flags([False, True]), [none, cut])
    assert (index, second.observations[:, 0].tolist()) == (1, [10, 11, 12, 13])
    assert (second.terminations.any(), second.truncations.tolist()) == (False, [False, False, True])
    (begun,) = recorder.unfinished()
    assert begun.observations[:, 0].tolist() == [50, 51]


def test_looking_at_what_has_begun_changes_nothing() -> None:
    """The step that was the last so far once stayed truncated within the whole episode."""
    recorder = EpisodeRecorder(rows(0), reports_success=False)
    step = (np.array([1.0]), np.array([False]), [{}])
    for number in (1, 2):
        recorder.step(rows(9), rows(number), *step, extras={"level": rows(number)})
        for _ in range(2):
            (begun,) = recorder.unfinished()
            assert begun.truncations.tolist() == [False] * (number - 1) + [True]
    end = [{"terminal_observation": [3.0]}]
    ((_, whole),) = recorder.step(rows(9), rows(0), np.array([1.0]), np.array([True]), end, extras={"level": rows(3)})
    assert (whole.truncations.any(), whole.terminations.tolist()) == (False, [False, False, True])
    assert whole.extras["level"][:, 0].tolist() == [1, 2, 3]
    assert recorder.unfinished() == []


@pytest.mark.slow
def test_an_agent_is_trained_and_plays(tmp_path: Path) -> None:
    out = tmp_path / "hopper.h5"
    arguments = ["env=mujoco/hopper", "env.horizon=30", "expert=sac", "expert.steps=150", "episodes=3", f"out={out}"]
    assert main(arguments) == 0
    data = read_episodes(out)
    assert (data.num_episodes, data.env_id) == (3, "Hopper-v5")
    assert data.lengths.max() <= 30
    assert len({row.tobytes() for row in data.observations[data.offsets[:-1]]}) == 3


def test_a_return_that_is_not_reached_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The agent was thrown away, after as many env steps as were asked for."""
    monkeypatch.setattr("eva_rl.rollouts.trained_experts.EVALUATE_EVERY", 100)
    data = collect_trained("mujoco/hopper", 1, TrainedExpert(max_steps=120, until=1e6, horizon=20))
    assert data.num_episodes == 1
    assert "in 120 env steps, expert.until=1e+06 was asked for" in caplog.text


def test_training_ends_when_it_is_good_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eva_rl.rollouts.trained_experts.EVALUATE_EVERY", 60)
    data = collect_trained("mujoco/hopper", 1, TrainedExpert(max_steps=10_000, until=-1e6, horizon=20))
    assert "steps=60&" in data.source


def test_meta_world_has_agents_too() -> None:
    data = collect_trained("reach-v3", 2, TrainedExpert(max_steps=110, horizon=10))
    assert isinstance(envs.make_env("reach-v3"), gym.Env)
    assert data.successes is not None
    assert data.num_steps == 20
