"""How long and how often an online run goes on, where, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from eva_rl.data.trajectories import Episode

RECENT = 100
"""Episodes over which the metrics of rollouts are averaged."""


@dataclass(frozen=True)
class OnlineOptions:
    """How long, and how often.

    Attributes:
        env_steps: Env steps in all.
        steps_per_iteration: Env steps, over all environments, between two bouts of gradient steps.
        updates_per_iteration: Gradient steps of a bout.
        random_steps: Env steps before the first gradient step, which comes after the first finished episode.
        eval_every: Env steps between two evaluations, at which unfinished episodes are broken off; 0 for none.
        checkpoint_every: Env steps between two checkpoints, made at the same boundaries; 0 for none.
        refresh_every: Env steps between two calls of ``refresh``; 0 for none.
        keep_best: End with the parameters that did best in an evaluation (success first, then return), not the last.
        seed: Of exploration.
        first_episode: Seed of the first episode.
    """

    env_steps: int
    steps_per_iteration: int = 1000
    updates_per_iteration: int = 100
    random_steps: int = 0
    eval_every: int = 0
    checkpoint_every: int = 0
    refresh_every: int = 0
    keep_best: bool = False
    seed: int = 0
    first_episode: int = 0


@dataclass(frozen=True)
class TaskEnvs:
    """Where a policy acts.

    Attributes:
        vec_env: n environments whose episodes are numbered (:func:`eva_rl.envs.make_vec_env`).
        env_id: Their task.
        reports_success: Whether they know of success.
    """

    vec_env: VecEnv
    env_id: str
    reports_success: bool


@dataclass
class OnlineCounters:
    """What a checkpoint holds besides tensors.

    Attributes:
        env_steps: Env steps taken.
        update: Gradient steps done.
        episodes: Episodes finished.
        next_seed: Seed of the next episode.
        seconds: Of collecting and learning.
        returns: Of the last episodes.
        successes: Of the last episodes.
        lengths: Of the last episodes.
        best_step: Env step of the best evaluation so far; -1 where there was none.
        best_score: Success rate and return there.
    """

    env_steps: int = 0
    update: int = 0
    episodes: int = 0
    next_seed: int = 0
    seconds: float = 0.0
    returns: list[float] = field(default_factory=list)
    successes: list[bool] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    best_step: int = -1
    best_score: list[float] = field(default_factory=list)

    def finished(self, episode: Episode) -> None:
        """Count an episode."""
        self.episodes += 1
        self.returns = [*self.returns, float(episode.rewards.sum())][-RECENT:]
        self.lengths = [*self.lengths, len(episode.rewards)][-RECENT:]
        if episode.successes is not None:
            self.successes = [*self.successes, bool(episode.successes.any())][-RECENT:]

    def metrics(self) -> dict[str, float]:
        """Scalars under Stable-Baselines3's names."""
        found = {
            "time/env_steps": float(self.env_steps),
            "time/gradient_steps": float(self.update),
            "time/fps": self.env_steps / max(self.seconds, 1e-9),
        }
        if self.returns:
            found |= {
                "rollout/ep_rew_mean": float(np.mean(self.returns)),
                "rollout/ep_len_mean": float(np.mean(self.lengths)),
            }
        if self.successes:
            found["rollout/success_rate"] = float(np.mean(self.successes))
        return found
