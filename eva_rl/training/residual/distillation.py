"""From a residual policy back to one network: cloning what it does, also where the clone itself goes.

The clone's own env steps are labelled by the residual policy (DAgger, Ross et al. 2011, arXiv 1011.0686).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.batch import WindowBatch
from eva_rl.data.trajectories import Episode
from eva_rl.data.windows import gather_windows
from eva_rl.rollouts.recorder import EpisodeRecorder
from eva_rl.training.collector import TaskEnvs
from eva_rl.training.residual.actor import ResidualPolicy


@dataclass(frozen=True)
class PlayedSteps:
    """N env steps of successive episodes.

    Attributes:
        observations: (N, obs).
        actions: (N, act), as executed.
        rewards: (N,).
        returns_to_go: (N,), those that the policy was asked for.
        target_actions: None: windows are labelled when they are drawn.
    """

    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    returns_to_go: NDArray[np.float32]
    target_actions: ClassVar[None] = None

    @classmethod
    def joined(cls, parts: Sequence[PlayedSteps]) -> PlayedSteps:
        """Several episodes as one."""
        return cls(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)})


class LabelledWindows:
    """Windows of a residual policy's and its clone's env steps, labelled with what the residual policy would do.

    The returns-to-go are those that the policy was asked for. The residual policy can be asked anywhere: noise on the
    observations gives labels beside the states that were reached, of which there are few.

    Args:
        teacher: The residual policy.
        env_id: The task.
        context_length: T.
        seed: Of the draws; those of step n depend on the seed and n alone.
        clone_share: Share of a batch that is drawn from the clone's own env steps, where there are some.
        noise: Largest standard deviation of the noise on scaled observations; each window has its own.
    """

    def __init__(
        self,
        teacher: ResidualPolicy,
        env_id: str,
        context_length: int,
        seed: int,
        *,
        clone_share: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        self._teacher, self._env_id, self._seed, self._noise = teacher, env_id, seed, noise
        self._clone_share, self._others = clone_share, 0
        self._context_length, self._scaling = context_length, teacher.base.scaling.to("cpu")
        self._episodes: list[PlayedSteps] = []

    def add(self, episodes: Iterable[Episode], *, of_clone: bool = False) -> None:
        """Draw from these episodes, too.

        Args:
            episodes: What was played, the clone's own last.
            of_clone: Whether the clone played them.
        """
        self._episodes += [self._played(episode) for episode in episodes]
        self._steps = PlayedSteps.joined(self._episodes)
        lengths = [len(episode.rewards) for episode in self._episodes]
        self._starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
        self._others = self._others if of_clone else len(self._starts)

    def of(self, episodes: Iterable[Episode]) -> LabelledWindows:
        """Windows of other episodes alone, labelled alike, without noise."""
        windows = LabelledWindows(self._teacher, self._env_id, self._context_length, self._seed)
        windows.add(episodes)
        return windows

    def _played(self, episode: Episode) -> PlayedSteps:
        return PlayedSteps(
            observations=episode.observations[:-1],
            actions=episode.actions,
            rewards=episode.rewards,
            returns_to_go=self._asked(episode.rewards),
        )

    def _asked(self, rewards: NDArray[np.float32]) -> NDArray[np.float32]:
        obtained = np.cumsum(rewards, dtype=np.float64) - rewards
        target = self._teacher.base.conditioning.of(self._env_id)
        return (target - obtained).astype(np.float32)

    def sample(self, batch_size: int, step: int, device: torch.device | str = "cpu") -> WindowBatch:
        """The windows of gradient step ``step``: any env step as the last of one."""
        rng = np.random.default_rng((self._seed, step, len(self._starts)))
        rows = self._draw(rng, batch_size)
        windows = gather_windows(self._steps, rows, self._starts[rows], self._context_length, self._scaling)
        windows = self._with_noise(windows, rng).to(device)
        return replace(windows, target_actions=self._teacher.actions_in(windows))

    def _with_noise(self, windows: WindowBatch, rng: np.random.Generator) -> WindowBatch:
        if not self._noise:
            return windows
        observations = windows.observations
        levels = self._noise * rng.random((len(observations), 1, 1), np.float32)
        noise = levels * rng.standard_normal(observations.shape, np.float32)
        return replace(windows, observations=observations + torch.from_numpy(noise))

    def _draw(self, rng: np.random.Generator, batch_size: int) -> NDArray[np.int64]:
        others, total = self._others, len(self._starts)
        own = round(batch_size * self._clone_share) if others < total else 0
        if not own:
            return rng.integers(total, size=batch_size)
        return np.concatenate([rng.integers(others, size=batch_size - own), rng.integers(others, total, size=own)])


def roll_out(policy: DecisionTransformerPolicy, task: TaskEnvs, env_steps: int) -> tuple[list[Episode], int]:
    """Episodes of a policy's deterministic actions, of about ``env_steps`` env steps; the last ones are truncated.

    Returns:
        The episodes, and the seed of the first one after them.
    """
    vec_env, n = task.vec_env, task.vec_env.num_envs
    vec_env.seed(task.first_seed)
    policy.reset([task.env_id] * n)
    observations = np.asarray(vec_env.reset(), np.float32)
    rewards, starts = np.zeros(n, np.float32), np.ones(n, bool)
    recorder, episodes, ended = EpisodeRecorder(observations, task.reports_success), list[Episode](), np.zeros(n, int)
    for _ in range(max(1, env_steps // n)):
        actions = policy.act(observations, rewards, starts)
        stepped, rewards, starts, infos = vec_env.step(actions)
        observations = np.asarray(stepped, np.float32)
        episodes += [e for _, e in recorder.step(actions, observations, rewards, starts, infos)]
        ended += starts
    return [*episodes, *recorder.unfinished()], task.first_seed + n * (1 + int(ended.max()))
