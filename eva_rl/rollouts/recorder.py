"""From the steps of vectorised environments to whole episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eva_rl.agents.policy import Policy
from eva_rl.data.trajectories import Episode

_Step = tuple[NDArray[np.float32], float, bool, bool, bool]


class EpisodeRecorder:
    """Keeps the steps of n environments until an episode ends.

    Stable-Baselines3's vectorised environments return the first observation of the next episode with the last step of
    the one before, and hide the last observation in ``infos``; here every episode comes out with its own.

    Args:
        observations: (n, obs), what ``reset()`` returned.
        reports_success: Whether ``info["is_success"]`` means anything.
    """

    def __init__(self, observations: NDArray[np.float32], reports_success: bool) -> None:
        self._observations: list[list[NDArray[np.float32]]] = [[row.copy()] for row in observations]
        self._steps: list[list[_Step]] = [[] for _ in observations]
        self._reports_success = reports_success

    def step(
        self,
        actions: NDArray[np.float32],
        observations: NDArray[np.float32],
        rewards: NDArray[np.float32],
        dones: NDArray[np.bool_],
        infos: Sequence[Mapping[str, Any]],
    ) -> list[tuple[int, Episode]]:
        """Take in one step of every environment, as ``vec_env.step(actions)`` returned it.

        Args:
            actions: (n, act), as executed.
            observations: (n, obs).
            rewards: (n,).
            dones: (n,).
            infos: One an environment.

        Returns:
            The episodes that ended, with the index of their environment.
        """
        finished = []
        for i, (done, info) in enumerate(zip(dones, infos, strict=True)):
            truncated = bool(info.get("TimeLimit.truncated", False))
            terminated = bool(done) and not truncated
            success = bool(info.get("is_success", False))
            self._steps[i].append((actions[i].copy(), float(rewards[i]), terminated, truncated, success))
            self._observations[i].append(np.array(info["terminal_observation"] if done else observations[i]))
            if done:
                finished.append((i, self._episode(i)))
                self._observations[i], self._steps[i] = [observations[i].copy()], []
        return finished

    def unfinished(self) -> list[Episode]:
        """The beginnings of episodes that have not ended, as if a time limit had cut them here."""
        begun = [i for i, steps in enumerate(self._steps) if steps]
        for i in begun:
            action, reward, _, _, success = self._steps[i][-1]
            self._steps[i][-1] = (action, reward, False, True, success)
        return [self._episode(i) for i in begun]

    def _episode(self, index: int) -> Episode:
        actions, rewards, terminations, truncations, successes = zip(*self._steps[index], strict=True)
        return Episode(
            observations=np.stack(self._observations[index]).astype(np.float32),
            actions=np.stack(actions).astype(np.float32),
            rewards=np.array(rewards, np.float32),
            terminations=np.array(terminations),
            truncations=np.array(truncations),
            successes=np.array(successes) if self._reports_success else None,
        )


class ActionRecorder:
    """A policy that remembers the actions it took since it was last reset.

    Args:
        policy: Acts.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._taken: list[NDArray[np.float32]] = []

    @property
    def observation_dim(self) -> int:
        """Numbers in one observation."""
        return self._policy.observation_dim

    @property
    def action_dim(self) -> int:
        """Numbers in one action."""
        return self._policy.action_dim

    @property
    def actions(self) -> NDArray[np.float32]:
        """(N, act), of all environments."""
        return np.concatenate(self._taken) if self._taken else np.zeros((0, self.action_dim), np.float32)

    def reset(self, env_ids: Sequence[str]) -> None:
        """Forget all histories and actions."""
        self._policy.reset(env_ids)
        self._taken = []

    def act(
        self,
        observations: NDArray[np.float32],
        rewards: NDArray[np.float32],
        episode_starts: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        """Act as the policy does."""
        actions = self._policy.act(observations, rewards, episode_starts)
        self._taken.append(actions.copy())
        return actions
