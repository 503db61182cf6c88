"""Goals are distinct, reproducible, and the same with any number of environments."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from eva_rl import envs
from eva_rl.cli.parsing import parse
from eva_rl.envs.metaworld import MetaWorldTask
from eva_rl.envs.registry import task_ids
from eva_rl.errors import UserError


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


def metaworlds_own(task: str, seed: int, index: int) -> list[NDArray[np.float32]]:
    """Observations of an episode as a user of Meta-World's benchmark class sees them."""
    import metaworld

    benchmark = metaworld.MT1(task, seed=seed)
    env = benchmark.train_classes[task]()
    env.set_task(benchmark.train_tasks[index])
    seen = [env.reset()[0]]
    rng = np.random.default_rng(index)
    seen += [env.step(rng.uniform(-1, 1, 4).astype(np.float32))[0] for _ in range(15)]
    return [observation.astype(np.float32) for observation in seen]


@pytest.mark.filterwarnings("ignore:Constant:UserWarning")
@pytest.mark.parametrize(
    ("task", "seed", "index"),
    [
        ("button-press-v3", 42, 7),
        pytest.param("push-v3", 0, 0, marks=pytest.mark.slow),
        pytest.param("pick-place-wall-v3", 1, 49, marks=pytest.mark.slow),
        pytest.param("door-open-v3", 0, 31, marks=pytest.mark.slow),
    ],
)
def test_a_goal_by_its_index_is_that_of_metaworlds_own_list(task: str, seed: int, index: int) -> None:
    env = envs.make_env(f"{task}?goal=index:{index}@{seed}")
    expected = metaworlds_own(task, seed, index)
    for episode_seed in (3, None):
        observation, _ = env.reset(seed=episode_seed)
        rng = np.random.default_rng(index)
        seen = [observation] + [env.step(rng.uniform(-1, 1, 4).astype(np.float32))[0] for _ in range(15)]
        np.testing.assert_array_equal(seen, expected)
    by_seed, _ = envs.make_env(f"{task}?goal={index}").reset()
    assert not np.array_equal(by_seed[-3:], expected[0][-3:]), "a seed is no index"


@pytest.mark.parametrize(
    ("typed", "name", "protocol"),
    [
        ("7", "7", "the goal of seed 7 in every episode"),
        ("index:7", "index:7", "goal 7 of Meta-World's MT1(seed=0).train_tasks in every episode"),
        ("index:07@0", "index:7", "goal 7 of Meta-World's MT1(seed=0).train_tasks in every episode"),
        ("index:49@42", "index:49@42", "goal 49 of Meta-World's MT1(seed=42).train_tasks in every episode"),
    ],
)
@pytest.mark.parametrize("command", ["finetune", "collect", "evaluate"])
def test_which_goal_is_recorded(command: str, typed: str, name: str, protocol: str) -> None:
    __import__(f"eva_rl.{command}" + (".command" if command == "finetune" else ""))
    config = parse(command, ["env=push-v3", f"env.goal={typed}"])
    assert envs.canonical_id(config.env.id) == f"metaworld/push-v3?goal={name}"
    assert envs.env_spec(config.env.id).protocol.endswith(protocol)


@pytest.mark.parametrize(
    "bad", ["index:50", "index:-1", "index", "index:7@", "index:7@x", "3.5", "true", "seed:3", "-1"]
)
def test_a_goal_that_is_neither_says_what_to_type(bad: str) -> None:
    with pytest.raises(UserError, match=r"env\.goal=.*index:0 to index:49 of metaworld\.MT1"):
        envs.canonical_id(f"push-v3?goal={bad}")


def test_goals_by_index_of_metaworlds_groups() -> None:
    assert task_ids("mt10?goal=index:3")[1] == "metaworld/push-v3?goal=index:3"
