"""``python -m eva_rl.evaluate``: any policy on any task, with a confidence interval and a record of each episode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, zip_longest
from pathlib import Path

from rich.table import Column, Table

from eva_rl.adapters import ADAPTER_NAME, AdaptedPolicy
from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.agents.context import Acting
from eva_rl.cli.command import run_command
from eva_rl.cli.console import console, counting_progress, say
from eva_rl.cli.loading import check_has_no_demonstrations, open_policy
from eva_rl.cli.machine import prepare_machine, versions
from eva_rl.cli.parsing import register
from eva_rl.configs.groups import EnvOptions, HeldOutOptions, MachineOptions, PolicyOptions
from eva_rl.distributed import ProcessGroup
from eva_rl.envs import EnvSpec, canonical_id, env_spec
from eva_rl.envs.registry import is_known, task_ids
from eva_rl.errors import UserError, shown_number
from eva_rl.files import check_folder, check_new, expanded, write_json
from eva_rl.options import COMPILE_MODES, PRECISIONS, group, one_of, option
from eva_rl.rollouts.evaluation import (
    EvaluationResult,
    described_return,
    evaluate_distributed,
    evaluate_policy,
    other_starts,
)
from eva_rl.rollouts.video import check_frames, record_episode
from eva_rl.training.compiling import check_compiler

HELP = """
Evaluate a policy on held-out episodes: success rate with a confidence interval, and mean return.

Examples:
  python -m eva_rl.evaluate policy=runs/push/policy env=push-v3
  python -m eva_rl.evaluate policy=mt40 env=cw10 eval.episodes=50 out=cw10.json
  python -m eva_rl.evaluate policy=runs/push targets=[1000,1400,1800] video=true
  python -m eva_rl.evaluate policy=runs/push env=mt40 adapter=both out=forgetting.json
  python -m eva_rl.evaluate policy=mt40 'adapters={push-v3:runs/push,reach-wall-v3:runs/wall}' env=cw10
