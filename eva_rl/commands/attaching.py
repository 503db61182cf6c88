"""From a command's adapter options to an adapter on the policy, aimed by data where the method wants some."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from eva_rl import envs, eva
from eva_rl.adapters import (
    AttachedAdapter,
    Rollouts,
    attach_adapter,
    find_method,
    initial_rank,
    measure,
    target_layers,
)
from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.batch import WindowBatch
from eva_rl.commands.command import console
from eva_rl.commands.finetune_options import AdapterOptions, FinetuneConfig
from eva_rl.data import WindowSampler
from eva_rl.seeding import ROLLOUTS, episode_seeds


def check_adapter(policy: DecisionTransformerPolicy, options: AdapterOptions) -> None:
    """Raise unless the policy can carry the adapter that the options ask for.

    Raises:
        UserError: See :func:`eva_rl.adapters.attach_adapter`.
    """
    target_layers(policy.network, options.targets)


def attach(policy: DecisionTransformerPolicy, sampler: WindowSampler, config: FinetuneConfig) -> AttachedAdapter:
    """Compute EVA's directions where the method wants them, and attach the adapter."""
    options = config.adapter
    result = None
    if find_method(options.method).eva:
        result = _measure(policy, sampler, config)
        console.print(
            f"EVA: {result.rows} rows in {result.batches} batches, {result.stopped}, {result.seconds:.1f} s; "
            f"{sum(layer.explained_variance for layer in result.layers.values()) / len(result.layers):.0%} of the "
            "variance explained on average"
        )
    return attach_adapter(
        policy,
        options.method,
        rank=options.rank,
        alpha=options.alpha,
        dropout=options.dropout,
        targets=options.targets,
        eva=result,
        total_updates=config.algo.updates,
    )


def _measure(policy: DecisionTransformerPolicy, sampler: WindowSampler, config: FinetuneConfig) -> eva.EvaResult:
    options, pruned = config.adapter, find_method(config.adapter.method).adalora
    source, rollouts = options.eva.source, None
    if source != "trajectories":
        spec = envs.env_spec(config.env.id, config.env.horizon)
        vec_env = envs.make_vec_env(spec.env_id, options.eva.rollout_envs, horizon=config.env.horizon)
        vec_env.seed(episode_seeds(ROLLOUTS, config.seed))
        rollouts = Rollouts(vec_env, [spec.env_id] * vec_env.num_envs, options.eva.rollout_steps)
    try:
        return measure(
            policy,
            target_layers(policy.network, options.targets),
            None if source == "rollouts" else windows(policy, sampler, options.eva.batch_size),
            rollouts,
            max_batches=options.eva.max_batches,
            rank=initial_rank(options.rank) if pruned else options.rank,
            rho=1.0 if pruned else options.rho,
            tau=options.tau,
            center=options.center,
            score=options.score,
            variant=options.variant,
            alpha=options.rank if options.alpha is None else options.alpha,
            seed=config.seed,
        )
    finally:
        if rollouts is not None:
            rollouts.vec_env.close()


def windows(policy: DecisionTransformerPolicy, sampler: WindowSampler, batch_size: int) -> Iterator[WindowBatch]:
    """The windows that training will see, in its order, without end."""
    return (sampler.sample(batch_size, step, policy.device) for step in count())
