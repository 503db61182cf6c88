"""Windows, their weights, and drawing them ahead."""

from __future__ import annotations

import mmap
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from eva_rl.batch import InputScaling, WindowBatch
from eva_rl.data import (
    PrefetchingSampler,
    Trajectories,
    WindowSampler,
    arrays,
    read_store,
    select_episodes,
    window_weights,
    write_store,
)
from eva_rl.data.selection import asked_returns_to_go, observation_statistics
from eva_rl.errors import UserError
from tests.data.making import differences, random_trajectories

SCALING = InputScaling.create([1.0, 2.0, 3.0], [2.0, 4.0, 0.5], 10.0, [-2.0, 0.0], [2.0, 4.0])


def sampler(data: Trajectories | None = None, **options: object) -> WindowSampler:
    return WindowSampler(data or random_trajectories(), 4, SCALING, **options)  # type: ignore[arg-type]


def by_hand(data: Trajectories, episode: int, last: int) -> dict[str, np.ndarray]:
    """One window, step by step, as its definition says."""
    whole = data.episode(episode)
    window: dict[str, list[object]] = {"observations": [], "actions": [], "returns_to_go": [], "timesteps": []}
    for step in range(last - 3, last + 1):
        real = step >= 0
        window["observations"].append((whole.observations[step] - [1, 2, 3]) / [2, 4, 0.5] if real else np.zeros(3))
        window["actions"].append((whole.actions[step] - [0, 2]) / [2, 2] if real else np.zeros(2))
        window["returns_to_go"].append([whole.rewards[step:].sum() / 10 if real else 0.0])
        window["timesteps"].append(step if real else 0)
    return {key: np.array(value) for key, value in window.items()}


def test_every_window_by_hand() -> None:
    data = random_trajectories((4, 1, 6))
    batch = sampler(data).windows(np.arange(11))
    assert batch.attention_mask is not None
    places = [(e, s) for e, steps in enumerate(data.lengths) for s in range(steps)]
    for row, (episode, last) in enumerate(places):
        for key, expected in by_hand(data, episode, last).items():
            np.testing.assert_allclose(getattr(batch, key)[row], expected, atol=1e-6, err_msg=f"{key} {episode} {last}")
        assert batch.attention_mask[row].tolist() == [last - 3 + step >= 0 for step in range(4)]


def test_what_is_asked_for_is_what_a_policy_sees_that_acts_alike() -> None:
    """The target at the first env step, then less what was rewarded; padding stays zero."""
    data = random_trajectories((4, 1, 6))
    asked = asked_returns_to_go(data, 7.0)
    for index, begin in enumerate(data.offsets[:-1]):
        rewards = data.episode(index).rewards
        expected, to_go = [], 7.0
        for reward in rewards:
            expected.append(to_go)
            to_go -= float(reward)
        np.testing.assert_allclose(asked[begin : begin + len(rewards)], expected, atol=1e-5)
    shown = sampler(data, returns_to_go=asked).windows(np.array([2, 3]))
    np.testing.assert_allclose(shown.returns_to_go[0].squeeze(-1), [0, *asked[:3] / 10], atol=1e-6)
    np.testing.assert_allclose(shown.returns_to_go[1].squeeze(-1), asked[:4] / 10, atol=1e-6)
    obtained = sampler(data).windows(np.array([2, 3]))
    for name in ("observations", "actions", "rewards", "timesteps", "attention_mask"):
        assert torch.equal(getattr(shown, name), getattr(obtained, name))


def test_full_windows_have_no_mask() -> None:
    assert sampler().windows(np.array([8, 10])).attention_mask is None


def same(one: WindowBatch, other: WindowBatch) -> bool:
    return torch.equal(one.observations, other.observations) and torch.equal(one.timesteps, other.timesteps)


def test_draws_depend_on_seed_and_step_alone() -> None:
    first, again, other = sampler(seed=1), sampler(seed=1), sampler(seed=2)
    batches = [first.sample(8, step) for step in range(5)]
    assert same(again.sample(8, 4), batches[4])  # without the steps before it
    assert not same(batches[3], batches[4])
    assert not same(other.sample(8, 4), batches[4])