"""

VIDEOS = Path("videos")


@dataclass
class EvaluateEnvOptions(EnvOptions):
    """The tasks."""

    id: str = option(
        "", "a task, tasks joined by +, or a group such as mt40 or cw10; empty uses the policy's own; same as env="
    )


@dataclass
class EvaluateConfig(MachineOptions):
    """Config of ``python -m eva_rl.evaluate``."""

    out: str = option("", "JSON file for the result and every episode; empty writes none")
    window: str = option("cached", "cached (fast) or full context windows; both are exact")
    precision: str = option("float32", "float32, or bfloat16 for mixed precision")
    compile: str = option("none", "torch.compile of each step: none, default, or reduce-overhead (CUDA graphs)")
    video: bool = option(False, "also write the first episode of each task as videos/<task>.gif")
    targets: list[float] = field(
        default_factory=list, metadata={"help": "target returns to choose from, by the validation episodes"}
    )
    adapter: str = option("on", "on, off, or both: with the policy's adapter, without it, or compare the two")
    adapters: dict[str, str] = field(
        default_factory=dict,
        metadata={"help": "an adapter for some tasks, '{push-v3:runs/push}'; other tasks use the policy without one"},
    )
    validation: bool = option(
        False, "play the validation episodes, to choose settings without using the evaluation episodes"
    )
    env: EvaluateEnvOptions = group(EvaluateEnvOptions, "the tasks")
    policy: PolicyOptions = group(PolicyOptions, "what to evaluate")
    eval: HeldOutOptions = group(HeldOutOptions, "evaluation")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(("cached", "full"), window=self.window)
        one_of(PRECISIONS, precision=self.precision)
        one_of(COMPILE_MODES, compile=self.compile)
        one_of(("on", "off", "both"), adapter=self.adapter)
        if self.targets and self.policy.target_return is not None:
            raise UserError(
                f"policy.target_return={self.policy.target_return:g} and targets={self.targets}: expected one of them. "
                "Leave out policy.target_return= to have one of the targets chosen, or targets= to set it."
            )
        self.adapters = {_task_of(task, path): path for task, path in self.adapters.items()}


def _task_of(task: str, path: str) -> str:
    """The canonical name of an adapter's task.

    Raises:
        UserError: No such task, or its name has a colon and no quotes, so that a part of it is in the path.
    """
    rest, colon, place = path.rpartition(":")
    if colon and not expanded(path).exists():
        quoted = f"\"{{'{task}:{rest}':{place}}}\""
        raise UserError(f"adapters={{{task}:{path}}}: the name of a task that has a colon is quoted: adapters={quoted}")
    return canonical_id(task)


register("evaluate", EvaluateConfig, {})


def evaluate(config: EvaluateConfig) -> None:
    """Load, play, show, and write where asked to."""
    out = expanded(config.out) if config.out else None
    if out is not None:
        check_new(out)
    if config.video:
        check_folder(VIDEOS, "working directory, or leave out video=true")
    check_has_no_demonstrations(config.policy)
    device = prepare_machine(config, config.env.timeout)
    policy = open_policy(
        config.policy, device, adapters=config.adapters, target_return=next(iter(config.targets), None)
    )
    policy.window = "full" if config.window == "full" else "cached"
    policy.acting = Acting(config.precision, config.compile)
    check_compiler(config.compile, policy.device)
    first = ProcessGroup.current().is_main
    if config.adapter != "on":
        check_adapters(policy)
    tasks = chosen_tasks(config, policy)
    if config.video and first:
        check_frames(tasks[0], config.env.horizon)
    set_targets(policy, tasks, config)
    played = Played()
    try:
        play(policy, tasks, config, played)
    finally:
        results, without = played.complete()
        if results:
            show(results, without)
            if len(results) < len(tasks):
                say(f"Not played to the end: {', '.join(tasks[len(results) :])}.")
            if out is not None and first:
                write_json(out, record(config, policy, results, without))
    for task in tasks if config.video and first else ():
        activate_adapter(policy, task, config.adapter != "off")
        path = _unused(task.replace("/", "-"))
        record_episode(policy, task, path, seed=config.eval.seed, horizon=config.env.horizon)
        say(f"Video: {path}")


def _unused(name: str) -> Path:
    """A path for a video that overwrites none."""
    paths = (VIDEOS / f"{name}{f'-{number}' if number > 1 else ''}.gif" for number in count(1))
    return next(path for path in paths if not path.exists())


def set_targets(policy: AdaptedPolicy, tasks: Sequence[str], config: EvaluateConfig) -> None:
    """Let each task ask for the return that was typed, or for the best one of ``targets``."""
    for task in tasks:
        if config.policy.target_return is not None:
            policy.set_target_return(config.policy.target_return, task)
        if config.targets:
            activate_adapter(policy, task, config.adapter != "off")
            choose_target(policy, task, config)


def chosen_tasks(config: EvaluateConfig, policy: DecisionTransformerPolicy) -> list[str]:
    """The tasks of ``env=``, of ``adapters=`` or the policy's own, each of which can be made."""
    asked = config.env.id or "+".join(config.adapters) or policy.env_id
    if not asked:
        raise UserError(f"The policy {config.policy.path} was trained on several tasks. Name one with env=.")
    if asked == policy.env_id and not config.env.id and not is_known(asked):
        raise UserError(
            f"The policy {config.policy.path} says that it was trained on {asked!r}, which is imported or built only "
            f"where you ask for it. Type env={asked}."
        )
    tasks = task_ids(config.env.named(asked))  # where env= was typed, its options are in the name already
    for task in tasks:
        spec = env_spec(task, config.env.horizon)
        policy.check_dimensions(spec.observation_dim, spec.action_dim, task)
        policy.check_action_bounds(spec.action_low, spec.action_high, task)
        if task == policy.env_id and config.env.horizon is None:
            note_other_episodes(policy, spec)
    if unused := [name for name in config.adapters if not set(task_ids(name)) & set(tasks)]:
        say(f"No task of env={config.env.id} uses adapters={{{', '.join(unused)}}}.")
    return tasks


