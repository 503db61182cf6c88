"""The replay of whole episodes: what is kept, what is drawn, and what a window shows at an episode's ends."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from eva_rl.batch import InputScaling
from eva_rl.data import Episode, Trajectories, WindowSampler
from eva_rl.data.replay import TrajectoryReplay
from eva_rl.errors import UserError

SCALING = InputScaling.create([0.0, 0.0], [1.0, 1.0], 10.0, [-1.0], [1.0])


def episode(length: int, start: int = 0, *, terminated: bool = True) -> Episode:
    """Observation t is (start, t), action t is t / 100, reward t is t + 1."""
    steps = np.arange(length, dtype=np.float32)
    ends = np.arange(length) == length - 1
    return Episode(
        observations=np.stack([np.full(length + 1, start, np.float32), np.arange(length + 1, dtype=np.float32)], 1),
        actions=(steps / 100)[:, None],
        rewards=steps + 1,
        terminations=ends & terminated,
        truncations=ends & (not terminated),
    )


def make(capacity: int = 100, folder: Path | None = None) -> TrajectoryReplay:
    return TrajectoryReplay(capacity, 2, 1, folder)


def test_windows_are_the_sampler_s() -> None:
    episodes = [episode(5, 1), episode(9, 2), episode(2, 3)]
    replay = make()
    replay.extend(episodes, asked=50.0)
    sampler = WindowSampler(Trajectories.from_episodes(episodes), 4, SCALING)
    drawn = replay.sample(400, np.random.default_rng(0), 4, SCALING)
    rows = []
    offsets = {1: 0, 2: 5, 3: 14}
    for newest in drawn.observations[:, -1]:
        rows.append(offsets[int(newest[0])] + int(newest[1]))
    expected = sampler.windows(np.array(rows))
    for name in ("observations", "actions", "returns_to_go", "timesteps", "attention_mask", "rewards"):
        torch.testing.assert_close(getattr(drawn, name), getattr(expected, name))
    assert set(rows) == set(range(16))  # every env step is drawn, no observation after an end is


def test_returns_are_relabelled_with_what_was_obtained() -> None:
    replay = make()
    replay.add(episode(3), asked=100.0)
    batch = replay.sample(32, np.random.default_rng(0), 3, SCALING)
    full = batch.timesteps[:, -1] == 2
    assert full.any()
    # rewards 1, 2, 3: what is still to come is 6, 5, 3, whatever was asked for
    torch.testing.assert_close(batch.returns_to_go[full][0, :, 0], torch.tensor([0.6, 0.5, 0.3]))
    asked = replay.sample_as_asked(32, np.random.default_rng(0), 3, SCALING, np.ones(1))
    ends = asked.timesteps[:, -1] == 2
    torch.testing.assert_close(asked.returns_to_go[ends][0, :, 0], torch.tensor([10.0, 9.9, 9.7]))


@pytest.mark.parametrize("terminated", [True, False])
def test_a_time_limit_is_not_an_end(terminated: bool) -> None:
    replay = make()
    replay.add(episode(3, terminated=terminated), asked=0.0)
    batch = replay.sample_transitions(64, np.random.default_rng(0), 4, SCALING)
    ended = batch.windows.timesteps[:, -1] == 3  # windows that show the observation after the last step
    assert ended.any()
    last = batch.terminated[ended][:, :-1]
    assert last[:, -1].all() == terminated
    assert not last[:, :-1].any()
    assert not batch.acted[ended][:, -1].any()
    assert batch.acted[ended][:, :-1].all()
    torch.testing.assert_close(batch.windows.observations[ended][0, -1], torch.tensor([0.0, 3.0]))


def test_an_episode_that_was_solved_and_went_on_is_solved() -> None:
    replay, zeros = TrajectoryReplay(100, 2, 1), np.zeros
    episode = Episode(
        observations=zeros((4, 2), np.float32),
        actions=zeros((3, 1), np.float32),
        rewards=zeros(3, np.float32),
        terminations=zeros(3, bool),
        truncations=np.array([False, False, True]),
        successes=np.array([False, True, False]),
    )
    replay.add(episode, 1.0)
    assert replay.num_solved == 1


def test_padding_is_no_transition() -> None:
    replay = make()
    replay.add(episode(6), asked=0.0)
    batch = replay.sample_transitions(64, np.random.default_rng(0), 4, SCALING)
    for timesteps, valid in zip(batch.windows.timesteps, batch.valid, strict=True):
        assert valid.sum() == min(int(timesteps[-1]), 3)


def test_broken_off_episodes_serve_for_transitions_only() -> None:
    replay = make()
    replay.add(episode(4, 1, terminated=False), asked=0.0, complete=False)
    with pytest.raises(UserError, match="no complete episode"):
        replay.sample(4, np.random.default_rng(0), 3, SCALING)
    replay.add(episode(4, 2), asked=0.0)
    cloned = replay.sample(64, np.random.default_rng(0), 3, SCALING)
    assert set(cloned.observations[:, -1, 0].tolist()) == {2.0}
    seen = replay.sample_transitions(64, np.random.default_rng(0), 3, SCALING)
    assert set(seen.windows.observations[:, -1, 0].tolist()) == {1.0, 2.0}
    assert torch.equal(seen.complete[:, 0], seen.windows.observations[:, -1, 0] == 2)


def test_a_clone_is_shown_what_the_expert_wanted(tmp_path: Path) -> None:
    """The disturbed action that was executed was cloned where the replay held the demonstrations."""
    replay, wanted = make(), np.full((4, 1), 0.5, np.float32)
    replay.add(episode(4, 1), asked=0.0)
    assert replay.sample(4, np.random.default_rng(0), 3, SCALING).target_actions is None
    replay.add(dataclasses.replace(episode(4, 2), target_actions=wanted), asked=0.0)
    replay.add(episode(4, 3), asked=0.0)
    restored = make(folder=tmp_path)
    restored.restore(replay.tensors())
    for one in (replay, restored):
        for windows in (
            one.sample(64, np.random.default_rng(0), 3, SCALING),
            one.sample_transitions(64, np.random.default_rng(0), 3, SCALING).windows,
        ):
            assert windows.target_actions is not None
            labelled = windows.observations[:, -1, 0] == 2
            assert torch.equal(windows.target_actions[~labelled], windows.actions[~labelled])
            acted = windows.timesteps[labelled] < 4
            real = acted if windows.attention_mask is None else acted & windows.attention_mask[labelled]
            assert bool((windows.target_actions[labelled][real] == 0.5).all())
            assert labelled.any()


def test_the_oldest_episodes_make_room() -> None:
    replay = make(20)
    for start in range(12):
        replay.add(episode(3 + start % 4, start), asked=0.0)
        kept = [int(replay.observations[row, 0]) for row in replay._table["start"]]
        assert kept == list(range(kept[0], start + 1))  # the newest, without a gap
        assert replay.num_steps + replay.num_episodes <= 20
        batch = replay.sample(200, np.random.default_rng(start), 3, SCALING)
        assert set(batch.observations[:, -1, 0].tolist()) == set(map(float, kept))
    with pytest.raises(UserError, match=r"algo\.replay_size=20"):
        replay.add(episode(20), asked=0.0)


def test_better_episodes_are_drawn_more_often() -> None:
    replay = make()
    for length in (1, 2, 4):  # returns 1, 3, 10
        replay.add(episode(length, length), asked=0.0)
    drawn = replay.sample(20_000, np.random.default_rng(0), 2, SCALING, by_return=True).observations[:, -1, 0]
    shares = np.array([(drawn == length).float().mean().item() for length in (1, 2, 4)])
    weights = np.array([1 * 0.01, 2 * 2 / 9, 4 * 1.0])
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.01)


def test_a_restored_replay_draws_the_same(tmp_path: Path) -> None:
    replay = make(20)
    for start in range(7):
        replay.add(episode(4 + start % 3, start, terminated=start % 2 == 0), asked=3.0, complete=start != 5)
    other = make(20, tmp_path / "replay")
    other.restore(replay.tensors())
    assert isinstance(other.observations, np.memmap)
    for one in (replay, other):
        one.add(episode(5, 9), asked=1.0)
    first, second = (r.sample_transitions(32, np.random.default_rng(1), 4, SCALING) for r in (replay, other))
    torch.testing.assert_close(first.windows.observations, second.windows.observations)
    torch.testing.assert_close(first.windows.returns_to_go, second.windows.returns_to_go)
    assert torch.equal(first.terminated, second.terminated)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 0.5), (0.0, 2 / 40)])
def test_demonstrations_are_drawn_as_often_as_asked_for(share: float, expected: float) -> None:
    replay = make()
    replay.extend([episode(2, 1)], asked=50.0)
    replay.add(episode(38, 2), asked=50.0)
    state = replay.tensors()
    again = make()
    again.restore(state)
    for kept in (replay, again):
        drawn = kept.sample(2000, np.random.default_rng(0), 4, SCALING, demonstration_share=share)
        transitions = kept.sample_transitions(2000, np.random.default_rng(0), 4, SCALING, demonstration_share=share)
        for windows in (drawn, transitions.windows):
            assert (windows.observations[:, -1, 0] == 1).float().mean().item() == pytest.approx(expected, abs=0.04)
