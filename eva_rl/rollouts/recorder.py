"""From the steps of vectorised environments to whole episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eva_rl.data.trajectories import Episode

_Step = tuple[NDArray[np.float32], float, bool, bool, bool, Mapping[str, NDArray[np.float32]]]


class EpisodeRecorder:
    """Keeps the steps of n environments until an episode ends.

    Stable-Baselines3's vectorised environments return the first observation of the next episode with the last step of
    the one before, and hide the last observation in ``infos``; here every episode comes out with its own.

    Args:
        observations: (n, obs), what ``reset()`` returned.
        reports_success: Whether every step tells of success; where the infos are the first to tell, it is noticed.
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
        extras: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> list[tuple[int, Episode]]:
        """Take in one step of every environment, as ``vec_env.step(actions)`` returned it.

        Args:
            actions: (n, act), as executed.
            observations: (n, obs).
            rewards: (n,).
            dones: (n,).
            infos: One an environment.
            extras: What else to keep of the step, (n, width) by name.

        Returns:
            The episodes that ended, with the index of their environment.
        """
        finished = []
        for i, (done, info) in enumerate(zip(dones, infos, strict=True)):
            truncated = bool(info.get("TimeLimit.truncated", False))
            terminated = bool(done) and not truncated
            self._reports_success |= "is_success" in info
            success = bool(info.get("is_success", False))
            noted = {name: rows[i].copy() for name, rows in (extras or {}).items()}
            self._steps[i].append((actions[i].copy(), float(rewards[i]), terminated, truncated, success, noted))
            self._observations[i].append(np.array(info["terminal_observation"] if done else observations[i]))
            if done:
                finished.append((i, self._episode(i)))
                self._observations[i], self._steps[i] = [observations[i].copy()], []
        return finished

    def unfinished(self) -> list[Episode]:
        """The beginnings of episodes that have not ended, as if a time limit had cut them here."""
        return [_truncated(self._episode(i)) for i, steps in enumerate(self._steps) if steps]

    def _episode(self, index: int) -> Episode:
        actions, rewards, terminations, truncations, successes, noted = zip(*self._steps[index], strict=True)
        return Episode(
            observations=np.stack(self._observations[index]).astype(np.float32),
            actions=np.stack(actions).astype(np.float32),
            rewards=np.array(rewards, np.float32),
            terminations=np.array(terminations),
            truncations=np.array(truncations),
            successes=np.array(successes) if self._reports_success else None,
            extras={name: np.stack([step[name] for step in noted]) for name in noted[0]},
        )


def _truncated(episode: Episode) -> Episode:
    truncations = episode.truncations.copy()
    truncations[-1] = True
    return replace(episode, truncations=truncations)
