"""Episodes from new starts, and retries with noise of those that failed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.data.replay import TrajectoryReplay
from eva_rl.data.trajectories import Episode
from eva_rl.envs.vector import TaskVecEnv
from eva_rl.errors import EnvironmentFailedError, UserError
from eva_rl.training.collector import OnlineCounters, TaskEnvs, check_finite
from eva_rl.training.learner import Learner, collection_generator
from eva_rl.training.options import SelfImitationOptions
from eva_rl.training.self_imitation.snapshot import acting_as

SAME_START = 1e-4
"""Largest difference of observations that counts as rounding."""


class RetryingCollector:
    """Rounds of one episode an environment, with retries of those that failed; solved episodes are kept.

    The first attempts are the policy's own, without noise. Retries, until one succeeds, are with noise; where there is
    a snapshot of other parameters, it plays the first of them without noise, and every other one of the rest with it.
    Nothing is under way between two iterations.

    Args:
        policy: Acts.
        task: Where: a :class:`TaskVecEnv` whose episodes end at their first success.
        options: How often, and with which noise.
        snapshot: Other values of the policy's trainable parameters, by name; None if there are none.
    """

    acting = True

    def __init__(
        self,
        policy: DecisionTransformerPolicy,
        task: TaskEnvs,
        options: SelfImitationOptions,
        snapshot: Mapping[str, Tensor] | None = None,
    ) -> None:
        assert isinstance(task.vec_env, TaskVecEnv)
        self._snapshot = snapshot
        self._policy, self._env_id, self._vec_env, self._options = policy, task.env_id, task.vec_env, options
        self._starts: dict[int, NDArray[np.float32]] = {}

    def begin(self, counters: OnlineCounters) -> None:
        """Nothing to start."""

    def may_truncate(self, counters: OnlineCounters) -> bool:
        """Always: rounds are played to their end."""
        return True

    def truncate_episodes(self, replay: TrajectoryReplay, counters: OnlineCounters) -> None:
        """Nothing to end."""
        counters.truncated_at = counters.env_steps

    def collect(self, learner: Learner, replay: TrajectoryReplay, counters: OnlineCounters) -> None:
        """Play rounds until an iteration's env steps are reached, or those of the whole run.

        An episode that the end of the env steps cuts off is dropped.

        Raises:
            UserError: The environment reports no success, or starts elsewhere when it is given the same seed again.
            NotFiniteError: An environment gave a number that is not finite.
        """
        options, n = self._options, self._vec_env.num_envs
        generator = collection_generator(learner.seed, counters.env_steps)
        until = min(counters.env_steps + options.steps_per_iteration, options.env_steps)
        while counters.env_steps < until:
            failed: Sequence[int] = range(counters.next_seed, counters.next_seed + n)
            counters.next_seed += n
            failed = self._attempt(failed, None, replay, counters)
            for retry in range(options.retries):
                if failed:
                    failed = self._retry(retry, failed, generator, replay, counters)

    def _retry(
        self,
        retry: int,
        seeds: Sequence[int],
        generator: torch.Generator,
        replay: TrajectoryReplay,
        counters: OnlineCounters,
    ) -> list[int]:
        """Play from starts that failed, for the time ``retry`` from 0; returns those that failed again."""
        options, network = self._options, self._policy.network
        snapshot = None if retry % 2 else self._snapshot
        noise = SmoothNoise(options.exploration_noise, options.noise_steps, generator)
        with nullcontext() if snapshot is None else acting_as(network, snapshot):
            return self._attempt(seeds, noise if retry or snapshot is None else None, replay, counters, retried=True)

    def _attempt(
        self,
        seeds: Sequence[int],
        noise: SmoothNoise | None,
        replay: TrajectoryReplay,
        counters: OnlineCounters,
        *,
        retried: bool = False,
    ) -> list[int]:
        """Play one episode from each start; returns those in which the task was not solved."""
        left = self._options.env_steps - counters.env_steps
        if left <= 0:
            return []
        attempts = Attempts(self._vec_env, seeds, self._longest(replay))
        self._compare_starts(seeds, attempts.observations, retried)
        self._policy.reset([self._env_id] * len(seeds))
        try:
            while attempts.alive.any() and attempts.env_steps < left:
                attempts.step(self._policy, noise)
                check_finite(attempts.rewards, attempts.observations, counters.env_steps + attempts.env_steps)
        except EnvironmentFailedError:
            self._count_and_keep(attempts.finished(), retried, replay, counters)
            raise
        finally:
            counters.env_steps += attempts.env_steps
        if not self._vec_env.arrays.reports_success.any():
            raise UserError(
                f"algo=self_imitation learns from episodes in which the task is solved, and {self._env_id} reports no "
                "success, not even in episodes that fail. Put is_success, true or false, into the info of every env "
                "step, or use algo=residual."
            )
        return self._count_and_keep(attempts.finished(), retried, replay, counters)

    def _compare_starts(self, seeds: Sequence[int], observations: NDArray[np.float32], retried: bool) -> None:
        """Remember where first attempts start; retries have to start there, too."""
        if not retried:
            self._starts = dict(zip(seeds, observations, strict=True))
            return
        apart = max(float(abs(self._starts[s] - row).max()) for s, row in zip(seeds, observations, strict=True))
        if apart > SAME_START:
            raise UserError(
                f"algo=self_imitation tries failed starts again, and {self._env_id} starts elsewhere when it is reset "
                f"with the same seed: its first observations differ by up to {apart:.2g}. Draw the start in "
                "reset(seed=...) from self.np_random, after super().reset(seed=seed), or set algo.retries=0."
            )

    def _longest(self, replay: TrajectoryReplay) -> float:
        """Env steps after which an attempt is given up: what was solved was solved in fewer."""
        lengths = replay.imitated_lengths
        median = float(np.median(lengths)) if len(lengths) else 0.0
        return math.ceil(self._options.attempt_length * median) or math.inf

    def _count_and_keep(
        self, episodes: dict[int, Episode], retried: bool, replay: TrajectoryReplay, counters: OnlineCounters
    ) -> list[int]:
        asked, failed = self._policy.conditioning.of(self._env_id), []
        for seed, episode in episodes.items():
            assert episode.successes is not None
            solved = bool(episode.successes[-1])
            counters.tried_again(solved) if retried else counters.finished(episode)
            if solved:
                replay.add(episode, asked, retried=retried)
            else:
                failed.append(seed)
        return failed


@dataclass
class SmoothNoise:
    """Gaussian noise on scaled actions that keeps its direction for some env steps (Ornstein-Uhlenbeck).

    Attributes:
        std: Standard deviation at each env step.
        steps: Env steps after which the correlation is 1/e; 0 draws anew at each.
        generator: What draws.
    """

    std: float
    steps: float
    generator: torch.Generator
    _last: Tensor | None = field(default=None, init=False)

    def added(self, actions: Tensor) -> Tensor:
        """Actions (n, act) with the noise of the next env step."""
        drawn = torch.randn(actions.shape, generator=self.generator)
        if self._last is not None and self.steps:
            kept = math.exp(-1 / self.steps)
            drawn = kept * self._last + math.sqrt(1 - kept**2) * drawn
        self._last = drawn
        return actions + self.std * drawn.to(actions.device)


class Attempts:
    """One episode from each of some starts, at once.

    Args:
        vec_env: At least as many environments as starts.
        seeds: Of the starts.
        longest: Env steps after which they end, solved or not.
    """

    def __init__(self, vec_env: TaskVecEnv, seeds: Sequence[int], longest: float = math.inf) -> None:
        self._longest = longest
        self._seeds, self._arrays, self._block = seeds, vec_env.arrays, vec_env.block(range(len(seeds)))
        vec_env.seed_each(seeds)
        self._block.begin_reset()
        self._block.finish()
        self.alive = np.ones(len(seeds), bool)
        self.rewards = np.zeros(len(seeds), np.float32)
        self.observations = self._rows(self._arrays.observations)
        self.env_steps = 0
        self._past: list[dict[str, NDArray[Any]]] = []

    def step(self, policy: DecisionTransformerPolicy, noise: SmoothNoise | None) -> None:
        """Let the policy act once in the episodes that go on."""
        before, alive = self.observations, self.alive.copy()
        starts = np.full(len(alive), not self._past)

        def choose(features: Tensor) -> Tensor:
            actions: Tensor = policy.network.actions(features)
            return actions if noise is None else noise.added(actions)

        actions = policy.act_by(choose, before, self.rewards, starts)
        self.env_steps += int(alive.sum())  # also where one fails
        self._block.begin_step(actions, alive)
        self._block.finish()
        found = {name: self._rows(getattr(self._arrays, name)) for name in ("terminated", "truncated", "success")}
        self.observations = self._rows(self._arrays.observations)
        self.rewards = np.where(alive, self._rows(self._arrays.rewards), np.float32(0))
        self._past.append({"observations": before, "actions": actions, "rewards": self.rewards, "lived": alive} | found)
        self.alive = alive & ~(found["terminated"] | found["truncated"]) & (len(self._past) < self._longest)

    def finished(self) -> dict[int, Episode]:
        """The episodes that are over, by their seed."""
        return {seed: self._episode(row) for row, seed in enumerate(self._seeds) if not self.alive[row]}

    def _episode(self, row: int) -> Episode:
        steps = [past for past in self._past if past["lived"][row]]
        columns = {name: np.stack([past[name][row] for past in steps]) for name in steps[0]}
        return Episode(
            observations=np.concatenate([columns["observations"], self.observations[row : row + 1]]),
            actions=columns["actions"],
            rewards=columns["rewards"],
            terminations=columns["terminated"],
            truncations=columns["truncated"],
            successes=columns["success"],
        )

    def _rows(self, values: NDArray[Any]) -> NDArray[Any]:
        return values[self._block.rows]  # a copy
