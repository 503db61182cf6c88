"""The leaner Meta-World step against Meta-World's own, bit by bit, on goals of several seeds."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from eva_rl.envs.metaworld import MetaWorldTask, scripted_expert
from eva_rl.envs.names import METAWORLD_TASKS
from eva_rl.envs.sawyer import LeanSawyer, tolerance
from tests.adapters.making import usual_first

SOME = ("metaworld/push-v3", "metaworld/stick-pull-v3", "metaworld/door-open-v3")


def plain_task(env_id: str) -> Any:
    """A task as Meta-World makes it, drawing goals from the stream that ``seed()`` seeds."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as classes

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        task = classes[f"{env_id.removeprefix('metaworld/')}-goal-observable"](seed=0)
    task._freeze_rand_vec, task.seeded_rand_vec = False, True
    task.max_path_length = 200
    return task


@pytest.mark.parametrize("env_id", usual_first(METAWORLD_TASKS, SOME))
@pytest.mark.filterwarnings("ignore:Constant:UserWarning")
def test_every_number_is_metaworlds_own(env_id: str) -> None:
    """With two tasks on one compiled model by turns, after several episodes, near the object and away from it."""
    plain, lean, other = plain_task(env_id), MetaWorldTask(env_id), MetaWorldTask(env_id)
    assert isinstance(lean.unwrapped, LeanSawyer)
    assert lean.unwrapped.model is other.unwrapped.model
    expert, rng = scripted_expert(env_id), np.random.default_rng(1)
    for episode, seed in enumerate((3, 11)):
        plain.seed(seed)
        expected, (found, _) = plain.reset()[0], lean.reset(seed=seed)
        other.reset(seed=50 + episode)
        np.testing.assert_array_equal(found, expected.astype(np.float32))
        for step in range(90):
            action = np.clip(expert(found) + 0.1 * rng.normal(size=4), -1, 1).astype(np.float32)
            expected, reward, _, truncated, info = plain.step(action)
            found, own_reward, _, own_truncated, own_info = lean.step(action)
            np.testing.assert_array_equal(found, expected.astype(np.float32))
            assert (own_reward, own_truncated) == (float(reward), truncated)
            assert {key: float(own_info[key]) for key in info if key != "success"} == {
                key: float(value) for key, value in info.items() if key != "success"
            }
            assert own_info["success_now"] == bool(info["success"])
            if step % 30 == 0:
                other.step(-action)


def test_tolerance_is_metaworlds() -> None:
    from metaworld.utils import reward_utils

    rng = np.random.default_rng(0)
    for _ in range(300):
        low, high = np.sort(rng.uniform(-1, 1, 2))
        x, margin = np.float64(rng.uniform(-3, 3)), rng.choice([0.0, 0.1, 1.7])
        expected = reward_utils.tolerance(x, bounds=(low, high), margin=margin, sigmoid="long_tail")
        assert tolerance(x, bounds=(low, high), margin=margin, sigmoid="long_tail") == expected


def test_goals_of_metaworlds_own_version_one_reward() -> None:
    """Options of the constructor are handed on, and a task made with them differs."""
    first, second = (MetaWorldTask("metaworld/push-v3", reward_function_version=version) for version in ("v1", "v2"))
    first.reset(seed=0)
    second.reset(seed=0)
    assert first.step(np.zeros(4, np.float32))[1] != second.step(np.zeros(4, np.float32))[1]
