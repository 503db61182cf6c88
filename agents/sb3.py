"""Policies behind Stable-Baselines3's ``predict``, and in a plain Gymnasium loop."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.wrappers import NormalizeReward
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from eva_rl.agents.policy import Policy
from eva_rl.errors import UserError

RolloutState = tuple[NDArray[np.int64], ...]


class PredictAdapter:
    """Gives a policy the method ``predict`` that Stable-Baselines3's ``evaluate_policy`` calls.

    ``predict`` is not told the rewards from which a Decision Transformer counts down its return-to-go. They come from
    :meth:`listen`, which wraps the vectorised environment, or in a loop of your own from :meth:`observe`. Without
    either the return-to-go stays at the target for the whole episode, which is not what the policy was trained on.

    Args:
        policy: Acts.
        env_id: The task, for its target return.
    """

    def __init__(self, policy: Policy, env_id: str = "") -> None:
        self._policy = policy
        self._env_id = env_id
        self._rewards: NDArray[np.float32] | None = None
        self._steps = 0

    def listen(self, vec_env: VecEnv) -> VecEnv:
        """Wrap an environment so that its rewards, as they are at this place of the stack, reach the policy.

        Below a VecNormalize, that is an environment that holds one, the rewards are those before its scaling.

        Raises:
            UserError: No environment of Stable-Baselines3's; the single environments scale their rewards by a running
                estimate (NormalizeReward), which cannot be undone; or a VecNormalize normalises observations.
        """
        if not isinstance(vec_env, VecEnv):
            raise UserError(
                f"listen() wraps a vectorised environment of Stable-Baselines3, got a {type(vec_env).__name__}. In a "
                "loop of your own call observe(rewards) after each step (docs/policies.md)."
            )
        if _scales_rewards(vec_env):
            raise UserError(
                "The environments are wrapped in gymnasium's NormalizeReward: returns-to-go cannot be counted down "
                "from scaled rewards. Make them without it, or use VecNormalize, whose original rewards are known."
            )
        if any(layer.norm_obs for layer in _normalizations(vec_env)):
            raise UserError(
                "VecNormalize normalises observations, and the policy has a normalisation of its own. Make it with "
                "norm_obs=False."
            )
        return _RewardListener(vec_env, self)

    def observe(self, rewards: NDArray[Any] | float) -> None:
        """Take the rewards (n,) of the env step that the last actions caused."""
        self._rewards = np.array(rewards, dtype=np.float32).reshape(-1)

    def predict(
        self,
        observation: NDArray[Any] | dict[str, NDArray[Any]],
        state: RolloutState | None = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[np.float32], RolloutState]:
        """Choose actions; the signature is Stable-Baselines3's.

        Args:
            observation: (n, obs), or (obs,) for a single environment.
            state: What the previous call returned; None forgets all histories.
            episode_start: (n,), True where this is the first observation of an episode; None says that none is, but
                for the first call.
            deterministic: Changes nothing: a Decision Transformer acts deterministically outside of training.

        Returns:
            Actions (n, act), or (act,), and the state to hand in next.

        Raises:
            UserError: Observations of another form, or another state than the last call's.
        """
        if isinstance(observation, dict):
            raise UserError("The policy takes flat observations; wrap the env in gymnasium's FlattenObservation.")
        observation = np.asarray(observation, np.float32)
        single = observation.ndim == 1
        rows = np.atleast_2d(observation)
        starts = self._starts(state, episode_start, len(rows))
        rewards = np.zeros(len(rows), np.float32) if self._rewards is None else self._rewards
        actions = self._policy.act(rows, rewards, starts)
        self._rewards = None
        self._steps += 1
        return actions[0] if single else actions, (np.array([self._steps]),)

    def _starts(self, state: RolloutState | None, episode_start: NDArray[np.bool_] | None, n: int) -> NDArray[np.bool_]:
        if state is None:
            self._steps, self._rewards = 0, None
            self._policy.reset([self._env_id] * n)
            return np.ones(n, dtype=bool)
        if int(state[0][0]) != self._steps:
            raise UserError(
                "predict() was given a state that is not the last call's: histories live in the policy, so that two "
                "rollouts cannot alternate. Make one PredictAdapter with its own policy for each."
            )
        return np.zeros(n, dtype=bool) if episode_start is None else np.array(episode_start, dtype=bool).reshape(-1)


class _RewardListener(VecEnvWrapper):
    """Hands rewards on to an adapter."""

    def __init__(self, vec_env: VecEnv, adapter: PredictAdapter) -> None:
        super().__init__(vec_env)
        self._adapter = adapter
        self._normalize = next(iter(_normalizations(vec_env)[::-1]), None)

    def reset(self) -> VecEnvObs:
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, dones, infos = self.venv.step_wait()
        self._adapter.observe(rewards if self._normalize is None else self._normalize.get_original_reward())
        return observations, rewards, dones, infos


def _normalizations(vec_env: VecEnv) -> list[VecNormalize]:
    """Those of a stack; the last one sees observations and rewards first."""
    found, layer = [], vec_env
    while isinstance(layer, VecEnvWrapper):
        found += [layer] if isinstance(layer, VecNormalize) else []
        layer = layer.venv
    return found


def _scales_rewards(vec_env: VecEnv) -> bool:
    return any(vec_env.env_is_wrapped(NormalizeReward))
