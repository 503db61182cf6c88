"""Evaluation on held-out, seeded episodes: one function for training and for the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eva_rl.agents.policy import Policy
from eva_rl.distributed import ProcessGroup
from eva_rl.envs import EnvSpec, env_spec, reference_scores, score_between
from eva_rl.envs.vector import AUTO, TaskVecEnv, make_task_vec_env, make_vec_env
from eva_rl.errors import UserError, check_dimensions, counted, shown_number
from eva_rl.options import between
from eva_rl.rollouts.episodes import EpisodeRecord, play_episodes
from eva_rl.seeding import EVALUATION, MAX_SEED, VALIDATION, episode_seeds

MOST_ENVS = 50
"""Environments that are played at once at most: the larger the batch, the less a policy's step costs an environment."""


@dataclass(frozen=True)
class EvaluationResult:
    """Episodes of one policy on one task.

    Attributes:
        env_id: The task.
        episodes: One record an episode.
        protocol: How the episodes were made, in one line.
        reports_success: Whether success means anything on this task.
        references: Returns that score 0 and 100; None takes D4RL's, where it has some for the task.
    """

    env_id: str
    episodes: tuple[EpisodeRecord, ...]
    protocol: str
    reports_success: bool
    references: tuple[float, float] | None = None

    def __repr__(self) -> str:
        """Task, number of episodes and metrics, in one line."""
        measured = ", ".join(f"{key.strip('/')} {value:.4g}" for key, value in self.metrics("").items())
        return f"EvaluationResult({self.env_id}: {counted(len(self.episodes), 'episode')}, {measured})"

    @property
    def success_rate(self) -> float:
        """Share of episodes solved at any step; NaN where the task knows no success."""
        return float(np.mean([e.success for e in self.episodes])) if self.reports_success else float("nan")

    @property
    def stopped_at_success(self) -> bool:
        """Whether an episode was ended at its first success, so that returns and lengths are not measured."""
        return any(episode.stopped for episode in self.episodes)

    @property
    def mean_reward(self) -> float:
        """Mean return of an episode (Stable-Baselines3's word for it); NaN where it was not measured."""
        if self.stopped_at_success:
            return float("nan")
        return float(np.mean([e.episode_return for e in self.episodes]))

    @property
    def alike(self) -> bool:
        """Whether all of several episodes had the same first observation, success, length and return."""
        first, *others = self.episodes
        return bool(others) and first.start is not None and all(_are_alike(first, other) for other in others)

    @property
    def caveat(self) -> str:
        """What to know before reading the interval; empty where there is nothing."""
        if not self.alike:
            return ""
        return (
            f"All {len(self.episodes)} episodes of {self.env_id} began with the same observation and ended alike: they "
            "count as one. Is env.goal fixed, or does the environment not use reset(seed=...)?"
        )

    def success_interval(self) -> tuple[float, float]:
        """95% Wilson score interval of the success rate (Wilson 1927); episodes that are all alike count as one.

        NaN where the task reports no success.
        """
        if not self.reports_success:
            return float("nan"), float("nan")
        n, p, z = 1 if self.alike else len(self.episodes), self.success_rate, 1.959964
        center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return float(max(0.0, center - half)), float(min(1.0, center + half))

    def metrics(self, prefix: str = "eval") -> dict[str, float]:
        """Scalars under Stable-Baselines3's names, those that were measured."""
        metrics = {} if self.stopped_at_success else self._return_metrics(prefix)
        if self.reports_success:
            metrics[f"{prefix}/success_rate"] = self.success_rate
        if self.reports_success and not self.stopped_at_success:
            metrics[f"{prefix}/success_at_end"] = float(np.mean([e.success_at_end for e in self.episodes]))
        return metrics

    def _return_metrics(self, prefix: str) -> dict[str, float]:
        returns = np.array([e.episode_return for e in self.episodes])
        metrics = {
            f"{prefix}/mean_reward": self.mean_reward,
            f"{prefix}/std_reward": float(returns.std()),
            f"{prefix}/mean_ep_length": float(np.mean([e.length for e in self.episodes])),
        }
        references = self.references or reference_scores(self.env_id)
        if references is not None:
            metrics[f"{prefix}/normalized_score"] = float(np.mean(score_between(references, returns)))
        return metrics

    def record(self) -> dict[str, Any]:
        """Everything, as JSON values; null is what was not measured."""
        record: dict[str, Any] = {"env": self.env_id, "protocol": self.protocol, "metrics": self.metrics()}
        if self.reports_success:
            record["success_interval_95"] = self.success_interval()
        if self.alike:
            record["alike"] = True
        return record | {"episodes": [_measured(episode) for episode in self.episodes]}


def described_return(result: EvaluationResult) -> str:
    """The mean return as a table shows it."""
    return "not measured" if result.stopped_at_success else shown_number(result.mean_reward)


