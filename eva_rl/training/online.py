"""Collect, learn, evaluate, save: the loop of the online algorithms."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from eva_rl.data.replay import TrajectoryReplay
from eva_rl.training.bc import Log
from eva_rl.training.checkpoint import TrainState, load_latest_checkpoint, save_checkpoint
from eva_rl.training.collector import Collector, OnlineCounters, OnlineOptions, TaskEnvs
from eva_rl.training.learner import OnlineAlgorithm

REPLAY, ALGORITHM, BEST = "replay/", "algorithm/", "best/"
SCORES = ("success_rate", "mean_reward")
"""What an evaluation is judged by, first things first."""


def train_online(  # noqa: PLR0913 - four values, and what it tells others of itself
    algorithm: OnlineAlgorithm,
    replay: TrajectoryReplay,
    task: TaskEnvs,
    options: OnlineOptions,
    *,
    log: Log,
    evaluate: Callable[[int], Mapping[str, float]] | None = None,
    refresh: Callable[[int], Mapping[str, float]] | None = None,
    checkpoint_dir: Path | None = None,
) -> OnlineCounters:
    """Let a policy act and learn by turns, from the last checkpoint where there is one.

    Episodes are broken off where the run is evaluated or saved, so that a run that continues from there meets the
    same episodes as one that was never interrupted.

    Args:
        algorithm: Learns; its policy acts.
        replay: Takes the episodes; what it holds already is learned from, too.
        task: Where the policy acts.
        options: How long, and how often.
        log: Takes metrics and the env step they belong to.
        evaluate: Called at evaluations; what it returns is logged.
        refresh: Called with the gradient steps done every ``refresh_every`` env steps; what it returns is logged.
        checkpoint_dir: Where checkpoints are kept; None keeps none.

    Raises:
        NotFiniteError: A loss, a gradient, a reward or an observation is not finite.
    """
    best: dict[str, Tensor] = {}
    counters = _resume(checkpoint_dir, algorithm, replay, best) or OnlineCounters()
    counters.next_seed = counters.next_seed or options.first_episode
    collector = Collector(algorithm.policy, task)
    if evaluate is not None and options.keep_best and counters.best_step < 0:
        _look(evaluate, log, best, counters, algorithm)
    while counters.env_steps < options.env_steps:
        began = time.perf_counter()
        if not collector.acting:
            collector.begin(counters)
        collector.collect(algorithm, replay, options, counters)
        metrics = _learn(algorithm, replay, options, counters)
        if refresh is not None and _due(counters, options.refresh_every, options.steps_per_iteration):
            metrics |= refresh(counters.update)
        counters.seconds += time.perf_counter() - began
        done = counters.env_steps >= options.env_steps
        evaluating = _due(counters, options.eval_every, options.steps_per_iteration)
        saving = done or _due(counters, options.checkpoint_every, options.steps_per_iteration)
        log(metrics | counters.metrics(), counters.env_steps)
        if evaluating or saving:
            collector.break_off(replay, counters)
        if evaluate is not None and (options.keep_best if done else evaluating):
            _look(evaluate, log, best, counters, algorithm)
        if saving and checkpoint_dir and options.checkpoint_every:
            save_checkpoint(checkpoint_dir, _state(counters, algorithm, replay, best))
    if options.keep_best and best:
        _put(algorithm.parameters, best)
    return counters


def _look(
    evaluate: Callable[[int], Mapping[str, float]],
    log: Log,
    best: dict[str, Tensor],
    counters: OnlineCounters,
    algorithm: OnlineAlgorithm,
) -> None:
    """Evaluate; remember the parameters if they never did better: more success, or as much of it and more return."""
    found = evaluate(counters.env_steps)
    log(found, counters.env_steps)
    score = [max((v for k, v in found.items() if k.endswith(f"/{key}")), default=0.0) for key in SCORES]
    if counters.best_step < 0 or score > counters.best_score:
        counters.best_step, counters.best_score = counters.env_steps, score
        best.update({name: parameter.detach().clone() for name, parameter in algorithm.parameters.items()})


def _put(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _learn(
    algorithm: OnlineAlgorithm, replay: TrajectoryReplay, options: OnlineOptions, counters: OnlineCounters
) -> dict[str, float]:
    """One bout of gradient steps, once there is something to learn from; returns the last metrics."""
    metrics: dict[str, float] = {}
    if counters.env_steps < options.random_steps or not replay.num_complete:
        return metrics
    algorithm.policy.network.train()
    for _ in range(options.updates_per_iteration):
        metrics |= algorithm.update(replay, counters.update)
        counters.update += 1
    algorithm.policy.network.eval()
    return metrics


def _due(counters: OnlineCounters, every: int, step: int) -> bool:
    """Whether the last ``step`` env steps crossed a multiple of ``every``."""
    return every > 0 and counters.env_steps // every > (counters.env_steps - step) // every


def _state(
    counters: OnlineCounters, algorithm: OnlineAlgorithm, replay: TrajectoryReplay, best: Mapping[str, Tensor]
) -> TrainState:
    tensors = {ALGORITHM + name: value for name, value in algorithm.tensors().items()}
    tensors |= {REPLAY + name: value for name, value in replay.tensors().items()}
    tensors |= {BEST + name: value for name, value in best.items()}
    return TrainState(counters.env_steps, tensors, asdict(counters))


def _resume(
    folder: Path | None, algorithm: OnlineAlgorithm, replay: TrajectoryReplay, best: dict[str, Tensor]
) -> OnlineCounters | None:
    state = load_latest_checkpoint(folder) if folder else None
    if state is None:
        return None
    parts = {
        prefix: {k.removeprefix(prefix): v for k, v in state.tensors.items() if k.startswith(prefix)}
        for prefix in (ALGORITHM, REPLAY, BEST)
    }
    algorithm.restore(parts[ALGORITHM])
    replay.restore(parts[REPLAY])
    best.update(parts[BEST])
    return OnlineCounters(**state.record)
