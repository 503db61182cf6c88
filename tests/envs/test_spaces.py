"""Spaces, observations, rewards and infos of every shape: acted in as they are, or refused in words before a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from numpy.typing import NDArray

from eva_rl import envs
from eva_rl.errors import UserError
from eva_rl.rollouts.evaluation import EvaluationResult, evaluate_policy

THREE, TWO = spaces.Box(-1, 1, (3,), np.float32), spaces.Box(-1, 1, (2,), np.float32)
PIXELS = spaces.Box(0, 255, (4, 4, 3), np.uint8)


class Odd(gym.Env[Any, Any]):
    """Of any spaces, and any way to fill them; refuses actions that are not of its own space."""

    def __init__(
        self,
        observations: spaces.Space[Any] = THREE,
        actions: spaces.Space[Any] = TWO,
        observe: Callable[[int], Any] | None = None,
        info: Callable[[int], dict[str, Any]] = lambda _: {},
        reward: Callable[[int], Any] = lambda _: 1.0,
        terminated: bool = False,
    ) -> None:
        self.observation_space, self.action_space = observations, actions
        self._observe, self._info, self._reward, self._terminated = observe, info, reward, terminated

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.observation_space.seed(seed)
        self._step = 0
        return self._seen(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self._step += 1
        return self._seen(), self._reward(self._step), self._terminated, False, self._info(self._step)

    def _seen(self) -> Any:
        return self.observation_space.sample() if self._observe is None else self._observe(self._step)


class Middle:
    """Acts in the middle of the bounds."""

    def __init__(self, spec: envs.EnvSpec) -> None:
        self.observation_dim, self.action_dim = spec.observation_dim, spec.action_dim
        bounds = np.clip([spec.action_low, spec.action_high], -5, 5)
        self._action = bounds.mean(0, dtype=np.float32)

    def reset(self, env_ids: object) -> None:
        pass

    def act(self, observations: NDArray[Any], rewards: object, episode_starts: object) -> NDArray[np.float32]:
        assert observations.dtype == np.float32
        return np.tile(self._action, (len(observations), 1))


def register(number: list[int] = [0], **options: Any) -> str:  # noqa: B006 - counts
    number[0] += 1
    gym.register(f"Odd{number[0]}-v0", entry_point=lambda: Odd(**options), max_episode_steps=5)
    return f"Odd{number[0]}-v0"


def played(workers: int = 0, **options: Any) -> tuple[envs.EnvSpec, EvaluationResult]:
    spec = envs.env_spec(register(**options))
    vec_env = envs.make_vec_env(spec.env_id, 2, workers=workers)
    found = evaluate_policy(Middle(spec), spec.env_id, episodes=2, vec_env=vec_env)
    vec_env.close()
    return spec, found


def box(low: Any, high: Any, kind: type = np.float32) -> spaces.Box:
    return spaces.Box(np.array(low, kind), np.array(high, kind), dtype=kind)  # type: ignore[type-var] # any number


NESTED = spaces.Dict({"b": spaces.Dict({"z": THREE, "a": TWO}), "a": spaces.Tuple((TWO, THREE))})
TAKEN = {
    "bounds of each dimension": (box([-1, 0, -np.inf], [1, 5, np.inf]), box([-2, 0], [0.5, 7]), (3, 2)),
    "float64": (spaces.Box(-1, 1, (3,), np.float64), spaces.Box(-1, 1, (2,), np.float64), (3, 2)),
    "float16": (spaces.Box(-1, 1, (3,), np.float16), spaces.Box(-1, 1, (2,), np.float16), (3, 2)),
    "integers seen": (spaces.Box(0, 9, (3,), np.int64), TWO, (3, 2)),
    "bytes of memory": (spaces.Box(0, 255, (8,), np.uint8), TWO, (8, 2)),
    "matrices": (spaces.Box(-1, 1, (2, 3)), spaces.Box(-1, 1, (2, 2)), (6, 4)),
    "scalars": (spaces.Box(-1, 1, ()), spaces.Box(-1, 1, ()), (1, 1)),
    "tuple": (spaces.Tuple((THREE, spaces.Discrete(3))), TWO, (6, 2)),
    "nested": (NESTED, TWO, (10, 2)),
    "no bounds": (THREE, spaces.Box(-np.inf, np.inf, (2,)), (3, 2)),
    "one bound": (THREE, spaces.Box(0, np.inf, (2,)), (3, 2)),
    "a dimension without room": (THREE, box([0, -1], [0, 1]), (3, 2)),
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_spaces_that_are_acted_in(name: str, workers: int) -> None:
    observations, actions, dims = TAKEN[name]
    spec, found = played(workers, observations=observations, actions=actions)
    assert (spec.observation_dim, spec.action_dim) == dims
    np.testing.assert_array_equal(spec.action_low, np.ravel(actions.low))
    np.testing.assert_array_equal(spec.action_high, np.ravel(actions.high))
    assert [episode.episode_return for episode in found.episodes] == [5, 5]


def test_a_bound_that_float32_rounds_is_the_spaces_own() -> None:
    """0.4 is 0.40000001 as float32, which an environment refuses that checks its actions."""
    env = envs.make_env(register(actions=box([-0.4, 0.1], [0.4, 0.7], np.float64)))
    env.reset(seed=0)
    for bound in (env.action_space.low, env.action_space.high):  # type: ignore[attr-defined]
        assert env.step(bound)[1] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"actions": spaces.Discrete(3)}, r"actions Discrete\(3\).* needs Box"),
        ({"actions": spaces.MultiDiscrete([3, 2])}, r"actions MultiDiscrete\(\[3 2\]\).* needs Box"),
        ({"actions": spaces.MultiBinary(3)}, "needs Box"),
        ({"actions": spaces.Dict({"a": TWO})}, "needs Box"),
        ({"actions": spaces.Tuple((TWO, TWO))}, "needs Box"),
        ({"actions": spaces.Box(0, 5, (2,), np.int64)}, r"int64.* needs .* \(continuous\) actions"),
        ({"actions": spaces.Box(-1, 1, (0,))}, r"actions of shape \(0,\); expected at least one number"),
        ({"observations": spaces.Box(-1, 1, (0,))}, r"observations of shape \(0,\)"),
        ({"observations": spaces.Discrete(4)}, "needs Box"),
        ({"observations": spaces.MultiBinary(4)}, "needs Box"),
        ({"observations": spaces.Sequence(THREE)}, "needs Box"),
        ({"observations": spaces.Graph(THREE, None)}, "needs Box"),
        ({"observations": PIXELS}, "observes images .*sees vectors of numbers"),
        ({"observations": spaces.Box(0, 255, (8, 8), np.uint8)}, "observes images"),
        ({"observations": spaces.Dict({"camera": PIXELS, "state": THREE})}, "observes images"),
        ({"observations": spaces.Tuple((THREE, spaces.Dict({"x": PIXELS})))}, "observes images"),
        ({"observations": spaces.Dict({"a": THREE, "mission": spaces.Text(5)})}, "observes text"),
    ],
)
def test_spaces_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        envs.env_spec(register(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "observe",
    [
        lambda step: np.zeros(3, [np.float64, np.int32, np.bool_][step % 3]),
        lambda step: [0.0, 0, True],
        lambda step: (0.0, 0.5, 1.0),
        lambda step: np.zeros(6, np.float32)[::2],
    ],
)
def test_observations_of_changing_kinds_are_float32(observe: Callable[[int], Any]) -> None:
    """The policy asserts it."""
    assert played(observe=observe)[1].mean_reward == 5


@pytest.mark.parametrize(
    ("observe", "message"),
    [
        (lambda step: np.zeros((1, 3)) if step == 2 else np.zeros(3), r"env step 2 .* shape \(1, 3\)"),
        (lambda step: np.zeros(4) if step == 5 else np.zeros(3), r"env step 5 .* shape \(4,\)"),
        (lambda step: None, "of type object"),
        (lambda step: np.zeros(3, complex), "of type complex128"),
        (lambda step: {"a": np.zeros(3)}, "of type object"),
        (lambda step: np.array([0, 0, np.inf]), r"not finite \(number 2\)"),
    ],
)
def test_observations_that_are_none(observe: Callable[[int], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        played(observe=observe)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("key", ["success", "is_success"])
@pytest.mark.parametrize(
    ("value", "rate"),
    [
        (lambda step: np.bool_(step > 2), 1),
        (lambda step: np.array([step > 2]), 1),
        (lambda step: np.array([[False, step > 2]]), 1),
        (lambda step: np.array(False), 0),
        (lambda step: np.float32(step == 5), 1),
        (lambda step: 0, 0),
        (lambda step: float("nan"), None),
        (lambda step: np.array([np.nan, 1]), None),
        (lambda step: None, None),
        (lambda step: "yes", None),
        (lambda step: float("nan") if step < 5 else 1.0, 1),
    ],
)
def test_success_as_infos_tell_it(value: Callable[[int], Any], rate: int | None, key: str, workers: int) -> None:
    """What tells nothing gives no rate; NaN was a success."""
    found = played(workers, info=lambda step: {key: value(step)})[1]
    assert found.reports_success == (rate is not None)
    assert found.metrics().get("eval/success_rate") == rate


@pytest.mark.parametrize("reward", [np.array([1.0]), np.array([[1]]), np.float16(1), 1, True, np.int8(1)])
def test_rewards_that_are_one_number(reward: Any) -> None:
    assert played(reward=lambda _: reward)[1].mean_reward == 5


def test_episodes_of_one_step() -> None:
    found = played(terminated=True)[1]
    assert [(episode.length, episode.episode_return) for episode in found.episodes] == [(1, 1.0)] * 2
