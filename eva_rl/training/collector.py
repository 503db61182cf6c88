"""Collect episodes with an exploring policy, and count them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.data.replay import TrajectoryReplay
from eva_rl.data.trajectories import Episode
from eva_rl.rollouts.recorder import EpisodeRecorder
from eva_rl.training.bc import VALIDATION_STEPS
from eva_rl.training.failures import NotFiniteError
from eva_rl.training.learner import Explore, Learner, collection_generator

RECENT = 100
"""Episodes over which the metrics of rollouts are averaged."""


@dataclass(frozen=True)
class TaskEnvs:
    """Where a policy acts.

    Attributes:
        vec_env: n environments whose episodes are numbered (:func:`eva_rl.envs.make_vec_env`).
        env_id: Their task.
        reports_success: Whether they report success.
        first_seed: Seed of the first episode.
        horizon: Env steps of an episode at most; 0 where that is not known.
        played_before: Env steps that were played before the first one here, for any purpose.
    """

    vec_env: VecEnv
    env_id: str
    reports_success: bool
    first_seed: int = 0
    horizon: int = 0
    played_before: int = 0


@dataclass
class OnlineCounters:
    """What a checkpoint holds besides tensors.

    Attributes:
        env_steps: Env steps taken to learn from.
        validation_steps: Env steps played to validate, and all those before learning in the environment.
        update: Gradient steps done.
        episodes: Episodes finished.
        next_seed: Seed of the next episode.
        seconds: Of collecting and learning.
        returns: Of the last episodes.
        successes: Of the last episodes.
        lengths: Of the last episodes.
        best_step: Env step of the best evaluation so far; -1 where there was none.
        best_score: Success rate and return there.
        retries: Episodes that began where one had failed before; they count among no other episodes.
        retries_solved: Those of them in which the task was solved.
        failures: Episodes, retries apart, in which the task was not solved.
        failures_learned: Those of them before the last gradient steps.
        truncated_at: Env steps when unfinished episodes were last truncated.
        validated_at: Env steps up to which every validation that was due has been played.
        measured_at: Env steps up to which every measurement that was due has been played.
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
    validation_steps: int = 0
    retries: int = 0
    retries_solved: int = 0
    failures: int = 0
    failures_learned: int = 0
    truncated_at: int = 0
    validated_at: int = 0
    measured_at: int = 0

    @classmethod
    def of(cls, task: TaskEnvs) -> OnlineCounters:
        """Those of a run that begins."""
        return cls(next_seed=task.first_seed, validation_steps=task.played_before)

    def finished(self, episode: Episode) -> None:
        """Count an episode."""
        self.episodes += 1
        self.returns = [*self.returns, float(episode.rewards.sum())][-RECENT:]
        self.lengths = [*self.lengths, len(episode.rewards)][-RECENT:]
        if episode.successes is not None:
            solved = bool(episode.successes.any())
            self.successes = [*self.successes, solved][-RECENT:]
            self.failures += not solved

    def tried_again(self, solved: bool) -> None:
        """Count an episode from a start at which one had failed."""
        self.retries, self.retries_solved = self.retries + 1, self.retries_solved + solved

    def validated(self, metrics: Mapping[str, float]) -> None:
        """Count the env steps that a validation says it played."""
        self.validation_steps += int(metrics.get(VALIDATION_STEPS, 0))

    @property
    def env_steps_played(self) -> int:
        """Env steps played for any purpose, validation included."""
        return self.env_steps + self.validation_steps

    def metrics(self) -> dict[str, float]:
        """Scalars under Stable-Baselines3's names."""
        found = {
            "time/env_steps": float(self.env_steps),
            "time/env_steps_played": float(self.env_steps_played),
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
        if self.retries:
            found["rollout/retry_success_rate"] = self.retries_solved / self.retries
        return found


class EpisodeCollector(Protocol):
    """How a policy that learns comes by episodes."""

    @property
    def acting(self) -> bool:
        """Whether episodes are under way."""

    def begin(self, counters: OnlineCounters) -> None:
        """Start new episodes."""

    def collect(self, learner: Learner, replay: TrajectoryReplay, counters: OnlineCounters) -> None:
        """Act for an iteration, and keep and count what ends."""

    def may_truncate(self, counters: OnlineCounters) -> bool:
        """Whether every environment had the time for a whole episode since the last truncation."""

    def truncate_episodes(self, replay: TrajectoryReplay, counters: OnlineCounters) -> None:
        """End what is under way."""


class Collector:
    """The policy's rollouts: episodes continue from one iteration to the next until they are truncated."""

    def __init__(self, policy: DecisionTransformerPolicy, task: TaskEnvs) -> None:
        self._policy, self._task, self._vec_env = policy, task, task.vec_env
        self.acting = False

    def begin(self, counters: OnlineCounters) -> None:
        """Start new episodes in all environments."""
        n = self._vec_env.num_envs
        self._vec_env.seed(counters.next_seed)
        self._ended = np.zeros(n, dtype=int)
        self._policy.reset([self._task.env_id] * n)
        self._observations = _rows(self._vec_env.reset())
        self._rewards, self._starts = np.zeros(n, np.float32), np.ones(n, dtype=bool)
        self._recorder = EpisodeRecorder(self._observations, self._task.reports_success)
        self.acting = True

    def collect(
        self,
        learner: Learner,
        replay: TrajectoryReplay,
        counters: OnlineCounters,
    ) -> None:
        """Act for ``steps_per_iteration`` env steps over all environments, or as many as are left of the run.

        Raises:
            NotFiniteError: An environment gave a number that is not finite.
        """
        n = self._vec_env.num_envs
        explore = learner.explore(collection_generator(learner.seed, counters.env_steps))
        target_return = self._policy.conditioning.of(self._task.env_id)
        left = -(-(learner.options.env_steps - counters.env_steps) // n)
        for _ in range(min(left, max(1, learner.options.steps_per_iteration // n))):
            actions, extras = self._act(explore)
            stepped, self._rewards, self._starts, infos = self._vec_env.step(actions)
            self._observations = _rows(stepped)
            counters.env_steps += n
            check_finite(self._rewards, self._observations, counters.env_steps)
            finished = self._recorder.step(actions, self._observations, self._rewards, self._starts, infos, extras)
            for index, episode in finished:
                replay.add(episode, target_return)
                counters.finished(episode)
                self._ended[index] += 1
        learner.see_unfinished(self._recorder, target_return)

    def _act(self, explore: Explore) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
        """Actions (n, act), and what else is kept of this step."""
        device = self._policy.device
        observations = self._policy.scaling.observations(torch.from_numpy(self._observations).to(device))
        kept: dict[str, NDArray[np.float32]] = {}

        def choose(features: Tensor) -> Tensor:
            choice = explore(features, observations)
            kept.update({name: rows.cpu().numpy() for name, rows in choice.extras.items()})
            return choice.actions

        return self._policy.act_by(choose, self._observations, self._rewards, self._starts), kept

    def may_truncate(self, counters: OnlineCounters) -> bool:
        """Whether every environment had the time for a whole episode since the last truncation.

        Episodes that are always truncated would leave nothing to learn returns from.
        """
        return counters.env_steps - counters.truncated_at >= self._vec_env.num_envs * self._task.horizon

    def truncate_episodes(self, replay: TrajectoryReplay, counters: OnlineCounters) -> None:
        """End all episodes here; their transitions are kept for temporal differences.

        Where a reset failed there are none, and the next ones begin elsewhere.
        """
        counters.truncated_at = counters.env_steps
        if not self.acting:
            counters.next_seed += self._vec_env.num_envs
            return
        target_return = self._policy.conditioning.of(self._task.env_id)
        for episode in self._recorder.unfinished():
            replay.add(episode, target_return, complete=False)
        counters.next_seed += self._vec_env.num_envs * (1 + int(self._ended.max()))
        self.acting = False


def check_finite(rewards: NDArray[np.float32], observations: NDArray[np.float32], env_step: int) -> None:
    """Raise where an environment gave a number that is not finite.

    Raises:
        NotFiniteError: It did.
    """
    if not np.isfinite(rewards).all():
        raise NotFiniteError("a reward of the environment", env_step)
    if not np.isfinite(observations).all():
        raise NotFiniteError("an observation of the environment", env_step)


def _rows(observations: object) -> NDArray[np.float32]:
    assert isinstance(observations, np.ndarray)
    return observations.astype(np.float32, copy=False)
