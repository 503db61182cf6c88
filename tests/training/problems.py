"""Two small control problems with known solutions, and a policy that has to find them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from eva_rl.agents import Conditioning, DecisionTransformer, DecisionTransformerConfig, DecisionTransformerPolicy
from eva_rl.batch import InputScaling
from eva_rl.training.collector import TaskEnvs

Observation = NDArray[np.float32]


class Bandit(gym.Env[Observation, NDArray[np.float32]]):
    """One env step an episode; the reward is highest, 1, at the action 0.6."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    best, solved = 1.0, 0.9

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        return np.zeros(2, np.float32), {}

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        return np.zeros(2, np.float32), 1 - float(abs(action[0] - 0.6)), True, False, {}


class TwoSteps(gym.Env[Observation, NDArray[np.float32]]):
    """Two env steps: the first pays a little for going left; going right pays much, one step later.

    Greedy actions earn 0.2 * 1 + 0, the best ones 1.
    """

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    best, solved = 1.0, 0.7

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        self._place: float | None = None
        return np.array([1, 0], np.float32), {}

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if self._place is None:
            self._place = float(np.clip(action[0], -1, 1))
            return np.array([0, self._place], np.float32), 0.2 * max(0.0, -self._place), False, False, {}
        return np.array([0, self._place], np.float32), max(0.0, self._place), True, False, {}


def make_vec(kind: type[gym.Env[Any, Any]], n: int = 8) -> VecEnv:
    return DummyVecEnv([kind for _ in range(n)])


def make_task(kind: type[gym.Env[Any, Any]], n: int = 8) -> TaskEnvs:
    return TaskEnvs(make_vec(kind, n), "problem", False)


def make_learner(stochastic: bool = False, target: float = 1.0, context_length: int = 4) -> DecisionTransformerPolicy:
    torch.manual_seed(0)
    config = DecisionTransformerConfig(
        2, 1, 16, 1, 2, context_length=context_length, max_timestep=4, stochastic=stochastic
    )
    scaling = InputScaling.create([0.0, 0.0], [1.0, 1.0], 1.0, [-1.0], [1.0])
    return DecisionTransformerPolicy(DecisionTransformer(config).eval(), scaling, Conditioning(target))


def mean_return(policy: DecisionTransformerPolicy, kind: type[gym.Env[Any, Any]], episodes: int = 8) -> float:
    """Return of the deterministic policy."""
    vec_env = make_vec(kind, episodes)
    policy.reset(["problem"] * episodes)
    observations: Any = vec_env.reset()
    rewards, starts, total = np.zeros(episodes, np.float32), np.ones(episodes, bool), np.zeros(episodes)
    running = np.ones(episodes, bool)
    while running.any():
        observations, rewards, starts, _ = vec_env.step(policy.act(observations, rewards, starts))
        total += rewards * running
        running &= ~starts
    return float(total.mean())


class LinearQuadratic(gym.Env[Observation, NDArray[np.float32]]):
    """A point that drifts away, x' = 1.1 x + 0.5 u: the reward is -(x^2 + 0.2 u^2); 10 env steps, then a time limit."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    drift, push, cost = 1.1, 0.5, 0.2

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        self._x, self._step = float(self._random.uniform(-0.6, 0.6)), 0
        return self._observation(), {}

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        u, x = float(np.clip(action[0], -1, 1)), self._x
        self._x, self._step = self.drift * x + self.push * u, self._step + 1
        return self._observation(), -(x**2 + self.cost * u**2), False, self._step == 10, {}

    def _observation(self) -> Observation:
        return np.array([self._x, 0], np.float32)

    @classmethod
    def best_gain(cls, discount: float) -> float:
        """K of the best action -K x, for ever: a fixed point of the discounted Riccati equation."""
        value, a, b = 1.0, cls.drift, cls.push
        for _ in range(1000):
            gain = discount * a * b * value / (cls.cost + discount * b * b * value)
            value = 1 + cls.cost * gain**2 + discount * (a - b * gain) ** 2 * value
        return gain
