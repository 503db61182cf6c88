"""A vectorised environment: Stable-Baselines3's interface with numbered episodes, in this process and in workers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray
from stable_baselines3.common.monitor import Monitor

from eva_rl.envs import make_vec_env
from eva_rl.envs.host import StepArrays
from eva_rl.envs.spec import EnvSpec
from eva_rl.envs.vector import TaskVecEnv, workers_that_pay
from eva_rl.errors import UserError
from eva_rl.limits.threads import ThreadLimits

BOX = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32), gym.spaces.Box(-1, 1, (1,), np.float32)


class Counting(gym.Env[Any, Any]):
    """Observes its seed and the number of its steps; ends after ``length`` steps, and is solved at step two."""

    observation_space, action_space = BOX

    def __init__(self, length: int, terminates: bool = True) -> None:
        self.length, self.terminates = length, terminates

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.seed, self.steps = seed or 0, 0
        return self.seen(), {"success": False}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        over = self.steps == self.length
        info = {"success": self.steps == 2}
        return self.seen(), float(action[0]), over and self.terminates, over and not self.terminates, info

    def seen(self) -> NDArray[np.float32]:
        return np.array([self.seed, self.steps], np.float32)

    def doubled(self, value: int, *, more: int = 0) -> int:
        return 2 * value + self.length + more


class Maker:
    """Picklable."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __call__(self) -> Counting:
        return Counting(*self.arguments)


@pytest.fixture(params=[0, 2])
def vec_env(request: pytest.FixtureRequest) -> Iterator[TaskVecEnv]:
    """Three environments with episodes of 2, 3 and 4 steps; the last is truncated."""
    makers = [Maker(2), Maker(3), Maker(4, False)]
    made = TaskVecEnv(makers, ["two", "three", "four"], BOX, range(10, 13), 3, request.param)
    yield made
    made.close()


def play(
    vec_env: TaskVecEnv, steps: int
) -> list[tuple[NDArray[Any], NDArray[Any], NDArray[Any], list[dict[str, Any]]]]:
    actions = np.arange(vec_env.num_envs, dtype=np.float32)[:, None] / 10
    return [vec_env.step(actions) for _ in range(steps)]


def test_episodes_are_numbered_and_begin_anew_on_their_own(vec_env: TaskVecEnv) -> None:
    np.testing.assert_array_equal(vec_env.reset(), [[10, 0], [11, 0], [12, 0]])
    assert [info["episode_seed"] for info in vec_env.reset_infos] == [10, 11, 12]
    steps = play(vec_env, 4)
    np.testing.assert_array_equal(steps[0][0], [[10, 1], [11, 1], [12, 1]])
    np.testing.assert_array_equal(steps[1][0], [[13, 0], [11, 2], [12, 2]])
    np.testing.assert_array_equal(steps[2][0], [[13, 1], [14, 0], [12, 3]])
    np.testing.assert_array_equal(steps[3][0], [[16, 0], [14, 1], [15, 0]])
    assert [list(dones) for _, _, dones, _ in steps] == [
        [False] * 3, [True, False, False], [False, True, False], [True, False, True],
    ]  # fmt: skip
    np.testing.assert_allclose(steps[0][1], [0, 0.1, 0.2])
    assert [info["episode_seed"] for info in vec_env.reset_infos] == [16, 14, 15]


def test_infos_at_the_end_of_an_episode(vec_env: TaskVecEnv) -> None:
    vec_env.reset()
    *_, infos = play(vec_env, 2)[-1]
    np.testing.assert_array_equal(infos[0]["terminal_observation"], [10, 2])
    assert "terminal_observation" not in infos[1]
    assert [info["success"] for info in infos] == [True, True, True]
    *_, infos = play(vec_env, 1)[-1]
    assert [info["is_success"] for info in infos] == [False, True, True], "kept to the end, gone with the next episode"
    assert [info["success_now"] for info in infos] == [False, False, False]
    *_, infos = play(vec_env, 1)[-1]
    assert [info["TimeLimit.truncated"] for info in infos] == [False, False, True]


def test_what_was_returned_does_not_change_later(vec_env: TaskVecEnv) -> None:
    first = vec_env.reset()
    second, rewards, dones, infos = play(vec_env, 2)[-1]
    kept = [second.copy(), rewards.copy(), dones.copy(), infos[0]["terminal_observation"].copy()]
    play(vec_env, 3)
    np.testing.assert_array_equal(first, [[10, 0], [11, 0], [12, 0]])
    for now, before in zip([second, rewards, dones, infos[0]["terminal_observation"]], kept, strict=True):
        np.testing.assert_array_equal(now, before)


