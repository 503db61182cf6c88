"""``python -m eva_rl.finetune``: adapt a pretrained policy to a task, with the result on held-out goals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.table import Table

from eva_rl import envs, eva
from eva_rl.adapters import (
    METHODS,
    PROJECTIONS,
    SOURCES,
    AttachedAdapter,
    Rollouts,
    attach_adapter,
    count_parameters,
    find_method,
    initial_rank,
    measure,
    save_adapted_policy,
    target_layers,
)
from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.batch import WindowBatch
from eva_rl.commands.cards import model_card
from eva_rl.commands.command import console, register, run_command
from eva_rl.commands.demonstrations import load_task_data, sampling_weights, target_return
from eva_rl.commands.options import (
    BCOptionsGroup,
    CheckpointOptions,
    DataOptions,
    EnvOptions,
    EvalOptions,
    PolicyOptions,
    RunOptions,
    between,
    group,
    one_of,
    option,
    positive,
)
from eva_rl.commands.policies import open_policy
from eva_rl.commands.pretrain import bc_options
from eva_rl.commands.progress import counting_progress, training_progress
from eva_rl.commands.runs import open_run, prepare_machine, write_summary
from eva_rl.data import Trajectories, WindowSampler
from eva_rl.data.prefetch import prefetching
from eva_rl.evaluation import EvaluationResult, evaluate, evaluation_envs
from eva_rl.files import write_json
from eva_rl.seeding import ROLLOUTS, VALIDATION, episode_seeds
from eva_rl.tracking import Tracker
from eva_rl.tracking.figures import rank_figure, spectrum_figure
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


@dataclass
class EvaSourceOptions:
    """The activations that EVA looks at."""

    source: str = option("trajectories", "trajectories, rollouts (of the policy, while it acts) or mixed")
    max_batches: int = option(16, "batches of windows at most")
    batch_size: int = option(64, "windows a batch")
    rollout_envs: int = option(10, "environments in which the policy acts")
    rollout_steps: int = option(200, "env steps in each")

    def __post_init__(self) -> None:
        one_of(SOURCES, adapter__eva__source=self.source)
        positive(
            adapter__eva__max_batches=self.max_batches,
            adapter__eva__batch_size=self.batch_size,
            adapter__eva__rollout_envs=self.rollout_envs,
            adapter__eva__rollout_steps=self.rollout_steps,
        )


@dataclass
class AdapterOptions:
    """What is trained."""

    method: str = option("eva", "one of " + ", ".join(METHODS))
    rank: int = option(8, "rank of each target layer (on average, where EVA hands ranks out)")
    alpha: float | None = option(None, "LoRA's alpha; null takes the rank, an update scale of 1")
    dropout: float = option(0.0, "LoRA's dropout")
    targets: list[str] = field(
        default_factory=lambda: list(PROJECTIONS),
        metadata={"help": "layers that get an adapter, by (ending of) name"},
    )
    rho: float = option(1.0, "EVA: no layer gets more than rank * rho; 1 gives all the same")
    tau: float = option(0.99, "EVA: stop when two halves of the data agree to this")
    center: bool = option(False, "EVA: subtract the mean activation")
    score: str = option("ratio", "EVA: compare layers by explained-variance ratio, or by the paper's formula (paper)")
    variant: str | None = option(None, "EVA: an ablation of the paper: whiten, rotate, permute or minor")
    eva: EvaSourceOptions = group(EvaSourceOptions, "EVA's data")

    def __post_init__(self) -> None:
        find_method(self.method)
        positive(adapter__rank=self.rank)
        between(1, 1000, adapter__rho=self.rho)
        between(0, 1, adapter__tau=self.tau)
        between(0, 0.99, adapter__dropout=self.dropout)
        one_of(("ratio", "paper"), adapter__score=self.score)
        if self.variant is not None:
            one_of(("whiten", "rotate", "permute", "minor"), adapter__variant=self.variant)
        if self.alpha is not None:
            positive(adapter__alpha=self.alpha)


@dataclass
class FinetuneConfig(RunOptions):
    """Config of ``python -m eva_rl.finetune``."""

    env: EnvOptions = group(EnvOptions, "the new task")
    policy: PolicyOptions = group(PolicyOptions, "what to start from")
    data: DataOptions = group(DataOptions, "demonstrations")
    adapter: AdapterOptions = group(AdapterOptions, "what is trained")
    algo: BCOptionsGroup = group(BCOptionsGroup, "how it is trained")
    eval: EvalOptions = group(EvalOptions, "evaluation")
    checkpoint: CheckpointOptions = group(CheckpointOptions, "checkpoints")


register("finetune", FinetuneConfig, {})


@dataclass
class Phases:
    """Seconds spent in each phase of a run."""

    seconds: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=perf_counter)

    def end(self, name: str) -> None:
        """Note the time since the previous phase ended."""
        now = perf_counter()
        self.seconds[name] = now - self._began
        self._began = now


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
    play = partial(evaluate, policy, config.env.id, horizon=config.env.horizon, seed=config.eval.seed, vec_env=vec_env)
    before = _with_bar("Before", play, config.eval.episodes)
    phases.end("evaluate_before")
    adapter = attach(policy, sampler, config)
    phases.end("adapter")
    resumed = load_latest_checkpoint(run_dir / "checkpoint")
    with Tracker(run_dir, None if resumed is None else resumed.step) as tracker:
        if resumed is None:
            tracker.log(before.metrics(), 0)
        if adapter.eva is not None:
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
        tracker.log(after.metrics(), config.algo.updates)
        phases.end("evaluate_after")
    vec_env.close()
    finish(run_dir, config, policy, adapter, (before, after), data, phases)


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


def report_eva(
    run_dir: Path, result: eva.EvaResult, data: Trajectories, config: FinetuneConfig, tracker: Tracker
) -> None:
    """Write ``eva_report.json``, and show spectra and ranks."""
    origin = {"source": data.source, "hash": data.content_hash, "listened_to": config.adapter.eva.source}
    write_json(run_dir / "eva_report.json", {"data": origin, **result.to_report()})
    spectra = {name: layer.explained_variance_ratio.tolist() for name, layer in result.layers.items()}
    tracker.figure("eva/spectrum", spectrum_figure(spectra), 0)
    tracker.figure("eva/ranks", rank_figure({name: layer.rank for name, layer in result.layers.items()}), 0)


def finish(
    run_dir: Path,
    config: FinetuneConfig,
    policy: DecisionTransformerPolicy,
    adapter: AttachedAdapter,
    results: tuple[EvaluationResult, EvaluationResult],
    data: Trajectories,
    phases: Phases,
) -> None:
    """Write the policy folder and the summary, and show where everything lies."""
    before, after = results
    summary: dict[str, Any] = {
        "env": after.env_id,
        "method": config.adapter.method,
        "seed": config.seed,
        "policy": config.policy.path,
        "target_return": policy.conditioning.of(after.env_id),
        "protocol": after.protocol,
        **before.metrics("eval_before"),
        **after.metrics("eval"),
        **count_parameters(policy.network),
        "data": {
            "source": data.source,
            "hash": data.content_hash,
            "episodes": data.num_episodes,
            "steps": data.num_steps,
            "mean_return": float(data.returns.mean()),
        },
        "updates": config.algo.updates,
        "seconds": phases.seconds,
    }
    policy.env_id = after.env_id
    policy.metadata |= {
        "finetuned_on": after.env_id,
        "method": config.adapter.method,
        "protocol": after.protocol,
    }
    save_adapted_policy(run_dir / "policy", policy, adapter, model_card(summary))
    write_json(run_dir / "evaluation.json", {"before": before.record(), "after": after.record()})
    write_summary(run_dir, summary)
    show(run_dir, summary, results)


def show(run_dir: Path, summary: dict[str, Any], results: tuple[EvaluationResult, EvaluationResult]) -> None:
    """The table at the end."""
    before, after = results
    table = Table(title=f"{summary['env']}, {summary['method']}: {len(after.episodes)} held-out episodes")
    for column in ("", "before", "after"):
        table.add_column(column)
    if after.reports_success:
        intervals = [
            f"{r.success_rate:.2f}  [{r.success_interval()[0]:.2f}, {r.success_interval()[1]:.2f}]" for r in results
        ]
        table.add_row("success rate [95% interval]", *intervals)
    table.add_row("mean return", f"{before.mean_reward:.1f}", f"{after.mean_reward:.1f}")
    console.print(table)
    trainable, total = summary["trainable_parameters"], summary["total_parameters"]
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items())
    console.print(f"Trained {trainable:,} of {total:,} parameters. Seconds: {seconds}.")
    console.print(f"Protocol: {summary['protocol']}.", soft_wrap=True)
    console.print(
        f"Policy:      {run_dir / 'policy'}\nTensorBoard: tensorboard --logdir {run_dir / 'tb'}",
        soft_wrap=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("finetune", FinetuneConfig, finetune, HELP, argv)
