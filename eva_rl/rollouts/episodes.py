"""Whole episodes of a policy in vectorised environments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from eva_rl.agents.policy import Policy


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
    """

    env_id: str
    episode_seed: int
    episode_return: float
    length: int
    success: bool
    success_at_end: bool
    first_success: int


def play_episodes(
    policy: Policy,
    vec_env: VecEnv,
    env_ids: Sequence[str],
    episodes_per_env: int,
    on_episode: Callable[[EpisodeRecord], None] | None = None,
) -> list[EpisodeRecord]:
    """Let a policy act until every environment has finished its share of episodes.

    Every environment plays the same number of episodes, so that short episodes are not over-represented.

    Args:
        policy: Acts.
        vec_env: n environments, seeded already; it is reset here.
        env_ids: The task of each environment, (n,).
        episodes_per_env: Episodes counted per environment.
        on_episode: Called after each counted episode.

    Returns:
        n * episodes_per_env records; record i of the k-th round stands at ``k * n + i``.
    """
    n = vec_env.num_envs
    records: dict[int, EpisodeRecord] = {}
    done_episodes = np.zeros(n, dtype=int)
    totals, lengths, first = np.zeros(n), np.zeros(n, dtype=int), np.full(n, -1)
    policy.reset(env_ids)
    observations = _observations(vec_env.reset())
    seeds = [info.get("episode_seed", -1) for info in vec_env.reset_infos]
    rewards, starts = np.zeros(n, np.float32), np.ones(n, dtype=bool)
    while (done_episodes < episodes_per_env).any():
        actions = policy.act(observations, rewards, starts)
        stepped, rewards, starts, infos = vec_env.step(actions)
        observations = _observations(stepped)
        first = np.where((first < 0) & [bool(info.get("is_success", False)) for info in infos], lengths, first)
        totals, lengths = totals + rewards, lengths + 1
        for i in map(int, np.flatnonzero(starts)):
            if done_episodes[i] < episodes_per_env:
                at_end = bool(infos[i].get("success_now", first[i] >= 0))
                record = EpisodeRecord(
                    env_ids[i],
                    seeds[i],
                    float(totals[i]),
                    int(lengths[i]),
                    bool(first[i] >= 0),
                    at_end,
                    int(first[i]),
                )
                records[int(done_episodes[i]) * n + i] = record
                if on_episode is not None:
                    on_episode(record)
            done_episodes[i] += 1
            seeds[i] = vec_env.reset_infos[i].get("episode_seed", -1)
            totals[i], lengths[i], first[i] = 0.0, 0, -1
    return [records[key] for key in sorted(records)]


def _observations(stepped: object) -> NDArray[np.float32]:
    assert isinstance(stepped, np.ndarray)
    return stepped.astype(np.float32, copy=False)