def note_other_episodes(policy: DecisionTransformerPolicy, spec: EnvSpec) -> None:
    """Say where the run that made a policy played its task's episodes otherwise: its target return is theirs."""
    facts = policy.metadata.get("finetuning")
    protocol = facts.get("protocol") if isinstance(facts, Mapping) else None
    if isinstance(protocol, str) and not protocol.startswith(f"{spec.protocol};"):
        say(f"The policy's run played other episodes ({protocol}). For the same, type env.horizon= as it had.")


@dataclass
class Played:
    """Evaluations in the order of the tasks.

    Attributes:
        shown: With the adapter, or without one where it is off.
        without: Those without it that are compared with them.
    """

    shown: list[EvaluationResult] = field(default_factory=list)
    without: list[EvaluationResult] = field(default_factory=list)

    def complete(self) -> tuple[list[EvaluationResult], list[EvaluationResult]]:
        """Both, of the tasks that were played in all ways."""
        done = len(self.without) if self.without else len(self.shown)
        return self.shown[:done], self.without


def play(policy: AdaptedPolicy, tasks: Sequence[str], config: EvaluateConfig, played: Played) -> None:
    """Evaluate on each task, and for ``adapter=both`` also without adapters, on the same goals."""
    ways = [True, False] if config.adapter == "both" else [config.adapter == "on"]
    with counting_progress(
        "Episodes", ProcessGroup.current().local_count(config.eval.episodes) * len(tasks) * len(ways)
    ) as advance:
        for task in tasks:
            for adapted in ways:
                activate_adapter(policy, task, adapted)
                found = evaluate_distributed(
                    ProcessGroup.current(),
                    partial(evaluate_policy, policy, task),
                    episodes=config.eval.episodes,
                    seed=config.eval.seed,
                    horizon=config.env.horizon,
                    validation=config.validation,
                    on_episode=advance,
                    stop_at_success=bool(config.eval.stop_at_success),
                )
                (played.shown if adapted is ways[0] else played.without).append(found)


def activate_adapter(policy: AdaptedPolicy, task: str, adapted: bool) -> None:
    """Use the adapter for this task, the policy's own where there is none for it, or no adapter at all."""
    found = policy.adapters
    own = next((name for name in (task, ADAPTER_NAME) if name in found.names), None)
    found.use(own if adapted else None)


def check_adapters(policy: AdaptedPolicy) -> None:
    """Raise unless the policy has an adapter to turn off."""
    if not policy.adapters.names:
        base = policy.metadata.get("finetuning", {}).get("policy")
        if base is None:
            raise UserError("The policy has no adapter to turn off, and was not fine-tuned. Leave adapter= out.")
        raise UserError(
            "The policy has no adapter to turn off: adapter=full and head change its own weights. Evaluate what it was "
            f"made from as well, and compare: policy={base}."
        )


def choose_target(policy: DecisionTransformerPolicy, task: str, config: EvaluateConfig) -> None:
    """Set the target return that does best on the validation episodes, which no report sees."""

    def validated(target: float) -> EvaluationResult:
        policy.set_target_return(target, task)
        return evaluate_policy(
            policy,
            task,
            episodes=config.eval.episodes,
            seed=config.eval.seed,
            horizon=config.env.horizon,
            validation=True,
        )

    results = {target: validated(target) for target in config.targets}
    solves = any(result.reports_success for result in results.values())
    scores = {t: (r.success_rate if solves else 0.0, r.mean_reward) for t, r in results.items()}
    best = max(scores, key=lambda target: scores[target])
    policy.set_target_return(best, task)
    returns = {target: shown_number(mean) for target, (_, mean) in scores.items()}
    shown = {target: f"{scores[target][0]:.2f}/{returns[target]}" for target in scores} if solves else returns
    tried = ", ".join(f"{target:g}: {score}" for target, score in shown.items())
    say(f"{task}: target return {best:g} (validation {'success/return' if solves else 'return'} by target: {tried})")


