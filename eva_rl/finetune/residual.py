"""Residual reinforcement learning on the session's frozen policy, and distillation back into it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv

from eva_rl.adapters import AttachedAdapter
from eva_rl.cli.console import training_progress
from eva_rl.configs.algorithms import ResidualAlgo
from eva_rl.data.samplers import prefetching
from eva_rl.data.trajectories import Episode
from eva_rl.errors import EnvironmentFailedError
from eva_rl.finetune.session import Session
from eva_rl.rollouts.evaluation import EvaluationResult
from eva_rl.tracking import Tracker
from eva_rl.training.bc import Continued, Log, train_bc
from eva_rl.training.checkpoint import Checkpoints
from eva_rl.training.collector import OnlineCounters, TaskEnvs
from eva_rl.training.failures import warn_untrained
from eva_rl.training.losses import clone_loss
from eva_rl.training.online import train_online
from eva_rl.training.options import DistillOptions
from eva_rl.training.residual.actor import frozen_copy
from eva_rl.training.residual.distillation import LabelledWindows, roll_out
from eva_rl.training.residual.learner import ResidualLearner

logger = logging.getLogger(__name__)

MEASURED_WINDOWS, MEASURED_BATCHES, MEASURED_FROM = 64, 2, 10**9
"""Windows on which the clone's error is measured, drawn as those of gradient steps that nobody takes."""


@dataclass(frozen=True)
class ResidualTraining:
    """What residual learning and distillation took and gave.

    Attributes:
        costs: Steps taken, for the summary.
        evaluation: Held-out episodes of the residual policy, before distillation.
    """

    costs: Mapping[str, float]
    evaluation: EvaluationResult


def learn_residual(
    session: Session, adapter: AttachedAdapter, algo: ResidualAlgo, tracker: Tracker, vec_env: VecEnv
) -> ResidualTraining:
    """Learn what to add to the policy's actions, then clone the sum into the policy.

    Args:
        session: Its policy proposes, as it is now; it is the clone afterwards.
        adapter: What the clone's gradient steps train.
        algo: How.
        tracker: The record.
        vec_env: Where both act.
    """
    if algo.distill.log_every != DistillOptions.log_every:
        logger.warning(
            "algo.distill.log_every=%d has no effect: see distill/loss, once a round.", algo.distill.log_every
        )
    task = session.online_task(vec_env)
    learner = make_learner(session, algo)
    replay = learner.new_replay(algo.replay_size, session.run_dir / "replay" if algo.replay_on_disk else None)
    with training_progress(algo.residual_env_steps, "env steps") as bar:
        counters = train_online(
            learner,
            replay,
            task,
            log=bar.also(tracker.log),
            evaluate=lambda _: session.validate(learner.acting),
            checkpoints=session.online_checkpoints,
        )
    warn_untrained(learner.actor_steps, algo.name)
    session.phases.end("train")
    evaluation, _ = session.evaluate("Residual", learner.acting)
    session.phases.end("evaluate_residual")
    windows = LabelledWindows(
        learner.acting,
        task.env_id,
        learner.context_length,
        session.config.seed,
        clone_share=algo.distill.clone_share,
        noise=algo.distill.noise,
    )
    windows.add(replay.episodes())
    windows.add(as_many(learner.demonstrations.episodes(), replay.num_steps, session.config.seed))
    task = replace(task, first_seed=counters.next_seed)
    try:
        updates, distilled = distill(session, adapter, algo, (windows, task), logged_after(tracker.log, counters))
    except EnvironmentFailedError as error:
        if not algo.checkpoint_every:
            raise
        raise error.saved() from error
    session.phases.end("distill")
    costs = {
        "updates": counters.update,
        "distill/updates": updates,
        "env_steps": counters.env_steps + distilled,
        "env_steps_played": counters.env_steps_played + distilled,
        "episodes": counters.episodes,
    }
    return ResidualTraining({**costs, **evaluation.metrics("eval_residual")}, evaluation)


def as_many(episodes: Iterable[Episode], env_steps: int, seed: int) -> list[Episode]:
    """All episodes, or where they are longer than that together, random ones that reach that many env steps.

    A large data set would else hide the states in which the clone has to act.
    """
    kept = list(episodes)
    order = np.random.default_rng(seed).permutation(len(kept))
    before = np.cumsum([0, *(len(kept[index].rewards) for index in order[:-1])])
    return [kept[index] for index in np.sort(order[: int((before < env_steps).sum())])]


def make_learner(session: Session, algo: ResidualAlgo) -> ResidualLearner:
    """The learner, on a frozen copy of the session's policy as it is now."""
    data = session.data
    return ResidualLearner(
        frozen_copy(session.policy),
        algo.learner_options,
        seed=session.config.seed,
        demonstrations=[] if data is None else [data.episode(index) for index in range(data.num_episodes)],
        env_id=session.spec.env_id,
    )


def distill(
    session: Session,
    adapter: AttachedAdapter,
    algo: ResidualAlgo,
    material: tuple[LabelledWindows, TaskEnvs],
    log: Log,
) -> tuple[int, int]:
    """Clone the residual policy, then again in rounds with env steps of the clone.

    Returns:
        Gradient steps and env steps.
    """
    (windows, task), updates, env_steps, options = material, 0, 0, algo.distill
    for number in range(1 + options.rounds):
        if number:
            episodes, next_seed = roll_out(session.policy, task, options.env_steps)
            env_steps += sum(len(episode.actions) for episode in episodes)
            log({"distill/loss": cloning_error(session, windows.of(episodes))}, env_steps)
            windows.add(episodes, of_clone=True)
            task = replace(task, first_seed=next_seed)
        with prefetching(windows, session.policy.device) as ahead:
            counters = train_bc(
                session.policy,
                ahead,
                options,
                log=lambda *_: None,
                checkpoints=Checkpoints(session.checkpoint_dir / f"distill_{number}", session.config.checkpoint.every),
                extension=adapter.extension and Continued(adapter.extension, algo.bc.updates + updates),
            )
        updates += counters.update
    return updates, env_steps


def logged_after(log: Log, counters: OnlineCounters) -> Log:
    """A log function that counts env steps from the end of residual learning."""

    def logged(metrics: Mapping[str, float], step: int) -> None:
        steps = {"time/env_steps": counters.env_steps + step, "time/env_steps_played": counters.env_steps_played + step}
        log({**metrics, **steps}, counters.env_steps_played + step)

    return logged


def cloning_error(session: Session, windows: LabelledWindows) -> float:
    """Loss of the clone on some windows."""
    policy = session.policy
    steps = range(MEASURED_FROM, MEASURED_FROM + MEASURED_BATCHES)
    batches = (windows.sample(MEASURED_WINDOWS, step, policy.device) for step in steps)
    with torch.no_grad():
        losses = [clone_loss(policy.network, batch).item() for batch in batches]
    return sum(losses) / len(losses)