def test_seeds_can_be_set(vec_env: TaskVecEnv) -> None:
    assert vec_env.seed(100) == [100, 101, 102]
    np.testing.assert_array_equal(vec_env.reset()[:, 0], [100, 101, 102])
    np.testing.assert_array_equal(vec_env.reset()[:, 0], [103, 104, 105])
    vec_env.seed_each([7, 8])
    np.testing.assert_array_equal(vec_env.reset()[:, 0], [7, 8, 108])
    assert vec_env.seed(None) == [None] * 3
    np.testing.assert_array_equal(vec_env.reset()[:, 0], [10, 11, 111])


def test_a_block_steps_on_its_own_and_waits_at_the_end(vec_env: TaskVecEnv) -> None:
    vec_env.reset()
    block, actions = vec_env.block([2, 0]), np.array([[0.5], [0.25]], np.float32)
    for _ in range(2):
        block.begin_step(actions)
        block.finish()
    np.testing.assert_array_equal(vec_env.arrays.observations, [[10, 2], [11, 0], [12, 2]])
    np.testing.assert_array_equal(vec_env.arrays.rewards, np.float32([0.25, 0, 0.5]))
    assert list(vec_env.arrays.terminated) == [True, False, False]
    block.begin_reset(np.array([False, True]))  # rows of the block: its second is environment 0
    block.finish()
    np.testing.assert_array_equal(vec_env.arrays.observations, [[13, 0], [11, 0], [12, 2]])
    block.begin_step(actions, np.array([True, False]))
    block.finish()
    np.testing.assert_array_equal(vec_env.arrays.observations[:, 1], [0, 0, 3])


def test_attributes_and_methods(vec_env: TaskVecEnv) -> None:
    assert vec_env.get_attr("length") == [2, 3, 4]
    assert vec_env.get_attr("render_mode") == [None] * 3
    vec_env.set_attr("length", 9, indices=[1])
    assert vec_env.get_attr("length", indices=[2, 1]) == [4, 9]
    assert vec_env.env_method("doubled", 5, more=100) == [112, 119, 114]
    assert vec_env.env_method("doubled", 1, indices=0) == [4]
    assert vec_env.env_is_wrapped(Monitor) == [False] * 3


def test_workers_live_as_long_as_the_environment() -> None:
    vec_env = TaskVecEnv([Maker(2)] * 3, ["x"] * 3, BOX, range(3), 3, workers=8)
    assert len(vec_env.processes) == 3, "no more than environments"
    processes = vec_env.processes
    vec_env.close()
    vec_env.close()
    for process in processes:
        process.join(10)
    assert not any(process.is_alive() for process in processes)


def test_arrays_share_one_memory_without_overlapping() -> None:
    sizes = (3, 5, 2)
    memory = bytearray(StepArrays.num_bytes(*sizes))
    one, other = StepArrays.over(memory, *sizes), StepArrays.over(memory, *sizes)
    names = list(StepArrays.layout(*sizes))
    for number, name in enumerate(names):
        getattr(one, name)[...] = number % 2 if getattr(one, name).dtype == bool else number
    for number, name in enumerate(names):
        array = getattr(other, name)
        assert (array == (number % 2 if array.dtype == bool else number)).all(), name


def spec(horizon: int, env_id: str = "metaworld/push-v3") -> EnvSpec:
    return EnvSpec(env_id, 39, 4, (-1.0,) * 4, (1.0,) * 4, horizon, True, "")


def test_short_work_gets_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ThreadLimits(affinity=4, quota=math.inf, environment=None)
    monkeypatch.setattr("eva_rl.envs.vector.thread_limits", lambda: limits)
    assert workers_that_pay([spec(20)]) == 0
    assert workers_that_pay([spec(500)] * 10) == 4
    assert workers_that_pay([spec(2000)] * 2) == 2, "no more than environments"
    for processes, expected in ((2, 2), (4, 0)):
        monkeypatch.setattr("eva_rl.envs.vector.local_world_size", lambda number=processes: number)
        assert workers_that_pay([spec(500)] * 10) == expected


def test_a_container_gets_workers_for_its_quota_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ThreadLimits(affinity=64, quota=2.0, environment=None)
    monkeypatch.setattr("eva_rl.envs.vector.thread_limits", lambda: limits)
    assert workers_that_pay([spec(500)] * 50) == 2


@pytest.mark.parametrize("number", [0, -1])
def test_at_least_one_environment(number: int) -> None:
    with pytest.raises(UserError, match=f"num_envs={number}: expected at least 1"):
        make_vec_env("push-v3", number)