def record(
    config: EvaluateConfig,
    policy: DecisionTransformerPolicy,
    results: Sequence[EvaluationResult],
    without: Sequence[EvaluationResult] = (),
) -> dict[str, object]:
    """What ``out=`` holds."""
    tasks = {
        r.env_id: {"target_return": policy.conditioning.of(r.env_id), **r.record()}
        | ({"without_adapter": off.record(), "difference": _difference(r, off)} if off else {})
        for r, off in zip_longest(results, without)
    }
    return {
        "policy": config.policy.path,
        "adapter": config.adapter,
        "adapters": config.adapters,
        "seed": config.eval.seed,
        "validation": config.validation,
        "mean_success_rate": _mean_success(results),
        **({"mean_success_rate_without_adapter": _mean_success(without)} if without else {}),
        "versions": versions(),
        "tasks": tasks,
    }


def _difference(adapted: EvaluationResult, plain: EvaluationResult) -> dict[str, float]:
    """What the adapter changes."""
    before = plain.metrics("")
    return {key.strip("/"): value - before[key] for key, value in adapted.metrics("").items() if key in before}


def _mean_success(results: Sequence[EvaluationResult]) -> float | None:
    """Over the tasks that report success; None where none does."""
    rates = [r.success_rate for r in results if r.reports_success]
    return sum(rates) / len(rates) if rates else None


def show(results: Sequence[EvaluationResult], without: Sequence[EvaluationResult] = ()) -> None:
    """The table at the end."""
    if without:
        console.print(comparison(results, without))
    else:
        console.print(_table(results))
    for protocol in dict.fromkeys(result.protocol for result in results):
        say(f"Protocol: {protocol}.")
    caveats = [result.caveat for result in results]
    caveats += [other_starts(*pair) for pair in zip(results, without, strict=False)]
    for caveat in dict.fromkeys(filter(None, caveats)):
        say(caveat)


def _table(results: Sequence[EvaluationResult]) -> Table:
    """One row a task, with the columns that some task fills."""
    columns = {
        "task": [result.env_id for result in results],
        "episodes": [str(len(result.episodes)) for result in results],
        "success rate": [f"{r.success_rate:.2f}" if r.reports_success else "-" for r in results],
        "95% interval": [_interval(result) if result.reports_success else "-" for result in results],
        "mean return": [described_return(result) for result in results],
        "normalised score (0-100)": [_score(result) for result in results],
    }
    mean = _mean_success(results)
    table = Table()
    kept = [name for name, cells in columns.items() if set(cells) != {"-"}]
    for name in kept:
        table.add_column(name, overflow="fold")
    for row in zip(*(columns[name] for name in kept), strict=True):
        table.add_row(*row)
    if len(results) > 1 and mean is not None:
        table.add_row("mean", "", f"{mean:.3f}")
    return table


def _interval(result: EvaluationResult) -> str:
    return "[{:.2f}, {:.2f}]".format(*result.success_interval())


def _score(result: EvaluationResult) -> str:
    score = result.metrics("").get("/normalized_score")
    return "-" if score is None else f"{score:.1f}"


def comparison(results: Sequence[EvaluationResult], without: Sequence[EvaluationResult]) -> Table:
    """With and without the adapter, and what it changes: success rates, and returns."""
    table = Table(Column("task", overflow="fold"), "success on", "off", "change", "return on", "off", "change")
    for on, off in zip(results, without, strict=True):
        success = ["-"] * 3
        if on.reports_success:
            success = _with_difference(on.success_rate, off.success_rate, ".2f")
        returns = ["not measured", "-", "-"]
        if not (on.stopped_at_success or off.stopped_at_success):
            returns = _with_difference(on.mean_reward, off.mean_reward, ".1f")
        table.add_row(on.env_id, *success, *returns)
    means = _mean_success(results), _mean_success(without)
    if len(results) > 1 and None not in means:
        table.add_row("mean", *_with_difference(*means, ".3f"), "", "", "")
    return table


def _with_difference(on: float | None, off: float | None, digits: str) -> list[str]:
    assert on is not None
    assert off is not None
    return [format(on, digits), format(off, digits), format(on - off, "+" + digits)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("evaluate", evaluate, HELP, argv)


if __name__ == "__main__":
    raise SystemExit(main())
