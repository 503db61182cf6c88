"""Evaluations whose episodes are divided among the processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stable_baselines3.common.vec_env import VecEnv

from eva_rl import envs
from eva_rl.agents.policy import Policy
from eva_rl.evaluation import DEFAULT_NUM_ENVS, EvaluationResult, evaluate_tasks, evaluation_envs
from eva_rl.training.distributed import Ranks


def evaluate_together(
    ranks: Ranks, play: Callable[..., EvaluationResult], *, episodes: int, **options: Any
) -> EvaluationResult:
    """Play each process's share of the episodes; everyone gets all records, in the order of one process.

    Args:
        ranks: This process among the others, which all call this.
        play: :func:`eva_rl.evaluate` with its first arguments filled in.
        episodes: Episodes in all.
        **options: Other options of ``play``.
    """
    mine = play(episodes=episodes, share=ranks.share(episodes), **options)
    records = [record for part in ranks.everyones(mine.episodes) for record in part]
    return replace(mine, episodes=tuple(records))


def shared_envs(ranks: Ranks, env: str, episodes: int, horizon: int | None = None) -> VecEnv:
    """This process's part of the environments that :func:`eva_rl.evaluation.evaluation_envs` makes, one at least."""
    return evaluation_envs(env, -(-episodes // ranks.count), horizon, -(-DEFAULT_NUM_ENVS // ranks.count))


@dataclass(frozen=True)
class TaskLook:
    """A quick look at several tasks, each on one process.

    Attributes:
        ranks: This process among the others.
        tasks: Canonical names of all tasks.
        vec_env: One environment for each of this process's tasks; None where it has none.
    """

    ranks: Ranks
    tasks: Sequence[str]
    vec_env: VecEnv | None

    @classmethod
    def of(cls, ranks: Ranks, tasks: Sequence[str]) -> TaskLook:
        """Make this process's environments."""
        mine = tasks[ranks.share(len(tasks))]
        return cls(ranks, tasks, envs.make_task_vec_env(mine, stride=len(tasks)) if mine else None)

    def scores(self, policy: Policy, episodes: int, seed: int) -> dict[str, float]:
        """Success rate by task (mean return where it knows no success), the same on every process.

        Args:
            policy: What to evaluate.
            episodes: Episodes a task.
            seed: Seed of the first episode of the first task.
        """
        share, found = self.ranks.share(len(self.tasks)), {}
        if self.vec_env is not None:
            found = evaluate_tasks(policy, self.tasks[share], self.vec_env, episodes, seed + share.start)
        return {task: rate for part in self.ranks.everyones(found) for task, rate in part.items()}