def counts(data: Trajectories, by: str, draws: int = 20_000) -> np.ndarray:
    """How often the last steps of windows fall into each episode."""
    drawn = sampler(data, weights=window_weights(data, by)).sample(draws, 0)
    firsts = {
        float(SCALING.observations(torch.tensor(data.observations))[row, 0]): row for row in range(data.num_steps)
    }
    rows = [firsts[value] for value in drawn.observations[:, -1, 0].tolist()]
    return np.bincount(np.searchsorted(data.offsets, rows, side="right") - 1, minlength=3) / draws


def with_returns(data: Trajectories, returns: list[float]) -> Trajectories:
    rewards = np.repeat(np.array(returns) / data.lengths, data.lengths).astype(np.float32)
    object.__setattr__(data, "rewards", rewards)
    return data


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("uniform", [4 / 11, 1 / 11, 6 / 11]),
        ("episode", [1 / 3, 1 / 3, 1 / 3]),
        ("length", [16 / 53, 1 / 53, 36 / 53]),
        ("return", [1 / 1.51, 0.01 / 1.51, 0.5 / 1.51]),
    ],
)
def test_weights_are_frequencies(by: str, expected: list[float]) -> None:
    data = with_returns(random_trajectories((4, 1, 6)), [30.0, -10.0, 10.0])
    np.testing.assert_allclose(counts(data, by), expected, atol=0.012)


def test_equal_returns_and_unknown_weightings() -> None:
    data = with_returns(random_trajectories((4, 1, 6)), [5.0, 5.0, 5.0])
    np.testing.assert_allclose(window_weights(data, "return"), window_weights(data, "episode"))
    with pytest.raises(UserError, match="Did you mean 'return'"):
        window_weights(data, "returns")
    for wrong in (np.ones(10), np.zeros(11), -np.ones(11), np.full(11, np.nan)):
        with pytest.raises(UserError, match="Window weights"):
            sampler(data, weights=wrong)


def test_zero_weights_are_never_drawn() -> None:
    weights = np.zeros(11)
    weights[[0, 7, 10]] = 1
    drawn = sampler(weights=weights).sample(2000, 0).timesteps[:, -1]
    assert sorted(set(drawn.tolist())) == [0, 2, 5]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top": 0.4}, [1, 3]),  # the best two of five
        ({"top": 0.41}, [0, 1, 3]),  # of equal returns the earlier
        ({"top": 0.001}, [3]),
        ({"first": 3, "top": 0.5}, [0, 1]),
        ({"min_return": 2.0}, [0, 1, 3, 4]),
        ({"max_return": 2.0}, [0, 2, 4]),
        ({"first": 1}, [0]),
        ({}, [0, 1, 2, 3, 4]),
    ],
)
def test_selection(options: dict[str, float], expected: list[int]) -> None:
    data = with_returns(random_trajectories((2, 2, 2, 2, 2)), [2.0, 3.0, -1.0, 9.0, 2.0])
    chosen = select_episodes(data, **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(chosen.observations, data.select(expected).observations)


def test_selection_of_nothing() -> None:
    data = with_returns(random_trajectories((2, 2)), [2.0, 3.0])
    with pytest.raises(UserError, match="no episode has a return from 4 to inf; they have 2 to 3"):
        select_episodes(data, min_return=4)
    with pytest.raises(UserError, match=r"episodes to draw from, fewer than data.sample=100"):
        select_episodes(data, sample=100)
    for top in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match="fraction"):
            select_episodes(data, top=top)


def test_prefetching_changes_nothing() -> None:
    plain = sampler(seed=3)
    with PrefetchingSampler(sampler(seed=3)) as ahead:
        for size, step in [(8, 0), (8, 1), (8, 2), (8, 40), (8, 41), (4, 42), (8, 3), (8, 3)]:
            assert same(ahead.sample(size, step), plain.sample(size, step))


