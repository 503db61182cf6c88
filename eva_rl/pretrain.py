"""``python -m eva_rl.pretrain``: a Decision Transformer from demonstrations of any list of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import torch

from eva_rl.agents import Conditioning, DecisionTransformer, DecisionTransformerConfig, DecisionTransformerPolicy
from eva_rl.agents.decision_transformer import SIZES
from eva_rl.agents.policy_folder import save_policy
from eva_rl.agents.policy_record import STD, check_record
from eva_rl.batch import InputScaling
from eva_rl.cli.command import run_command
from eva_rl.cli.console import say, training_progress
from eva_rl.cli.loading import Demonstrations, load_demonstrations
from eva_rl.cli.machine import prepare_machine
from eva_rl.cli.origin import check_origin
from eva_rl.cli.parsing import register
from eva_rl.cli.run_dir import flat_hyperparameters, open_run, write_summary
from eva_rl.configs.algorithms import BCAlgo
from eva_rl.configs.groups import CheckpointOptions, DataOptions, EnvOptions, TrainOptions
from eva_rl.data import Trajectories, WindowSampler
from eva_rl.data.samplers import ShardedSampler, prefetching
from eva_rl.data.selection import observation_statistics, return_scale, sampling_weights
from eva_rl.distributed import ProcessGroup
from eva_rl.envs import env_spec
from eva_rl.envs.registry import task_ids
from eva_rl.errors import counted
from eva_rl.options import MANY, Options, between, group, option
from eva_rl.rollouts.evaluation import MultiTaskValidator, TaskScore
from eva_rl.seeding import MAX_SEED, VALIDATION, episode_seeds
from eva_rl.tracking.tracker import Resume, open_tracker
from eva_rl.training.bc import train_bc
from eva_rl.training.checkpoint import Checkpoints, latest_step
from eva_rl.training.failures import failures_kept
from eva_rl.training.options import BCOptions

HELP = """
Train a Decision Transformer by behaviour cloning on demonstrations of one or many tasks.

Examples:
  python -m eva_rl.pretrain env=mt40 data.episodes=100 run_dir=runs/mt40
  python -m eva_rl.pretrain env=push-v3+reach-v3 algo.updates=4000 size.hidden_size=64

The same command continues an unfinished run_dir.
"""

MIN_STD = 0.01
"""Observation dimensions that vary less than this are centred, not divided: they carry no signal to blow up."""
WEIGHT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Precisions in which a policy folder can be read again."""


