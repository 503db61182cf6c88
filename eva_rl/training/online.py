"""Collect, learn, evaluate, save: the loop of the online algorithms."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from eva_rl.data.replay import TrajectoryReplay
from eva_rl.seeding import random_state, restore_random_state
from eva_rl.training.bc import VALIDATION_STEPS, Evaluate, Log
from eva_rl.training.checkpoint import Checkpoints, TrainState, below
from eva_rl.training.collector import Collector, EpisodeCollector, OnlineCounters, TaskEnvs
from eva_rl.training.failures import saved_on_failure
from eva_rl.training.learner import Learner
from eva_rl.training.optimizer import copy_of

REPLAY, ALGORITHM, BEST = "replay/", "algorithm/", "best/"
SCORES = ("/success_rate", "/mean_reward")
"""What the best validation is chosen by, in this order."""


def train_online(  # noqa: PLR0913 - one call for all algorithms; all but four have defaults
    learner: Learner,
    replay: TrajectoryReplay,
    task: TaskEnvs,
    *,
    log: Log,
    evaluate: Evaluate | None = None,
    measure: Evaluate | None = None,
    measure_at: Collection[int] = (),
    refresh: Callable[[int], Mapping[str, float]] | None = None,
    checkpoints: Checkpoints | None = None,
    collector: EpisodeCollector | None = None,
) -> OnlineCounters:
    """Alternate rollouts and gradient updates, resuming from the latest checkpoint if one exists.

    Episodes are truncated where the run is validated or saved, so that a resumed run meets the same episodes as one
    that was never interrupted; but not before every environment had the time for a whole one, until when nothing is
    saved, and validations interrupt nothing. What an environment's failure kept from being validated or measured is
    played when the run resumes.

    Args:
        learner: Its policy acts; its options say how long and how often.
        replay: Takes the episodes; what it holds already is learned from, too.
        task: Where the policy acts.
        log: Takes metrics and the env step they belong to; the env steps of validations count, too.
        evaluate: Returns validation metrics, which are logged, of a policy with histories of its own; how many env
            steps it played stands under :data:`eva_rl.training.bc.VALIDATION_STEPS`.
        measure: Returns metrics of held-out episodes, which are logged; it decides nothing, so that its env steps do
            not count.
        measure_at: Env steps of training; it is called after the iteration that reaches each of them but the last.
        refresh: Called with the gradient steps done every ``refresh_every`` env steps; what it returns is logged.
        checkpoints: Where to save, besides every ``checkpoint_every`` env steps at validations when the time has come;
            None keeps no checkpoint.
        collector: How the policy's episodes come about; None lets it act in all environments without a pause.

    Raises:
        NotFiniteError: A loss or a gradient is not finite.
        EnvironmentFailedError: An environment failed; what was learned before is saved.
    """
    options = learner.options
    run = _Run.begin(learner, replay, task, checkpoints, collector)
    counters = run.counters
    if evaluate is not None and options.keep_best and counters.best_step < 0:
        run.validate(evaluate, log)
    run.measure_if_due(measure, measure_at, log)
    run.validate_if(run.due(), evaluate, log)
    while counters.env_steps < options.env_steps:
        began, before = time.perf_counter(), counters.env_steps
        run.collect()
        metrics = run.learn()
        if refresh is not None and _due(counters, options.refresh_every, before):
            metrics |= refresh(counters.update)
        counters.seconds += time.perf_counter() - began
        log(metrics | counters.metrics(), counters.env_steps_played)
        run.measure_if_due(measure, measure_at, log)
        due = run.due()
        if due.truncate:
            run.collector.truncate_episodes(replay, counters)
        run.validate_if(due, evaluate, log)
        run.save_if(due)
    if options.keep_best:
        run.best.restore(learner.acting_parameters)
    return counters


@dataclass
class _Best:
    """A copy of the parameters of the best validation so far."""

    parameters: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = copy_of(parameters)

    def restore(self, parameters: Mapping[str, nn.Parameter]) -> None:
        with torch.no_grad():
            for name, value in self.parameters.items():
                parameters[name].copy_(value)


@dataclass(frozen=True)
class _Due:
    """What comes after an iteration, or before the first one of a run that resumes.

    Attributes:
        truncate: Whether episodes are truncated, so that something can be saved.
        validate: Whether the policy is validated, where it is at all.
        save: Whether so many env steps have passed; else the time since the last checkpoint decides.
    """

    truncate: bool
    validate: bool
    save: bool


@dataclass(frozen=True)
class _Run:
    """What learns, how far it has come, and where that is saved."""

    learner: Learner
    replay: TrajectoryReplay
    collector: EpisodeCollector
    counters: OnlineCounters
    best: _Best
    checkpoints: Checkpoints | None

    @classmethod
    def begin(
        cls,
        learner: Learner,
        replay: TrajectoryReplay,
        task: TaskEnvs,
        checkpoints: Checkpoints | None,
        collector: EpisodeCollector | None,
    ) -> _Run:
        """Begin, or resume from the latest checkpoint."""
        best = _Best()
        counters = _resume(checkpoints, learner, replay, best) or OnlineCounters.of(task)
        return cls(learner, replay, collector or Collector(learner.policy, task), counters, best, checkpoints)

    def _save(self) -> None:
        assert self.checkpoints is not None
        self.checkpoints.save(_state(self.counters, self.learner, self.replay, self.best))

    def saving_on_failure(self) -> AbstractContextManager[None]:
        """Save what was learned where an environment fails inside; a resumed run begins with the episodes after it."""
        return saved_on_failure(self._save_unfinished if self.checkpoints else None)

    def _save_unfinished(self) -> None:
        self.collector.truncate_episodes(self.replay, self.counters)
        self._save()

    def collect(self) -> None:
        """Act for an iteration."""
        with self.saving_on_failure():
            if not self.collector.acting:
                self.collector.begin(self.counters)
            self.collector.collect(self.learner, self.replay, self.counters)

    def learn(self) -> dict[str, float]:
        """The gradient steps of an iteration, once there is something to learn from; returns the last metrics."""
        learner, replay, counters, metrics = self.learner, self.replay, self.counters, dict[str, float]()
        failures = counters.failures - counters.failures_learned
        if counters.env_steps < learner.options.learning_starts or not learner.can_learn(replay, failures):
            return metrics
        learner.policy.network.train()
        for _ in range(learner.begin_iteration(replay, env_steps=counters.env_steps, updates=counters.update)):
            metrics |= learner.update(replay, counters.update)
            counters.update += 1
        counters.failures_learned = counters.failures
        learner.policy.network.eval()
        return metrics

    def due(self) -> _Due:
        """What comes next, by what was done before."""
        options, counters = self.learner.options, self.counters
        done = counters.env_steps >= options.env_steps
        validating = _due(counters, options.eval_every, counters.validated_at)
        saving = done or _due(counters, options.checkpoint_every, counters.truncated_at)
        truncating = done or ((validating or saving) and self.collector.may_truncate(counters))
        at_the_end = options.keep_best and counters.validated_at < counters.env_steps
        return _Due(truncating, at_the_end if done else validating, saving)

    def measure_if_due(self, measure: Evaluate | None, at: Collection[int], log: Log) -> None:
        """Measure where one of those env steps was reached since the last measurement, and training goes on."""
        steps, before = self.counters.env_steps, self.counters.measured_at
        reached = steps < self.learner.options.env_steps and any(before < one <= steps for one in at)
        if measure is not None and reached:
            with self.saving_on_failure():
                log(measure(steps), self.counters.env_steps_played)
        self.counters.measured_at = steps

    def validate_if(self, due: _Due, evaluate: Evaluate | None, log: Log) -> None:
        """Validate, where it is time."""
        if evaluate is not None and due.validate:
            with self.saving_on_failure():
                self.validate(evaluate, log)
        self.counters.validated_at = self.counters.env_steps

    def save_if(self, due: _Due) -> None:
        """Save, where episodes were truncated and it is time."""
        if self.checkpoints is None or not due.truncate:
            return
        if self.learner.options.checkpoint_every if due.save else self.checkpoints.due_by_time():
            self._save()

    def validate(self, evaluate: Evaluate, log: Log) -> None:
        """Validate, and keep a copy if this is the best score so far.

        That is the success rate, ties broken by return, or by fewer env steps where episodes end at success.
        """
        counters, metrics = self.counters, evaluate(self.counters.env_steps)
        counters.validated(metrics)
        log(metrics, counters.env_steps_played)
        score = _score(metrics)
        if counters.best_step < 0 or score > counters.best_score:
            counters.best_step, counters.best_score = counters.env_steps, score
            self.best.keep(self.learner.acting_parameters)


def _score(metrics: Mapping[str, float]) -> list[float]:
    rates, returns = ([v for k, v in metrics.items() if k.endswith(ending)] for ending in SCORES)
    steps = metrics.get(VALIDATION_STEPS, 0.0)
    return [max(rates, default=0.0), max(returns, default=-steps)]


def _due(counters: OnlineCounters, every: int, before: int) -> bool:
    """Whether a multiple of ``every`` env steps was reached since there were ``before``."""
    return every > 0 and counters.env_steps // every > before // every


def _state(counters: OnlineCounters, learner: Learner, replay: TrajectoryReplay, best: _Best) -> TrainState:
    tensors = {ALGORITHM + name: value for name, value in learner.tensors().items()}
    tensors |= {REPLAY + name: value for name, value in replay.tensors().items()}
    tensors |= {BEST + name: value for name, value in best.parameters.items()}
    tensors |= random_state(learner.policy.device)
    return TrainState(counters.env_steps_played, tensors, asdict(counters))


def _resume(
    checkpoints: Checkpoints | None, learner: Learner, replay: TrajectoryReplay, best: _Best
) -> OnlineCounters | None:
    state = checkpoints.load() if checkpoints else None
    if state is None:
        return None
    assert checkpoints is not None
    with checkpoints.fitting():
        learner.restore(below(state.tensors, ALGORITHM))
        replay.restore(below(state.tensors, REPLAY))
        best.parameters = below(state.tensors, BEST)
        if "random/torch" in state.tensors:  # not in older ones
            restore_random_state(state.tensors, learner.policy.device)
        steps = state.record["env_steps"]
        return OnlineCounters(**{"validated_at": steps, "measured_at": steps, **state.record})  # not in older ones