class Slow:
    """Counts what is drawn, and waits until it may."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.may = threading.Event()

    def sample(self, batch_size: int, step: int, device: torch.device | str = "cpu") -> WindowBatch:
        assert self.may.wait(10)
        self.steps.append(step)
        if step == 5:
            raise UserError("step 5 cannot be drawn")
        return sampler().sample(batch_size, step, device)


def test_prefetching_is_bounded_and_raises_in_its_turn() -> None:
    slow = Slow()
    slow.may.set()
    with PrefetchingSampler(slow, ahead=2) as ahead:
        ahead.sample(2, 3)
        ahead.sample(2, 4)
        with pytest.raises(UserError, match="step 5"):
            ahead.sample(2, 5)
    assert slow.steps == sorted(set(slow.steps))  # each once
    assert max(slow.steps) <= 7
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("windows")]


def anonymous_bytes() -> int:
    """Memory of this process that is not a mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_mapped_windows_take_no_memory_for_the_data(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    part = Trajectories(
        observations=rng.normal(size=(10_000, 500)).astype(np.float32),
        actions=np.zeros((10_000, 2), np.float32),
        rewards=np.ones(10_000, np.float32),
        terminations=np.zeros(10_000, bool),
        truncations=np.arange(1, 10_001) % 100 == 0,
        final_observations=np.zeros((100, 500), np.float32),
        offsets=np.arange(0, 10_001, 100),
    )
    before = anonymous_bytes()
    write_store(tmp_path / "store", (part for _ in range(5)), "five parts of 20 MB")
    data = read_store(tmp_path / "store")
    scaling = InputScaling.create([0.0] * 500, [1.0] * 500, 1.0, [-1.0] * 2, [1.0] * 2)
    windows = WindowSampler(data, 20, scaling)
    for step in range(20):
        windows.sample(64, step)
    assert data.num_steps == 50_000
    assert anonymous_bytes() - before < 40e6  # the observations alone are 100 MB
    held = data.observations[:]
    np.testing.assert_array_equal(held[20_000:20_010], part.observations[:10])


def test_a_sample_of_episodes_is_drawn_by_its_seed() -> None:
    """Own data were the same for all seeds of a study; each seed has episodes of its own, each episode its chance."""
    data = with_returns(random_trajectories((2,) * 6), [float(n) for n in range(6)])

    def drawn(seed: int) -> list[int]:
        return [round(value) for value in select_episodes(data, sample=2, seed=seed).returns]

    assert drawn(3) == drawn(3)
    sets = [drawn(seed) for seed in range(300)]
    assert all(len(set(found)) == 2 and found == sorted(found) for found in sets)
    counts = np.bincount(np.concatenate(sets), minlength=6)
    assert counts.min() > 60 < counts.max() < 140  # of 100 expected


@pytest.mark.parametrize("chosen", [[2, 0], [1, 2], [0, 1, 2], [1]])
@pytest.mark.parametrize("room", [1 << 40, 0])
def test_episodes_that_are_large_are_chosen_without_a_copy_in_memory(
    chosen: list[int], room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that was chosen of mapped data was copied into memory, twice over."""
    monkeypatch.setenv("EVA_RL_CACHE", str(tmp_path))
    monkeypatch.setattr(arrays, "memory_limit", lambda: room)
    data = random_trajectories()
    found = data.select(chosen)
    assert differences(found, Trajectories.from_episodes([data.episode(index) for index in chosen])) == []
    assert found.returns.tolist() == data.returns[chosen].tolist()
    follows = len(chosen) == 1 or chosen[0] < chosen[1]
    assert np.shares_memory(found.observations, data.observations) == (room == 0 and follows)
    base: object = found.rewards
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, mmap.mmap) == (room == 0 and not follows)
    assert list(tmp_path.iterdir()) == []


def test_episodes_are_counted_from_the_end_too() -> None:
    """The last one was empty."""
    data = random_trajectories((4, 1, 6))
    assert np.array_equal(data.episode(-1).observations, data.episode(2).observations)
    assert len(data.episode(-1).rewards) == 6
    assert data.select([-1, 0]).lengths.tolist() == [6, 4]
    for beyond in (3, -4):
        with pytest.raises(IndexError):
            data.episode(beyond)
        with pytest.raises(IndexError):
            data.select([beyond])


def test_large_choices_that_find_no_room_on_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EVA_RL_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(arrays, "memory_limit", lambda: 0)
    with pytest.raises(UserError, match=r"too large for the memory and cannot be kept in .*EVA_RL_CACHE"):
        random_trajectories().select([2, 0])


def test_statistics_of_observations_are_taken_part_by_part() -> None:
    """numpy's standard deviation took twice the memory of all observations."""
    rng = np.random.default_rng(0)
    observations = rng.normal(1000, 0.1, size=(300_000, 8)).astype(np.float32)
    data = Trajectories.from_arrays(observations, np.zeros((300_000, 1)), np.zeros(300_000))
    tracemalloc.start()
    try:
        mean, std = observation_statistics(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < observations.nbytes
    np.testing.assert_allclose(mean, observations.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(std, observations.std(0, dtype=np.float64), rtol=1e-9)