@dataclass
class SizeOptions(Options):
    """Shape of the network."""

    PREFIX: ClassVar[str] = "size."
    name: str = option(
        "custom",
        "small (0.9M), base (13M) or large (43M parameters); overrides the next four; same as size=",
        choices=("custom", *SIZES),
    )
    hidden_size: int = option(DecisionTransformerConfig.hidden_size, "width", above=0)
    num_layers: int = option(DecisionTransformerConfig.num_layers, "blocks", above=0)
    num_heads: int = option(DecisionTransformerConfig.num_heads, "attention heads", above=0)
    context_length: int = option(DecisionTransformerConfig.context_length, "context length in env steps", above=0)
    dropout: float = option(DecisionTransformerConfig.dropout, "dropout while training", low=0, high=0.9)
    max_timestep: int | None = option(
        None,
        "rows of the timestep embedding; null uses the longest episode of the data and the tasks",
        above=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name != "custom":
            for key, value in SIZES[self.name].items():
                setattr(self, key, value)


@dataclass
class ValidationOptions(Options):
    """Validation while pretraining."""

    PREFIX: ClassVar[str] = "eval."
    episodes: int = option(1, "episodes of each task", above=0)
    every: int = option(100, "validate every N gradient steps; 0 disables", low=0, high=MANY)
    seed: int = option(0, "seed of the episodes, which demonstrations never share", low=0, high=MAX_SEED)


@dataclass
class PretrainConfig(TrainOptions):
    """Config of ``python -m eva_rl.pretrain``."""

    return_scale: float | None = option(
        None, "returns are divided by this; null uses a fifth of the largest return-to-go in the data"
    )
    weight_dtype: str = option(
        "float16",
        "precision of the weights in the policy folder: float32, float16 or bfloat16",
        choices=tuple(WEIGHT_DTYPES),
    )
    env: EnvOptions = group(EnvOptions, "tasks: mt40, cw10, mt50, or names joined by +")
    data: DataOptions = group(DataOptions, "demonstrations")
    size: SizeOptions = group(SizeOptions, "network")
    algo: BCAlgo = group(BCAlgo, "training")
    eval: ValidationOptions = group(ValidationOptions, "validation, on every task")
    checkpoint: CheckpointOptions = group(CheckpointOptions, "checkpoints")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.algo = self.algo.with_default(BCOptions.learning_rate)
        if self.return_scale is not None:
            between(STD.low, STD.high, return_scale=self.return_scale)


register("pretrain", PretrainConfig, {"algo": {"bc": BCAlgo()}})


def pretrain(config: PretrainConfig) -> None:
    """Collect or load demonstrations, train, evaluate, save."""
    device = prepare_machine(config, config.env.timeout)
    tasks = task_ids(config.env.id)
    run_dir = open_run("pretrain", config)
    began = perf_counter()
    process_group = ProcessGroup.current()
    with process_group.main_process_first():
        found = load_demonstrations(tasks, config.data, run_dir / "data", config.env.horizon)
    joined = replace(found.data, source=f"{config.data.source}:{config.env.id}")
    policy = _new_policy(config, tasks, found).to(device)
    process_group.broadcast_object(lambda: check_origin(run_dir, None, joined))
    _say_what_was_found(policy, found)
    sampler = _sampler(config, policy, joined)
    data_seconds = perf_counter() - began
    validator = MultiTaskValidator.of(process_group, tasks, config.env.horizon)

    def validate(update: int) -> dict[str, float]:
        if process_group.is_main:
            _save(run_dir, policy, config, joined)
        scores = validator.scores(policy, config.eval.episodes, episode_seeds(VALIDATION, config.eval.seed))
        return _validation_metrics(scores)

    checkpoints = Checkpoints(run_dir / "checkpoint", config.checkpoint.every, config.checkpoint.seconds)
    step = latest_step(checkpoints.folder)
    resume, is_main = None if step is None else Resume(step), process_group.is_main
    with (
        failures_kept(run_dir),
        closing(validator),
        open_tracker(run_dir, resume, config.tracker, flat_hyperparameters(config), writes=is_main) as tracker,
        training_progress(config.algo.updates, begun=step or 0) as bar,
        prefetching(ShardedSampler(sampler, process_group), device) as ahead,
    ):
        tracker.watch(policy.network, config.algo.final_step)
        counters = train_bc(
            policy,
            ahead,
            config.algo,
            log=bar.also(tracker.log),
            evaluate=validate,
            eval_every=config.eval.every,
            checkpoints=checkpoints,
            process_group=process_group,
        )
        final = validate(counters.update)
        tracker.log_once(final, counters.update)
        tracker.finished(final)
    if process_group.is_main:
        seconds = {"data": data_seconds, "train": counters.seconds}
        processes = {"processes": process_group.world_size}
        write_summary(run_dir, _summary(config, policy, joined, final, seconds) | processes)
    _announce(len(tasks), final, run_dir)


MEANS = ("validation/success_rate", "validation/mean_reward")


def _announce(num_tasks: int, final: Mapping[str, float], run_dir: Path) -> None:
    shown_scores = ", ".join(f"{key} {final[key]:.2f}" for key in MEANS if key in final)
    say(f"{counted(num_tasks, 'task')}: {shown_scores}. Policy: {run_dir / 'policy'}")


def _validation_metrics(scores: Mapping[str, TaskScore]) -> dict[str, float]:
    """Each task's score, and the means: of success where a task reports it, of the return elsewhere."""
    metrics = {f"validation/{task}": score.value for task, score in scores.items()}
    for key, is_success in zip(MEANS, (True, False), strict=True):
        own = [score.value for score in scores.values() if score.is_success == is_success]
        if own:
            metrics[key] = float(np.mean(own))
    return metrics


def _new_policy(config: PretrainConfig, tasks: Sequence[str], found: Demonstrations) -> DecisionTransformerPolicy:
    """A policy with random weights: what it may do is the tasks', how numbers are scaled is the data's."""
    data, specs = found.data, [env_spec(task, config.env.horizon) for task in tasks]
    mean, std = observation_statistics(data)
    found_scale = float(np.clip(return_scale(data), STD.low, STD.high))
    scale = found_scale if config.return_scale is None else config.return_scale
    scaling = InputScaling.create(
        mean, np.where(std < MIN_STD, 1.0, std), scale, specs[0].action_low, specs[0].action_high
    )
    size = config.size
    network = DecisionTransformer(
        DecisionTransformerConfig(
            observation_dim=data.observation_dim,
            action_dim=data.action_dim,
            hidden_size=size.hidden_size,
            num_layers=size.num_layers,
            num_heads=size.num_heads,
            context_length=size.context_length,
            max_timestep=size.max_timestep or max(int(data.lengths.max()), *(spec.horizon for spec in specs)),
            dropout=size.dropout,
        )
    )
    targets = found.target_returns
    conditioning = Conditioning(float(np.median(list(targets.values()))), targets)
    env_id = tasks[0] if len(tasks) == 1 else ""
    policy = DecisionTransformerPolicy(network, scaling, conditioning, env_id=env_id)
    check_record(policy, f"{config.data.source}, as a policy")
    return policy


def _sampler(config: PretrainConfig, policy: DecisionTransformerPolicy, data: Trajectories) -> WindowSampler:
    weights = sampling_weights(data, config.data.after_success, config.data.weight_by)
    return WindowSampler(data, config.size.context_length, policy.scaling, seed=config.seed, weights=weights)


def _say_what_was_found(policy: DecisionTransformerPolicy, found: Demonstrations) -> None:
    data = found.data
    low, high = data.returns.min(), data.returns.max()
    say(
        f"{counted(data.num_episodes, 'episode')} with returns from {low:.4g} to {high:.4g}. "
        f"Return scale {policy.scaling.return_scale:g} (return_scale=), {policy.network.config.max_timestep} timesteps "
        "(size.max_timestep=).",
    )
    if found.shared:
        say(
            f"The {len(found.target_returns)} tasks share these episodes, which are read and used once, and the target "
            f"return {next(iter(found.target_returns.values())):.4g}. For episodes of each task's own: data=expert.",
        )


def _save(run_dir: Path, policy: DecisionTransformerPolicy, config: PretrainConfig, data: Trajectories) -> None:
    policy.metadata = {
        "pretrained_on": sorted(policy.conditioning.per_env),
        "data": {"source": data.source, "episodes": data.num_episodes, "steps": data.num_steps},
    }
    save_policy(run_dir / "policy", policy, dtype=WEIGHT_DTYPES[config.weight_dtype])


def _summary(
    config: PretrainConfig,
    policy: DecisionTransformerPolicy,
    data: Trajectories,
    final: dict[str, float],
    seconds: dict[str, float],
) -> dict[str, Any]:
    return {
        "env": config.env.id,
        "method": "pretrain",
        "seed": config.seed,
        "parameters": sum(p.numel() for p in policy.network.parameters()),
        "data": {"episodes": data.num_episodes, "steps": data.num_steps, "hash": data.content_hash},
        "return_scale": policy.scaling.return_scale,
        "max_timestep": policy.network.config.max_timestep,
        "seconds": seconds,
        **final,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("pretrain", pretrain, HELP, argv, multirun="eva_rl.launch.multirun", continues=True)


if __name__ == "__main__":
    raise SystemExit(main())
