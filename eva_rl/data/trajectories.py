"""Episodes as flat arrays with offsets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eva_rl.errors import UserError

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Episode:
    """One episode of T env steps.

    Attributes:
        observations: (T + 1, obs), the last row being the observation after the last step.
        actions: (T, act), as executed.
        rewards: (T,).
        terminations: (T,), True where the environment ended the episode.
        truncations: (T,), True where a time limit cut it.
        successes: (T,), True from the first step on which the task was solved; None where unknown.
        target_actions: (T, act), what a clone should do in each observation, where it differs from what was
            executed (an expert's own action under injected noise: DART, Laskey et al. 2017); None otherwise.
    """

    observations: Floats
    actions: Floats
    rewards: Floats
    terminations: Flags
    truncations: Flags
    successes: Flags | None = None
    target_actions: Floats | None = None


@dataclass(frozen=True)
class Trajectories:
    """Read-only episodes, concatenated: N env steps in E episodes.

    Attributes:
        observations: (N, obs), the observation in which each action was taken.
        actions: (N, act), as executed.
        rewards: (N,).
        terminations: (N,).
        truncations: (N,).
        final_observations: (E, obs), the observation after the last step of each episode.
        offsets: (E + 1,), episode e owns the rows ``offsets[e]:offsets[e + 1]``.
        env_id: The task the data come from, or "" where unknown.
        source: Where the data come from, as a user would name it.
        successes: (N,) or None.
        target_actions: (N, act) or None; see :class:`Episode`.

    Raises:
        UserError: Lengths disagree, an episode is empty, or there is none.
    """

    observations: Floats
    actions: Floats
    rewards: Floats
    terminations: Flags
    truncations: Flags
    final_observations: Floats
    offsets: NDArray[np.int64]
    env_id: str = ""
    source: str = ""
    successes: Flags | None = None
    target_actions: Floats | None = None
    metadata: dict[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        self._check()
        for array in (self.observations, self.actions, self.rewards, self.offsets, self.final_observations):
            if not isinstance(array, np.memmap):
                array.flags.writeable = False

    def _check(self) -> None:
        where = f"{self.source or 'trajectories'}: "
        if len(self.offsets) < 2:
            raise UserError(where + "no episode. Expected at least one; name another data set.")
        empty = np.flatnonzero(np.diff(self.offsets) <= 0)
        if len(empty):
            raise UserError(where + f"episode {empty[0]} is empty; expected at least one env step.")
        steps, episodes = int(self.offsets[-1]), len(self.offsets) - 1
        expected = {
            "observations": steps,
            "actions": steps,
            "rewards": steps,
            "terminations": steps,
            "truncations": steps,
            "successes": steps,
            "target_actions": steps,
            "final_observations": episodes,
        }
        for name, length in expected.items():
            array = getattr(self, name)
            if array is not None and len(array) != length:
                raise UserError(where + f"{name} has {len(array)} rows, expected {length}.")

    @property
    def num_episodes(self) -> int:
        """Number of episodes E."""
        return len(self.offsets) - 1

    @property
    def num_steps(self) -> int:
        """Number of env steps N."""
        return int(self.offsets[-1])

    @property
    def observation_dim(self) -> int:
        """Numbers in one observation."""
        return int(self.observations.shape[1])

    @property
    def action_dim(self) -> int:
        """Numbers in one action."""
        return int(self.actions.shape[1])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Env steps of each episode, (E,)."""
        return np.diff(self.offsets)

    @cached_property
    def returns(self) -> NDArray[np.float64]:
        """Undiscounted return of each episode, (E,)."""
        return np.add.reduceat(self.rewards.astype(np.float64), self.offsets[:-1])

    @cached_property
    def returns_to_go(self) -> Floats:
        """Sum of the rewards from each env step to the end of its episode, (N,)."""
        total = np.cumsum(self.rewards, dtype=np.float64)
        end = np.repeat(total[self.offsets[1:] - 1], self.lengths)
        return (end - total + self.rewards).astype(np.float32)

    @cached_property
    def timesteps(self) -> NDArray[np.int64]:
        """Env steps since the start of the episode, (N,)."""
        return np.arange(self.num_steps) - np.repeat(self.offsets[:-1], self.lengths)

    @cached_property
    def content_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of observations, actions, rewards and offsets."""
        digest = hashlib.sha256()
        for array in (self.observations, self.actions, self.rewards, self.offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    def episode(self, index: int) -> Episode:
        """Episode number ``index`` with its own observation after the last step."""
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return Episode(
            observations=np.concatenate([self.observations[rows], self.final_observations[index : index + 1]]),
            actions=self.actions[rows],
            rewards=self.rewards[rows],
            terminations=self.terminations[rows],
            truncations=self.truncations[rows],
            successes=None if self.successes is None else self.successes[rows],
            target_actions=None if self.target_actions is None else self.target_actions[rows],
        )

    def select(self, episodes: Sequence[int] | NDArray[np.int64]) -> Trajectories:
        """The given episodes, in the given order, as new trajectories."""
        return Trajectories.from_episodes(
            (self.episode(int(index)) for index in episodes), env_id=self.env_id, source=self.source
        )

    @classmethod
    def from_episodes(cls, episodes: Iterable[Episode], *, env_id: str = "", source: str = "") -> Trajectories:
        """Concatenate episodes.

        ``successes`` and ``target_actions`` are kept where at least one episode has them: an episode without
        successes never succeeded, one without target actions should be imitated as executed.
        """
        parts = list(episodes)
        if not parts:
            raise UserError(f"{source or 'trajectories'}: no episode. Expected at least one; name another data set.")
        successes = [_or(part.successes, np.zeros(len(part.rewards), bool)) for part in parts]
        targets = [_or(part.target_actions, part.actions) for part in parts]
        return cls(
            observations=np.concatenate([part.observations[:-1] for part in parts], dtype=np.float32),
            actions=np.concatenate([part.actions for part in parts], dtype=np.float32),
            rewards=np.concatenate([part.rewards for part in parts], dtype=np.float32),
            terminations=np.concatenate([part.terminations for part in parts], dtype=bool),
            truncations=np.concatenate([part.truncations for part in parts], dtype=bool),
            final_observations=np.stack([part.observations[-1] for part in parts]).astype(np.float32),
            offsets=np.concatenate([[0], np.cumsum([len(part.rewards) for part in parts])]).astype(np.int64),
            env_id=env_id,
            source=source,
            successes=None if all(p.successes is None for p in parts) else np.concatenate(successes),
            target_actions=None if all(p.target_actions is None for p in parts) else np.concatenate(targets),
        )


def _or(value: NDArray[Any] | None, default: NDArray[Any]) -> NDArray[Any]:
    return default if value is None else value


def concatenate(parts: Sequence[Trajectories], *, source: str = "") -> Trajectories:
    """Join several sets of trajectories; the env id is kept where all agree."""
    env_ids = {part.env_id for part in parts}
    return Trajectories.from_episodes(
        (part.episode(index) for part in parts for index in range(part.num_episodes)),
        env_id=env_ids.pop() if len(env_ids) == 1 else "",
        source=source or " + ".join(part.source for part in parts),
    )
