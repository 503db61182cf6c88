"""``python -m eva_rl.finetune``: adapt a pretrained policy to a task, with the result on held-out goals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
from eva_rl.commands.command import console, run_command
from eva_rl.commands.demonstrations import load_task_data, sampling_weights, target_return
from eva_rl.commands.finetune_options import FinetuneConfig
from eva_rl.commands.finetune_record import Phases, finish, report_eva
from eva_rl.commands.outputs import data_references
from eva_rl.commands.policies import open_policy
from eva_rl.commands.pretrain import bc_options
from eva_rl.commands.progress import counting_progress, training_progress
from eva_rl.commands.runs import open_run, prepare_machine
from eva_rl.data import Trajectories, WindowSampler
from eva_rl.data.prefetch import prefetching
from eva_rl.evaluation import EvaluationResult, evaluate, evaluation_envs
from eva_rl.seeding import ROLLOUTS, VALIDATION, episode_seeds
from eva_rl.tracking import Tracker
from eva_rl.training.bc import train_bc
from eva_rl.training.checkpoint import load_latest_checkpoint

HELP = """
Fine-tune a pretrained Decision Transformer policy on a task, and report its success before and after.

Examples:
  python -m eva_rl.finetune env=push-v3
  python -m eva_rl.finetune env=peg-unplug-side-v3 adapter=lora adapter.rank=4 algo.updates=800
  python -m eva_rl.finetune env=push-v3 data=demos.h5 policy=runs/mine/policy run_dir=runs/push

The same command continues an unfinished run_dir.
"""


def finetune(config: FinetuneConfig) -> None:
    """Evaluate, aim and attach the adapter, train, evaluate again, save."""
    device = prepare_machine(config)
    spec = envs.env_spec(config.env.id, config.env.horizon)
    policy = open_policy(config.policy, device, merge=True)
    policy.check_dimensions(spec.observation_dim, spec.action_dim, spec.env_id)
    target_layers(policy.network, config.adapter.targets)
    run_dir = open_run("finetune", config)
    phases = Phases()
    data = load_task_data(spec.env_id, config.data, run_dir / "data", config.env.horizon)
    policy.check_dimensions(data.observation_dim, data.action_dim, data.source)
    asked = config.policy.target_return
    policy.with_target(target_return(data) if asked is None else asked, spec.env_id)
    sampler = make_sampler(policy, data, config)
    phases.end("data")
    vec_env = evaluation_envs(spec.env_id, config.eval.episodes, config.env.horizon)
    play = partial(
        evaluate,
        policy,
        config.env.id,
        horizon=config.env.horizon,
        seed=config.eval.seed,
        references=data_references(data),
        vec_env=vec_env,
    )
    before = _with_bar("Before", play, config.eval.episodes)
    phases.end("evaluate_before")
    adapter = attach(policy, sampler, config)
    phases.end("adapter")
    resumed = load_latest_checkpoint(run_dir / "checkpoint")
    with Tracker(run_dir, None if resumed is None else resumed.step) as tracker:
        if resumed is None:
            tracker.log(before.metrics(), 0)
        if adapter.eva is not None and resumed is None:
            report_eva(run_dir, adapter.eva, data, config, tracker)
        with training_progress(config.algo.updates) as bar, prefetching(sampler, device) as ahead:
            train_bc(
                policy,
                ahead,
                bc_options(config.algo, config.eval.every, config.checkpoint.every),
                log=bar.also(tracker.log),
                evaluate=lambda _: play(episodes=config.eval.quick_episodes, purpose=VALIDATION).metrics("validation"),
                checkpoint_dir=run_dir / "checkpoint",
                extension=adapter.extension,
            )
        phases.end("train")
        after = _with_bar("After", play, config.eval.episodes)
        phases.end("evaluate_after")
        finish(run_dir, config, policy, adapter, (before, after), data, phases)
        tracker.log(after.metrics(), config.algo.updates)  # last, so that no continued run can log it twice
    vec_env.close()


def make_sampler(policy: DecisionTransformerPolicy, data: Trajectories, config: FinetuneConfig) -> WindowSampler:
    """Windows as the policy sees them, in an order that the seed decides."""
    return WindowSampler(
        data,
        policy.network.config.context_length,
        policy.scaling,
        seed=config.seed,
        weights=sampling_weights(data, config.data.after_success, config.data.weight_by),
    )


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


def _with_bar(name: str, play: Callable[..., EvaluationResult], episodes: int) -> EvaluationResult:
    """The held-out evaluation, behind a progress bar."""
    with counting_progress(f"{name:8s}", episodes) as advance:
        return play(episodes=episodes, on_episode=advance)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("finetune", FinetuneConfig, finetune, HELP, argv)
