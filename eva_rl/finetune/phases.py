"""The phases of training: cloning, then learning in the environment, as ``algo=`` says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from eva_rl.adapters import AttachedAdapter, compute_eva, refresh_directions
from eva_rl.agents.stochastic import make_deterministic
from eva_rl.cli.console import say, training_progress
from eva_rl.cli.profiling import peak_memory
from eva_rl.configs.algorithms import (
    BCAlgo,
    ODTAlgo,
    ODTTD3Algo,
    OnlineAlgo,
    PPOAlgo,
    ResidualAlgo,
    SelfImitationAlgo,
    TD3Algo,
)
from eva_rl.data.replay import TrajectoryReplay
from eva_rl.data.samplers import ShardedSampler, prefetching
from eva_rl.data.selection import until_success
from eva_rl.envs import make_vec_env
from eva_rl.errors import counted
from eva_rl.files import write_file
from eva_rl.finetune.adapter import activation_env_steps, attach, warn_of_unused
from eva_rl.finetune.residual import learn_residual
from eva_rl.finetune.session import Session
from eva_rl.finetune.shared import shared_eva
from eva_rl.options import BFLOAT16
from eva_rl.rollouts.evaluation import EvaluationResult
from eva_rl.tracking import Tracker
from eva_rl.tracking.tracker import CLONING as CLONED
from eva_rl.training.bc import Continued, Log, train_bc
from eva_rl.training.checkpoint import Checkpoints, latest_step
from eva_rl.training.failures import failures_kept, warn_untrained
from eva_rl.training.learner import Learner, step_generators
from eva_rl.training.odt import OnlineDecisionTransformer
from eva_rl.training.odt_td3 import TD3DecisionTransformer
from eva_rl.training.online import train_online
from eva_rl.training.optimizer import copy_of, trainable_parameters
from eva_rl.training.options import AUTO
from eva_rl.training.self_imitation.learner import SelfImitation
from eva_rl.training.self_imitation.retries import RetryingCollector
from eva_rl.training.self_imitation.snapshot import load_snapshot, save_snapshot

logger = logging.getLogger(__name__)

Replayed: TypeAlias = ODTAlgo | ODTTD3Algo | SelfImitationAlgo
"""Algorithms that learn from a replay of whole episodes."""


def initialise_adapter(session: Session) -> AttachedAdapter:
    """Attach the adapter, initialised from the session's data where its method needs some."""
    if session.process_group.is_main:
        warn_of_unused(session.config.adapter, session.config.algo)
        if session.resumed is not None:
            say(f"Continuing from the checkpoint of step {session.resumed.step}.")
    adapter = attach(session.policy, session.sampler, session.config, partial(shared_eva, session))
    session.phases.end("adapter")
    return adapter


@dataclass(frozen=True)
class Training:
    """What training took and gave.

    Attributes:
        costs: Steps taken, and what they cost, for the summary.
        between: Held-out evaluations between the first and the last one: after cloning, and of the residual policy.
    """

    costs: Mapping[str, float]
    between: Mapping[str, EvaluationResult] = field(default_factory=dict)


def train(session: Session, adapter: AttachedAdapter, tracker: Tracker) -> Training:
    """Train the policy's trainable parameters; the batch of a failure is kept."""
    with failures_kept(session.run_dir), peak_memory(session.policy.device) as memory:
        played = activation_env_steps(session.config, session.data is not None)
        training = _train(replace(session, played_before=played), adapter, tracker)
    session.phases.end("train")
    further = {"processes": session.process_group.world_size} | ({"activation_env_steps": played} if played else {})
    return replace(training, costs={**training.costs, **memory, **further})


def _train(session: Session, adapter: AttachedAdapter, tracker: Tracker) -> Training:
    algo = session.config.algo
    if isinstance(algo, BCAlgo):
        return Training(clone(session, adapter, algo, tracker.log))
    assert isinstance(algo, OnlineAlgo)
    anew = isinstance(algo, SelfImitationAlgo) and algo.restart
    start = copy_of(trainable_parameters(session.policy.network)) if anew else None
    first = _clone_first(session, adapter, algo, tracker) if algo.bc.updates else Training({})
    validated = int(first.costs.get(f"{CLONED}validation_env_steps", 0))
    session = replace(session, played_before=session.played_before + validated)
    if isinstance(algo, PPOAlgo | TD3Algo):
        return replace(first, costs={**first.costs, **learn_sb3(session, algo, tracker)})
    if isinstance(algo, ResidualAlgo):
        return _learn_residual(session, adapter, algo, tracker, first)
    assert isinstance(algo, Replayed)
    return replace(first, costs={**first.costs, **learn(session, adapter, algo, tracker, start)})