def other_starts(one: EvaluationResult, other: EvaluationResult) -> str:
    """What to know before comparing two evaluations of the same seeds; empty where they began alike."""
    starts = {episode.episode_seed: episode.start for episode in other.episodes if episode.start is not None}
    pairs = [
        (e.start, starts[e.episode_seed]) for e in one.episodes if e.start is not None and e.episode_seed in starts
    ]
    if not pairs or any(first == second for first, second in pairs):
        return ""
    return (
        f"{one.env_id} starts elsewhere when it is reset with the same seed again: the evaluations are of different "
        "episodes, and chance is part of their difference. Draw the start in reset(seed=...) from self.np_random, "
        "after super().reset(seed=seed)."
    )


def _are_alike(first: EpisodeRecord, second: EpisodeRecord) -> bool:
    same = (first.start, first.success, first.length) == (second.start, second.success, second.length)
    return same and math.isclose(first.episode_return, second.episode_return, rel_tol=1e-3, abs_tol=1e-6)


def _measured(episode: EpisodeRecord) -> dict[str, Any]:
    unknown = ("episode_return", "length", "success_at_end") if episode.stopped else ()
    return asdict(episode) | dict.fromkeys(unknown)


def evaluate_policy(  # noqa: PLR0913 - one call for users and for training; all but two have defaults
    policy: Policy,
    env: str,
    *,
    episodes: int = 50,
    seed: int = 0,
    horizon: int | None = None,
    validation: bool = False,
    references: tuple[float, float] | None = None,
    vec_env: TaskVecEnv | None = None,
    on_episode: Callable[[EpisodeRecord], None] | None = None,
    on_actions: Callable[[NDArray[np.float32]], None] | None = None,
    share: slice | None = None,
    stop_at_success: bool = False,
) -> EvaluationResult:
    """Play whole episodes with the policy's deterministic actions.

    Episode k is seeded by ``seed``, k and ``validation``: the goals are distinct, the same for every policy, and none
    of them is a demonstration's.

    Args:
        policy: What to evaluate.
        env: Any name that :func:`eva_rl.envs.canonical_id` takes.
        episodes: Episodes to count.
        seed: Chooses the episodes, 0 to 40,000.
        horizon: Env steps an episode; None takes the task's own.
        validation: Play validation episodes, for choices that a report must not see, rather than held-out ones.
        references: (low, high), returns that score 0 and 100, where the data bring their own.
        vec_env: Environments to use again, as :func:`evaluation_envs` makes them; made and closed here when None.
        on_episode: Called after each episode.
        on_actions: Called with the executed actions (m, act) of each step.
        share: The episodes that are played, of those asked for, where several processes divide them; None plays all.
        stop_at_success: End an episode at its first success: the same success rate for less time. Returns and lengths
            are then not measured.

    Returns:
        Among others ``success_rate``, from 0 to 1, NaN where the task reports no success, and ``mean_reward``, the mean
        undiscounted return. A :class:`DecisionTransformerPolicy` asks for the target return of its ``conditioning``.

    Raises:
        UserError: No such task, the policy does not fit it, an environment failed, ``episodes`` is
            not positive, or ``seed`` out of range.
    """
    if isinstance(policy, str | Path):
        raise UserError(f"policy={str(policy)!r} is a name. Load it first: eva_rl.load_policy({str(policy)!r}).")
    if missing := [name for name in ("observation_dim", "action_dim", "reset", "act") if not hasattr(policy, name)]:
        raise UserError(
            f"A {type(policy).__name__} is no policy: it has no {', '.join(missing)}. Load one with "
            "eva_rl.load_policy(PATH), or give a class of your own these four (docs/tutorial.md)."
        )
    if not isinstance(episodes, int | np.integer) or episodes < 1:
        raise UserError(f"episodes={episodes}: expected at least 1, and a whole number.")
    between(0, MAX_SEED, seed=seed)
    spec = env_spec(env, horizon)
    _check_fit(policy, spec)
    first, end, _ = (share or slice(None)).indices(episodes)
    if vec_env is not None and (others := {*vec_env.names} - {spec.env_id}):
        raise UserError(f"vec_env= holds environments of {', '.join(sorted(others))}, expected {spec.env_id}.")
    made = vec_env or evaluation_envs(env, max(1, end - first), horizon)
    try:
        made.seed(episode_seeds(VALIDATION if validation else EVALUATION, seed) + first)
        records = play_episodes(
            policy,
            made,
            [spec.env_id] * made.num_envs,
            end - first,
            on_episode,
            on_actions=on_actions,
            stop_at_success=stop_at_success,
        )
    finally:
        if made is not vec_env:
            made.close()
    stopping = ", ended at the first success" if stop_at_success else ""
    played = counted(episodes, "validation episode" if validation else "episode")
    return EvaluationResult(
        spec.env_id,
        tuple(records),
        f"{spec.protocol}; {played} of seed {seed}, deterministic action{stopping}",
        spec.reports_success or any(record.reports_success for record in records),
        references,
    )


