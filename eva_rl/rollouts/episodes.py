"""Whole episodes of a policy, in two groups of environments that act and are simulated by turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from eva_rl.agents.policy import Policy
from eva_rl.envs.vector import EnvBlock, TaskVecEnv

SMALLEST_GROUP = 2
"""Environments below which two groups are not worth their overhead."""


@dataclass(frozen=True)
class EpisodeRecord:
    """One finished episode.

    Attributes:
        env_id: The task.
        episode_seed: Seed of the goal and the starting state.
        episode_return: Sum of the rewards.
        length: Env steps.
        success: Solved at any step.
        success_at_end: Solved at the last step, as the environment itself sees it.
        first_success: Env step (from 0) of the first success, -1 where none.
        reports_success: Whether the environment tells of success.
        stopped: Ended at its first success, so that return, length and success at the end are not measured.
        start: CRC-32 of the first observation, (obs,) float32; None where it is not known.
    """

    env_id: str
    episode_seed: int
    episode_return: float
    length: int
    success: bool
    success_at_end: bool
    first_success: int
    reports_success: bool = True
    stopped: bool = False
    start: int | None = None


def play_episodes(
    policy: Policy,
    vec_env: TaskVecEnv,
    env_ids: Sequence[str],
    episodes: int,
    on_episode: Callable[[EpisodeRecord], None] | None = None,
    *,
    on_actions: Callable[[NDArray[np.float32]], None] | None = None,
    stop_at_success: bool = False,
) -> list[EpisodeRecord]:
    """Let a policy act until some number of episodes is over.

    All environments begin an episode together and wait for each other at its end: the policy then sees contexts of
    the same lengths in every episode, however many environments there are, and whether or not episodes are stopped.
    The environments make two groups; while one is simulated, the policy acts for the other.

    Args:
        policy: Acts; one without ``with_own_history`` acts for all environments at once.
        vec_env: n environments, seeded already; they are reset here.
        env_ids: The task of each environment, (n,).
        episodes: Episodes in all.
        on_episode: Called after each episode.
        on_actions: Called with the executed actions (m, act) of each step.
        stop_at_success: End an episode at its first success.

    Returns:
        Record i of the k-th round stands at ``k * n + i``.

    Raises:
        EnvironmentFailedError: An environment failed, or the policy's action is not finite.
    """
    if episodes < 1:  # the share of a process, where there are fewer episodes than processes
        return []
    n = min(vec_env.num_envs, episodes)
    groups = [
        _Group(member, vec_env.block(rows), [env_ids[row] for row in rows], on_actions, stop_at_success)
        for member, rows in _members(policy, n)
    ]
    records: list[EpisodeRecord] = []
    for first in range(0, episodes, n):
        playing = [group for group in groups if group.begin(episodes - first)]
        while playing:
            for group in playing:
                for record in group.advance():
                    if on_episode is not None:
                        on_episode(record)
            playing = [group for group in playing if group.alive.any()]
        records += [record for group in groups for record in group.records()]
    return records


def _members(policy: Policy, num_envs: int) -> Iterator[tuple[Policy, range]]:
    """The policies of the groups, which share their network, and the rows that each acts for."""
    make_copy = getattr(policy, "with_own_history", None)
    if make_copy is None or num_envs < 2 * SMALLEST_GROUP:
        yield policy, range(num_envs)
        return
    half = -(-num_envs // 2)
    yield policy, range(half)
    yield make_copy(), range(half, num_envs)


class _Group:
    """Some environments, and the histories of the policy that acts in them."""

    def __init__(
        self,
        policy: Policy,
        block: EnvBlock,
        env_ids: Sequence[str],
        on_actions: Callable[[NDArray[np.float32]], None] | None,
        stop_at_success: bool,
    ) -> None:
        self._policy, self._block, self._env_ids = policy, block, env_ids
        self._on_actions, self._stop_at_success = on_actions, stop_at_success
        self.alive = np.zeros(len(env_ids), dtype=bool)

    def begin(self, episodes: int) -> bool:
        """Begin an episode in each environment, or in as many as are asked for; False where that is none."""
        n, self._counted = len(self._env_ids), self._block.rows < episodes
        if not self._counted.any():
            return False
        self._policy.reset(self._env_ids)
        self.alive, self._step, self._started = self._counted.copy(), 0, False
        self._totals, self._rewards = np.zeros(n), np.zeros(n, np.float32)
        self._lengths, self._first = np.zeros(n, dtype=int), np.full(n, -1)
        self._at_end, self._stopped = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
        self._block.begin_reset(self._counted)
        return True

    def advance(self) -> list[EpisodeRecord]:
        """Take in the last step, then act and begin the next one; returns the episodes that have ended."""
        self._block.finish()
        ended = self._take_in() if self._started else np.zeros(len(self.alive), dtype=bool)
        if self.alive.any():
            self._act()
        return [self._record(int(index)) for index in np.flatnonzero(ended)]

    def _act(self) -> None:
        starts, observations = np.full(len(self.alive), not self._started), self._rows("observations")
        if not self._started:
            self._starts = [crc32(observation) for observation in observations]
        actions = self._policy.act(observations, self._rewards, starts)
        self._block.begin_step(actions, self.alive)
        if self._on_actions is not None:
            self._on_actions(actions[self.alive])
        self._started = True

    def _take_in(self) -> NDArray[np.bool_]:
        """Count the last step; returns which episodes it ended, (n,)."""
        alive = self.alive
        self._rewards = np.where(alive, self._rows("rewards"), np.float32(0))
        self._totals += self._rewards
        self._first[alive & (self._first < 0) & self._rows("success")] = self._step
        self._step += 1
        self._lengths[alive] = self._step
        self._at_end[alive] = self._rows("success_now")[alive]
        over: NDArray[np.bool_] = alive & (self._rows("terminated") | self._rows("truncated"))
        if self._stop_at_success:
            self._stopped |= alive & ~over & (self._first >= 0)
            over = over | (alive & self._stopped)
        self.alive = alive & ~over
        return over

    def _rows(self, name: str) -> NDArray[Any]:
        values: NDArray[Any] = getattr(self._block.arrays, name)[self._block.rows]
        return values

    def records(self) -> list[EpisodeRecord]:
        """The episodes of the round, in the order of their environments."""
        return [self._record(int(index)) for index in np.flatnonzero(self._counted)]

    def _record(self, index: int) -> EpisodeRecord:
        arrays, row, first = self._block.arrays, self._block.rows[index], int(self._first[index])
        return EpisodeRecord(
            env_id=self._env_ids[index],
            episode_seed=int(arrays.seeds[row]),
            episode_return=float(self._totals[index]),
            length=int(self._lengths[index]),
            success=first >= 0,
            success_at_end=bool(self._at_end[index]),
            first_success=first,
            reports_success=bool(arrays.reports_success[row]),
            stopped=bool(self._stopped[index]),
            start=self._starts[index],
        )