def _clone_first(session: Session, adapter: AttachedAdapter, algo: OnlineAlgo, tracker: Tracker) -> Training:
    """Clone the demonstrations before learning online, and evaluate between the two."""
    costs = clone(session, adapter, algo.bc, _prefixed(tracker.log, CLONED), snapshot_update(algo))
    session.phases.end("clone")
    cloned, _ = session.evaluate("Cloned")
    session.phases.end("evaluate_cloned")
    scores = cloned.metrics("eval_cloned")
    tracker.log_once(cloned.metrics() | scores, session.played_before + int(costs["validation_env_steps"]))
    return Training({f"{CLONED}{key}": value for key, value in costs.items()} | scores, {"cloned": cloned})


def _learn_residual(
    session: Session, adapter: AttachedAdapter, algo: ResidualAlgo, tracker: Tracker, first: Training
) -> Training:
    vec_env = online_envs(session, algo, stop_at_success=algo.stop_at_success)
    try:
        found = learn_residual(session, adapter, algo, tracker, vec_env)
    finally:
        vec_env.close()
    return Training({**first.costs, **found.costs}, {**first.between, "residual": found.evaluation})


def _prefixed(log: Log, prefix: str) -> Log:
    return lambda metrics, step: log({prefix + key: value for key, value in metrics.items()}, step)


def snapshot_update(algo: OnlineAlgo) -> int:
    """The gradient step of cloning after which a snapshot is taken; 0 where none is."""
    if not isinstance(algo, SelfImitationAlgo) or not algo.snapshot:
        return 0
    return max(0, min(max(1, round(algo.snapshot * algo.bc.updates)), algo.bc.updates - 1))


def clone(session: Session, adapter: AttachedAdapter, algo: BCAlgo, log: Log, snapshot_at: int = 0) -> dict[str, float]:
    """Behaviour cloning of the demonstrations, with a snapshot after gradient step ``snapshot_at`` unless that is 0."""
    config, policy = session.config, session.policy
    assert session.sampler is not None
    say(f"Cloning: {counted(algo.updates, 'gradient step')}, peak learning rate {float(algo.learning_rate):g}.")
    draw = ShardedSampler(session.sampler, session.process_group)
    begun = latest_step(session.checkpoint_dir) or 0
    with training_progress(algo.updates, begun=begun) as bar, prefetching(draw, policy.device) as ahead:
        counters = train_bc(
            policy,
            ahead,
            algo,
            log=bar.also(log),
            evaluate=lambda _: session.validate(),
            eval_every=config.eval.every,
            measure=lambda _: session.measure(),
            measure_at=config.eval.at if isinstance(config.algo, BCAlgo) else [],
            checkpoints=Checkpoints(session.checkpoint_dir, config.checkpoint.every, config.checkpoint.seconds),
            extension=adapter.extension,
            after={snapshot_at: partial(save_snapshot, policy.network, session.snapshot_file)},
        )
        bar.at(counters.update)
    costs = {"updates": counters.update, "seconds_per_update": counters.seconds / max(1, counters.update)}
    costs["validation_env_steps"] = counters.validation_steps
    if algo.precision == AUTO:
        say(f"Precision: {counters.precision}, as timed when training began")
        costs["bfloat16"] = float(counters.precision == BFLOAT16)
    return costs


def learn(
    session: Session, adapter: AttachedAdapter, algo: Replayed, tracker: Tracker, start: Mapping[str, Tensor] | None
) -> dict[str, float]:
    """Alternate rollouts and gradient updates; ``start`` has what every iteration begins with, if anything."""
    policy, acting = session.policy, session.policy.with_own_history()
    head = policy.network.log_std_head
    own_head = {} if head is None else copy_of(dict(head.requires_grad_(True).named_parameters()))
    replay = make_replay(session, algo)
    algorithm = make_algorithm(session, adapter, algo, start)
    vec_env = online_envs(session, algo, stop_at_success=isinstance(algo, SelfImitationAlgo))
    task = session.online_task(vec_env)
    try:
        retrying = None
        if isinstance(algo, SelfImitationAlgo):
            snapshot = load_snapshot(session.snapshot_file) if snapshot_update(algo) else None
            retrying = RetryingCollector(policy, task, algo, snapshot)
        with training_progress(algo.env_steps, "env steps") as bar:
            counters = train_online(
                algorithm,
                replay,
                task,
                log=bar.also(tracker.log),
                evaluate=lambda _: session.validate(acting),
                measure=lambda _: session.measure(acting),
                measure_at=session.config.eval.at,
                refresh=make_refresh(session, adapter, algo, algorithm, replay),
                checkpoints=session.online_checkpoints,
                collector=retrying,
            )
    finally:
        vec_env.close()
    if head is not None and adapter.model is not None:
        _restore_head(session, own_head)
    if not isinstance(algo, SelfImitationAlgo):  # which has nothing to learn where the policy never fails
        warn_untrained(algorithm.actor_steps, algo.name)
    best = {"best_step": counters.best_step} if algo.keep_best else {}
    counts = {"env_steps": counters.env_steps, "env_steps_played": counters.env_steps_played}
    return {"updates": counters.update, **counts, "episodes": counters.episodes, **best}