def evaluation_envs(
    env: str, episodes: int, horizon: int | None = None, at_once: int = MOST_ENVS, workers: int = AUTO
) -> TaskVecEnv:
    """Environments for :func:`evaluate_policy`, at most ``at_once``; the caller closes them."""
    rounds = -(-episodes // at_once)
    return make_vec_env(env, -(-episodes // rounds), horizon=horizon, workers=workers)


class TaskScore(NamedTuple):
    """How a policy did on one of several tasks.

    Attributes:
        value: Success rate, or mean return where the task reports no success.
        is_success: Which of them it is.
    """

    value: float
    is_success: bool


def evaluate_tasks(
    policy: Policy, env_ids: Sequence[str], vec_env: TaskVecEnv, episodes: int, seed: int
) -> dict[str, TaskScore]:
    """Validate on several tasks at once, one environment each.

    Args:
        policy: What to evaluate.
        env_ids: Canonical names.
        vec_env: One environment per name, as ``eva_rl.envs.make_task_vec_env`` makes them.
        episodes: Episodes a task.
        seed: Seed of the first episode of the first task.

    Returns:
        Score by task.
    """
    vec_env.seed(seed)
    records = play_episodes(policy, vec_env, env_ids, episodes * len(env_ids), stop_at_success=True)
    return {env_id: _task_score([record for record in records if record.env_id == env_id]) for env_id in env_ids}


def _task_score(records: Sequence[EpisodeRecord]) -> TaskScore:
    is_success = any(record.reports_success for record in records)
    values = [record.success if is_success else record.episode_return for record in records]
    return TaskScore(float(np.mean(values)), is_success)


def _check_fit(policy: Policy, spec: EnvSpec) -> None:
    own, known = (spec.observation_dim, spec.action_dim), (policy.observation_dim, policy.action_dim)
    check_dimensions(spec.env_id, own, "the policy takes", known, "Name another policy= or env=.")
    check = getattr(policy, "check_action_bounds", None)  # classes of users' own say nothing of their bounds
    if check is not None:
        check(spec.action_low, spec.action_high, spec.env_id)


def evaluate_distributed(
    process_group: ProcessGroup, play: Callable[..., EvaluationResult], *, episodes: int, **options: Any
) -> EvaluationResult:
    """Play each process's share of the episodes; everyone gets all records, in the order of one process.

    Args:
        process_group: This process among the others, which all call this.
        play: :func:`evaluate_policy` with its first arguments filled in.
        episodes: Episodes in all.
        **options: Other options of ``play``.
    """
    mine = play(episodes=episodes, share=process_group.shard(episodes), **options)
    records = [record for part in process_group.all_gather_object(mine.episodes) for record in part]
    reports_success = mine.reports_success or any(record.reports_success for record in records)
    return replace(mine, episodes=tuple(records), reports_success=reports_success)


def shared_envs(process_group: ProcessGroup, env: str, episodes: int, horizon: int | None = None) -> TaskVecEnv:
    """This process's part of the environments of :func:`evaluation_envs`, one at least."""
    return evaluation_envs(
        env, -(-episodes // process_group.world_size), horizon, -(-MOST_ENVS // process_group.world_size)
    )


@dataclass(frozen=True)
class MultiTaskValidator:
    """Validates a policy on several tasks, each on one process; whoever makes one closes it.

    Attributes:
        process_group: This process among the others.
        tasks: Canonical names of all tasks.
        vec_env: One environment for each of this process's tasks; None where it has none.
    """

    process_group: ProcessGroup
    tasks: Sequence[str]
    vec_env: TaskVecEnv | None

    @classmethod
    def of(cls, process_group: ProcessGroup, tasks: Sequence[str], horizon: int | None = None) -> MultiTaskValidator:
        """Make this process's environments."""
        own, vec_env = tasks[process_group.shard(len(tasks))], None
        if own:
            vec_env = make_task_vec_env(own, stride=len(tasks), horizon=horizon, workers=AUTO)
        return cls(process_group, tasks, vec_env)

    def close(self) -> None:
        """Close this process's environments."""
        if self.vec_env is not None:
            self.vec_env.close()

    def scores(self, policy: Policy, episodes: int, seed: int) -> dict[str, TaskScore]:
        """Score by task, the same on every process.

        Args:
            policy: What to evaluate.
            episodes: Episodes a task.
            seed: Seed of the first episode of the first task.
        """
        share = self.process_group.shard(len(self.tasks))
        found: dict[str, TaskScore] = {}
        if self.vec_env is not None:
            found = evaluate_tasks(policy, self.tasks[share], self.vec_env, episodes, seed + share.start)
        return {task: rate for part in self.process_group.all_gather_object(found) for task, rate in part.items()}
