from __future__ import annotations

import logging

import gymnasium as gym
import numpy as np
import pytest

from eva_rl import envs
from eva_rl.envs import registry
from eva_rl.envs.registry import is_known
from eva_rl.errors import UnknownNameError, UserError


def test_fifty_tasks_split_into_cw10_and_mt40() -> None:
    assert len(envs.METAWORLD_TASKS) == 50
    assert len(envs.CW10) == 10
    assert len(envs.MT40) == 40
    assert set(envs.CW10) | set(envs.MT40) == set(envs.METAWORLD_TASKS)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("metaworld/push-v3", "metaworld/push-v3"),
        ("push-v3", "metaworld/push-v3"),
        ("push", "metaworld/push-v3"),
        ("mujoco/hopper", "Hopper-v5"),
        ("mujoco/hopper-v4", "Hopper-v4"),
        ("Hopper-v5", "Hopper-v5"),
        ("Pendulum-v1", "Pendulum-v1"),
    ],
)
def test_names(typed: str, meant: str) -> None:
    assert envs.canonical_id(typed) == meant


def test_v2_names_are_mapped_with_a_message(caplog: pytest.LogCaptureFixture) -> None:
    registry._canonical_id.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert envs.canonical_id("drawer-open-v2") == "metaworld/drawer-open-v3"
    assert "drawer-open-v2" in caplog.text
    assert "metaworld/drawer-open-v3" in caplog.text


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("pusch-v3", "push-v3"),
        ("metaworld/reahc-v3", "reach-v3"),
        ("mujoco/hoper", "mujoco/hopper"),
        ("mt-10", "mt10"),
        ("ml10-val", "ml10"),
    ],
)
def test_misspelt_names_list_close_matches(typed: str, meant: str) -> None:
    with pytest.raises(UnknownNameError, match=meant) as error:
        envs.canonical_id(typed)
    assert typed in str(error.value)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("hopper-medium-v2", "env=Hopper-v5, and data=d4rl:hopper-medium-v2 "),
        ("halfcheetah-medium-replay-v2", "env=HalfCheetah-v5, and data=d4rl:halfcheetah-medium-replay-v2 "),
        ("mujoco/walker2d/expert-v0", "env=Walker2d-v5, and data=minari:mujoco/walker2d/expert-v0 "),
    ],
)
def test_names_of_data_sets_are_told_from_tasks(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=meant):
        envs.canonical_id(typed)


def test_discrete_actions_are_refused() -> None:
    with pytest.raises(UserError, match="continuous"):
        envs.make_env("CartPole-v1")


@pytest.mark.parametrize("name", ["push-v3", "mujoco/hopper", "Pendulum-v1"])
def test_spec_agrees_with_the_environment(name: str) -> None:
    spec, env = envs.env_spec(name), envs.make_env(name)
    observation, _ = env.reset(seed=0)
    assert observation.shape == (spec.observation_dim,)
    assert observation.dtype == np.float32
    assert isinstance(env.action_space, gym.spaces.Box)
    assert env.action_space.shape == (spec.action_dim,)
    np.testing.assert_allclose(env.action_space.low, spec.action_low)
    steps, truncated, terminated = 0, False, False
    while not (truncated or terminated):
        *_, terminated, truncated, _ = env.step(np.zeros(spec.action_dim, np.float32))
        steps += 1
    assert steps == spec.horizon if truncated else steps < spec.horizon
    env.close()


def test_horizon_can_be_set() -> None:
    env = envs.make_env("push-v3", horizon=7)
    env.reset(seed=0)
    ends = [env.step(np.zeros(4, np.float32))[3] for _ in range(7)]
    assert ends == [False] * 6 + [True]
    assert envs.env_spec("push-v3", 7).horizon == 7


class Counted(gym.Env[np.ndarray, np.ndarray]):
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, dim: int = 2) -> None:
        self.observation_space = gym.spaces.Box(-1, 1, (dim,), np.float32)


def test_a_task_that_is_registered_anew_is_described_anew() -> None:
    """As when a cell of a notebook runs again."""
    try:
        for dim, steps in ((2, 20), (3, 50)):
            gym.registry.pop("AnewOf-v0", None)
            gym.register("AnewOf-v0", Counted, max_episode_steps=steps, kwargs={"dim": dim})
            spec = envs.env_spec("AnewOf-v0")
            assert (spec.observation_dim, spec.horizon) == (dim, steps)
            assert f"at most {steps} env steps" in spec.protocol
    finally:
        gym.registry.pop("AnewOf-v0", None)


@pytest.mark.parametrize("name", ["cw10", "mt10"])
def test_a_set_where_one_task_is_expected(name: str) -> None:
    with pytest.raises(UserError, match=f"env={name} is a set of tasks, and this takes one"):
        envs.canonical_id(name)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("metaworld/push-v3", True),
        ("metaworld/push-v3?reward=sparse", True),
        ("Hopper-v5", True),
        ("Hopper-v5?xml_file=/tmp/a.xml", False),
        ("some_module:Hopper-v5", False),
        ("Nothing-v0", False),
        ("", False),
    ],
)
def test_a_name_out_of_a_file_imports_and_builds_nothing(name: str, known: bool) -> None:
    assert is_known(name) is known
