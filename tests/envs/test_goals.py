"""Goals are distinct, reproducible, and the same with any number of environments."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from eva_rl import envs
from eva_rl.envs.metaworld import MetaWorldTask


def rollout(env: MetaWorldTask, seed: int, steps: int = 15) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    seen = [observation]
    for _ in range(steps):
        seen.append(env.step(rng.uniform(-1, 1, 4).astype(np.float32))[0])
    return np.stack(seen)


@pytest.mark.parametrize("task", ["metaworld/push-v3", "metaworld/peg-unplug-side-v3", "metaworld/hammer-v3"])
def test_a_seed_decides_an_episode_whatever_came_before(task: str) -> None:
    fresh, used = MetaWorldTask(task), MetaWorldTask(task)
    for other in (5, 6):
        rollout(used, other)
    np.testing.assert_array_equal(rollout(fresh, 11), rollout(used, 11))
    assert not np.array_equal(rollout(fresh, 11), rollout(fresh, 12))


def test_metaworld_itself_ignores_the_seed() -> None:
    """Why this wrapper exists: without it, equal constructor seeds give equal goals."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as classes

    one, two = (classes["push-v3-goal-observable"](seed=0) for _ in range(2))
    np.testing.assert_array_equal(one.reset(seed=1)[0], two.reset(seed=2)[0])


@pytest.mark.parametrize("num_envs", [1, 2, 3])
def test_episodes_do_not_depend_on_the_number_of_environments(num_envs: int) -> None:
    vec_env = envs.make_vec_env("push-v3", num_envs, horizon=2)
    vec_env.seed(100)
    goals, order = {}, []
    observations = vec_env.reset()
    for _ in range(2 * -(-6 // num_envs)):
        for i, info in enumerate(vec_env.reset_infos):
            if info["episode_seed"] not in goals:
                goals[info["episode_seed"]] = observations[i].copy()
                order.append(info["episode_seed"])
        observations, *_ = vec_env.step(np.zeros((num_envs, 4), np.float32))
    vec_env.close()
    assert set(range(100, 106)) <= set(order)
    single = MetaWorldTask("metaworld/push-v3")
    for seed in range(100, 106):
        np.testing.assert_array_equal(goals[seed], single.reset(seed=seed)[0])
    assert len({goals[seed].tobytes() for seed in range(100, 106)}) == 6


def test_success_is_kept_to_the_last_step_under_sb3s_name() -> None:
    task = "metaworld/reach-v3"
    env, expert = MetaWorldTask(task), envs.scripted_expert(task)
    observation, _ = env.reset(seed=4)
    now, ever = [], []
    for step in range(200):
        action = expert(observation) if step < 120 else np.array([1, -1, 1, 0], np.float32)
        observation, _, terminated, truncated, info = env.step(action)
        now.append(info["success_now"])
        ever.append(info["is_success"])
        assert info["success"] == info["is_success"]
    assert truncated
    assert not terminated
    assert any(now)
    assert not now[-1], "the arm was moved away again"
    assert ever == list(np.maximum.accumulate(now))
