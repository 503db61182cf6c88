"""``python -m eva_rl.evaluate``: any policy on any task, with a confidence interval and a record of each episode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.commands.command import console, register, run_command
from eva_rl.commands.options import EvalOptions, PolicyOptions, RunOptions, group, one_of, option
from eva_rl.commands.policies import open_policy
from eva_rl.commands.pretrain import task_ids
from eva_rl.commands.progress import counting_progress
from eva_rl.commands.runs import prepare_machine, versions
from eva_rl.errors import UserError
from eva_rl.evaluation import EvaluationResult, evaluate
from eva_rl.files import write_json
from eva_rl.seeding import EVALUATION, VALIDATION
from eva_rl.video import record_episode

HELP = """
Play held-out episodes with a policy and report success and return, with a confidence interval.

Examples:
  python -m eva_rl.evaluate policy=runs/push/policy env=push-v3
  python -m eva_rl.evaluate policy=mt40 env=cw10 eval.episodes=50 out=cw10.json
  python -m eva_rl.evaluate policy=runs/push targets=[1000,1400,1800] video=true
"""


@dataclass
class EvaluateEnvOptions:
    """The tasks."""

    id: str = option("", "a task, tasks joined by +, mt40, cw10 or mt50; empty takes the policy's own; same as env=")
    horizon: int | None = option(None, "env steps an episode; null takes the task's own (Meta-World: 200)")


@dataclass
class EvaluateConfig(RunOptions):
    """Config of ``python -m eva_rl.evaluate``."""

    out: str = option("", "JSON file for the result and every episode; empty writes none")
    window: str = option("cached", "cached (fast) or full context windows; both are exact")
    video: bool = option(False, "also write the first episode of each task as videos/<task>.gif")
    targets: list[float] = field(
        default_factory=list, metadata={"help": "target returns to choose from, by the validation episodes"}
    )
    validation: bool = option(False, "play the validation episodes, for choices that a report must not see")
    env: EvaluateEnvOptions = group(EvaluateEnvOptions, "the tasks")
    policy: PolicyOptions = group(PolicyOptions, "what to evaluate")
    eval: EvalOptions = group(EvalOptions, "evaluation")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(("cached", "full"), window=self.window)


register("evaluate", EvaluateConfig, {})


def evaluate_policy(config: EvaluateConfig) -> None:
    """Load, play, show, and write where asked to."""
    out = Path(config.out).expanduser() if config.out else None
    if out is not None and out.exists():
        raise UserError(f"{out} exists and is not overwritten. Name another out=, or remove it.")
    policy = open_policy(config.policy, prepare_machine(config))
    policy.window = "full" if config.window == "full" else "cached"
    if not (config.env.id or policy.env_id):
        raise UserError(f"The policy {config.policy.path} was made for several tasks. Name one with env=.")
    tasks = task_ids(config.env.id or policy.env_id)
    if config.policy.target_return is not None:
        for task in tasks:
            policy.with_target(config.policy.target_return, task)
    for task in tasks if config.targets else ():
        choose_target(policy, task, config)
    results = []
    with counting_progress("Episodes", config.eval.episodes * len(tasks)) as advance:
        for task in tasks:
            results.append(
                evaluate(
                    policy,
                    task,
                    episodes=config.eval.episodes,
                    seed=config.eval.seed,
                    horizon=config.env.horizon,
                    purpose=VALIDATION if config.validation else EVALUATION,
                    on_episode=advance,
                )
            )
    show(results)
    for task in tasks if config.video else ():
        path = Path("videos") / f"{task.replace('/', '-')}.gif"
        record_episode(policy, task, path, seed=config.eval.seed, horizon=config.env.horizon)
        console.print(f"Video: {path}")
    if out is not None:
        write_json(out, record(config, policy, results))


def choose_target(policy: DecisionTransformerPolicy, task: str, config: EvaluateConfig) -> None:
    """Ask for the target return that does best on the validation episodes, which no report sees."""

    def merit(target: float) -> tuple[float, float]:
        policy.with_target(target, task)
        found = evaluate(
            policy,
            task,
            episodes=config.eval.episodes,
            seed=config.eval.seed,
            horizon=config.env.horizon,
            purpose=VALIDATION,
        )
        return (found.success_rate if found.reports_success else 0.0, found.mean_reward)

    merits = {target: merit(target) for target in config.targets}
    best = max(merits, key=lambda target: merits[target])
    policy.with_target(best, task)
    tried = ", ".join(f"{target:g}: {success:.2f}/{mean:.0f}" for target, (success, mean) in merits.items())
    console.print(f"{task}: target return {best:g} (validation success/return by target: {tried})")


def record(
    config: EvaluateConfig, policy: DecisionTransformerPolicy, results: Sequence[EvaluationResult]
) -> dict[str, object]:
    """What ``out=`` holds."""
    mean = sum(r.success_rate for r in results) / len(results) if results[0].reports_success else None
    return {
        "policy": config.policy.path,
        "seed": config.eval.seed,
        "mean_success_rate": mean,
        "versions": versions(),
        "tasks": {r.env_id: {"target_return": policy.conditioning.of(r.env_id), **r.record()} for r in results},
    }


def show(results: Sequence[EvaluationResult]) -> None:
    """The table at the end."""
    table = Table("task", "episodes", "success rate", "95% interval", "mean return")
    for result in results:
        success, interval = "-", "-"
        if result.reports_success:
            success = f"{result.success_rate:.2f}"
            interval = "[{:.2f}, {:.2f}]".format(*result.success_interval())
        table.add_row(result.env_id, str(len(result.episodes)), success, interval, f"{result.mean_reward:.1f}")
    if len(results) > 1 and results[0].reports_success:
        mean = sum(r.success_rate for r in results) / len(results)
        table.add_row("mean", "", f"{mean:.3f}", "", "")
    console.print(table)
    console.print(f"Protocol: {results[0].protocol}.", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("evaluate", EvaluateConfig, evaluate_policy, HELP, argv)