def _restore_head(session: Session, own: Mapping[str, Tensor]) -> None:
    """The head that draws actions is no part of the adapter: the base stays what it was."""
    head = session.policy.network.log_std_head
    assert head is not None
    if session.made_stochastic:
        make_deterministic(session.policy)
    else:
        head.load_state_dict(own)


def learn_sb3(session: Session, algo: PPOAlgo | TD3Algo, tracker: Tracker) -> dict[str, float]:
    """Let Stable-Baselines3 train the policy's network."""
    from eva_rl.training.sb3 import make_model, train_sb3

    vec_env = online_envs(session, algo)
    task = session.online_task(vec_env)
    try:
        model = make_model(session.policy, task, algo, seed=session.config.seed)
        with training_progress(algo.env_steps, "env steps") as bar:
            steps = train_sb3(
                model,
                task,
                algo,
                log=bar.also(tracker.log),
                evaluate=lambda _: session.validate(),
                checkpoints=session.online_checkpoints,
            )
        write_file(session.run_dir / "sb3.zip", lambda aside: _save_model(model, aside))
    finally:
        vec_env.close()
    warn_untrained(steps["updates"], algo.name)
    return dict(steps)


def _save_model(model: Any, path: Path) -> None:
    with path.open("wb") as file:  # by name, it would add a suffix
        model.save(file)


def make_replay(session: Session, algo: Replayed) -> TrajectoryReplay:
    """A replay that holds the demonstrations, the best last, as many as fit.

    Self-imitation, whose episodes end at their first success, has them end there, too.
    """
    policy = session.policy
    folder = session.run_dir / "replay" if algo.replay_on_disk else None
    discount = algo.discount if isinstance(algo, ODTTD3Algo) else 1.0
    replay = TrajectoryReplay(algo.replay_size, policy.observation_dim, policy.action_dim, folder, discount=discount)
    if session.data is not None:
        target_return = policy.conditioning.of(session.spec.env_id)
        order = session.data.returns.argsort(kind="stable")
        episodes = (session.data.episode(int(index)) for index in order)
        shown = map(until_success, episodes) if isinstance(algo, SelfImitationAlgo) else episodes
        replay.extend(shown, target_return)
    return replay


def make_algorithm(
    session: Session, adapter: AttachedAdapter, algo: Replayed, start: Mapping[str, Tensor] | None
) -> Learner:
    """The algorithm of the options, on the session's policy."""
    policy, seed = session.policy, session.config.seed
    extension = adapter.extension and Continued(adapter.extension, algo.bc.updates)
    if isinstance(algo, ODTTD3Algo):
        return TD3DecisionTransformer(policy, algo, seed=seed, extension=extension)
    if isinstance(algo, SelfImitationAlgo):
        return SelfImitation(policy, algo, seed=seed, extension=extension, start=start)
    if session.data is None and session.config.policy.target_return is None:
        own = policy.conditioning.of(session.spec.env_id)
        logger.warning(
            "algo=odt learns what was done at each return, and asks for %.4g, which the policy obtains as it is: it "
            "will hardly improve. Ask for more with policy.target_return=, say %.4g, or give demonstrations (data=).",
            *(own, own + abs(own)),
        )
    return OnlineDecisionTransformer(policy, algo, seed=seed, extension=extension)


def make_refresh(
    session: Session, adapter: AttachedAdapter, algo: Replayed, learner: Learner, replay: TrajectoryReplay
) -> Callable[[int], Mapping[str, float]] | None:
    """The callback that compares directions with current activations and reinitialises unused ones; None if off."""
    if not algo.refresh_every:
        return None
    model, first = adapter.model, adapter.eva
    assert model is not None
    assert first is not None
    policy, options, names = session.policy, session.config.adapter, list(first.layers)
    rank = max(layer.rank for layer in first.layers.values())

    def refresh(update: int) -> Mapping[str, float]:
        if not replay.num_complete:
            return {}
        rng, _ = step_generators(session.config.seed, update)
        recent = (
            replay.sample(options.eva.batch_size, rng, learner.context_length, learner.scaling).to(policy.device)
            for _ in count()
        )
        with learner.refreshing():
            found = compute_eva(
                policy,
                names,
                recent,
                None,
                max_batches=options.eva.max_batches,
                rank=rank,
                tau=options.tau,
                center=options.center,
                keep_moments=options.gain != "own",
            )
            done = refresh_directions(model, found, algo.refresh_below, options.gain)
        learner.forget(done.changed)
        return done.metrics()

    return refresh


def online_envs(session: Session, algo: OnlineAlgo, *, stop_at_success: bool = False) -> VecEnv:
    """Environments to act in while learning."""
    config = session.config
    return make_vec_env(
        session.spec.env_id,
        algo.num_envs,
        horizon=config.env.horizon,
        workers=algo.workers * algo.num_envs,
        stop_at_success=stop_at_success,
    )
