"""``python -m eva_rl.benchmark``: tasks by methods by seeds, as independent runs that continue, and a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from yaml import YAMLError

from eva_rl.adapters import find_method
from eva_rl.cli.command import run_command
from eva_rl.cli.console import console
from eva_rl.cli.loading import open_policy, resolve_policy
from eva_rl.cli.parsing import parse, register
from eva_rl.cli.run_dir import CONFIG_FILE, SUMMARY_FILE, changed_settings
from eva_rl.cli.values import quoted, split_list, unquoted
from eva_rl.configs.finetune import FinetuneConfig
from eva_rl.envs import env_spec
from eva_rl.envs.registry import task_ids
from eva_rl.errors import UserError
from eva_rl.finetune.adapter import check_adapter
from eva_rl.launch.jobs import Job, LaunchOptions
from eva_rl.launch.launching import launch, list_failed
from eva_rl.options import between, option
from eva_rl.report import command as report
from eva_rl.seeding import MAX_SEED

HELP = """
Fine-tune every method on every task with every seed, and compare them: independent runs in
OUT/<task>/<method>/seed_<n>/, and a report in OUT/report/. The same command
continues where it was interrupted: finished runs are skipped.

Every key of python -m eva_rl.finetune can be given, with finetune. before it. Demonstrations are collected for
each seed and shared by all methods.

Examples:
  python -m eva_rl.benchmark tasks=cw10 methods=[lora,eva,dora,eva_dora,full] seeds=5 out=runs/cw10
  python -m eva_rl.benchmark tasks=push-v3+reach-v3 methods=eva+lora seeds=[3,4] finetune.algo.updates=400
  python -m eva_rl.benchmark tasks=cw10 set=[algo=bc_then_odt,algo.env_steps=50000] jobs=8 threads=2
  python -m eva_rl.benchmark tasks=mt50 launcher=ray address=auto gpus_per_run=0.25
  python -m eva_rl.benchmark tasks=mt50 launcher=slurm partition=gpu gpus_per_run=1 hours=4
"""
OWN_KEYS = {
    "env": "tasks=", "env.id": "tasks=", "adapter": "methods=", "adapter.method": "methods=", "seed": "seeds=",
    "data.seed": "seeds=", "run_dir": "out=", "threads": "threads=", "resume": "nothing; runs always continue",
}  # fmt: skip
"""Keys of finetune that the benchmark decides on itself, and by what."""
PASSED = "finetune."


@dataclass
class BenchmarkConfig(LaunchOptions):
    """Config of ``python -m eva_rl.benchmark``."""

    tasks: Any = option("cw10", "cw10, mt40, mt50, tasks joined by +, or a [list]")
    methods: Any = option("lora+eva+dora+eva_dora+full", "adapter methods joined by +, or a [list]")
    seeds: Any = option(5, "how many seeds, from 0 on, or a [list] of them")
    out: str = option("benchmark", "folder for everything; continue in it by typing the same command")
    set: list[str] = field(
        default_factory=list,
        metadata={"help": "what every run gets: [algo.updates=400]; same as finetune.algo.updates=400"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.grid()

    def grid(self) -> tuple[list[str], list[str], list[int]]:
        """Canonical tasks, methods and seeds.

        Raises:
            UserError: One of them does not exist.
        """
        tasks = [task for name in _names(self.tasks) for task in task_ids(name)]
        methods = [find_method(name).name for name in _names(self.methods)]
        return list(dict.fromkeys(tasks)), list(dict.fromkeys(methods)), _seeds(self.seeds)


def _names(value: Any) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list) else str(value).split("+")


def _seeds(value: Any) -> list[int]:
    numbers: list[Any] = value if isinstance(value, list) else list(range(value)) if isinstance(value, int) else []
    if not numbers or not all(isinstance(number, int) for number in numbers):
        raise UserError(f"seeds={value}: expected a number of seeds, or a list such as seeds=[0,1,2].")
    for number in numbers:
        between(0, MAX_SEED, seeds=number)
    return list(dict.fromkeys(numbers))


def arguments(typed: Sequence[str]) -> list[str]:
    """Overrides, with ``finetune.KEY=VALUE`` and the entries of ``set=[...]`` gathered and quoted."""
    gathered: list[str] = []
    rest = []
    for word in typed:
        if word.startswith("set="):
            gathered += [unquoted(entry) for entry in split_list(word.removeprefix("set="))]
        elif word.startswith(PASSED):
            gathered.append(word.removeprefix(PASSED))
        else:
            rest.append(word)
    return [*rest, f"set=[{','.join(map(quoted, gathered))}]"] if gathered else rest


register("benchmark", BenchmarkConfig, {}, arguments)


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        task: Canonical name.
        method: Adapter method.
        seed: Of training and of demonstrations.
        config: The benchmark's.
    """

    task: str
    method: str
    seed: int
    config: BenchmarkConfig

    @property
    def name(self) -> str:
        """Where it lies, below the benchmark's folder."""
        return f"{self.task.removeprefix('metaworld/').replace('/', '-')}/{self.method}/seed_{self.seed}"

    @property
    def run_dir(self) -> Path:
        """Its run directory."""
        return Path(self.config.out).expanduser().resolve() / self.name

    @property
    def finished(self) -> bool:
        """Whether it has ended well before."""
        return (self.run_dir / SUMMARY_FILE).exists()

    @property
    def overrides(self) -> list[str]:
        """What finetune gets."""
        own = [f"env={self.task}", f"adapter={self.method}", f"seed={self.seed}", f"data.seed={self.seed}"]
        return [*own, f"threads={self.config.threads}", f"run_dir={self.run_dir}", *self.config.set]

    @cached_property
    def finetune(self) -> FinetuneConfig:
        """Its config, checked."""
        found: FinetuneConfig = parse("finetune", self.overrides)
        return found

    def job(self) -> Job:
        """What is launched."""
        log = self.run_dir.parents[2] / "logs" / f"{self.name.replace('/', '-')}.log"
        command = ("eva_rl.finetune", *self.overrides)
        return Job(self.name, command, log, self.run_dir / SUMMARY_FILE, self.config.threads)


def benchmark(config: BenchmarkConfig) -> None:
    """Check everything; run what is not finished, one seed of all methods and tasks after the other; report."""
    check_overrides(config.set)
    tasks, methods, seeds = config.grid()
    cells = [Cell(*place, config) for seed in seeds for place in product(tasks, methods, [seed])]
    check(cells)
    out = Path(config.out).expanduser().resolve()
    left = [cell for cell in cells if not cell.finished]
    console.print(
        f"{len(tasks)} tasks, {len(methods)} methods, {len(seeds)} seeds: {len(cells)} runs, "
        f"{len(cells) - len(left)} of them finished before. {out}",
        soft_wrap=True,
    )
    failed = launch([cell.job() for cell in left], len(cells) - len(left), config, out / "logs" / "launcher")
    if len(failed) < len(cells):
        finished = [str(cell.run_dir) for cell in cells if cell.run_dir.exists()]
        report.report(report.ReportConfig(runs=finished, out=str(out / "report"), title="Benchmark"))
    list_failed(failed)
    if failed:
        raise UserError(f"{len(failed)} of {len(cells)} runs failed. Fix the cause and rerun the command to resume.")


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise unless each of what the runs get is ``KEY=VALUE``, and a key that is the user's.

    Raises:
        UserError: Naming the first that is not.
    """
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise UserError(f"set=[{override}]: expected KEY=VALUE, for instance set=[algo.updates=400].")
        if key in OWN_KEYS:
            raise UserError(f"{PASSED}{key}: a benchmark decides on that by {OWN_KEYS[key]}.")


def check(cells: Sequence[Cell]) -> None:
    """Raise unless every run can start: its config, task, policy and adapter, and what was in its folder before.

    Raises:
        UserError: Naming the first run that cannot.
    """
    device = torch.device("cpu")
    for cell in cells:
        check_unchanged(cell)
        if cell.seed == cells[0].seed:
            config = cell.finetune
            spec = env_spec(config.env.id, config.env.horizon)
            policy = open_policy(resolve_policy(config.policy, spec.env_id), device, merge=True)
            policy.check_dimensions(spec.observation_dim, spec.action_dim, spec.env_id)
            check_adapter(policy, config.adapter)


def check_unchanged(cell: Cell) -> None:
    """Raise where a run was begun with other settings, so that no report mixes two benchmarks.

    Raises:
        UserError: Naming the settings.
    """
    path = cell.run_dir / CONFIG_FILE
    if not path.exists() or not (cell.finished or (cell.run_dir / "checkpoint").exists()):
        return
    try:
        changed = changed_settings(cell.run_dir, asdict(cell.finetune))
    except (OSError, ValueError, YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}. Remove the folder and rerun the same command.") from error
    if changed:
        raise UserError(
            f"{cell.run_dir} was made with other settings of {', '.join(changed)}. Use the same settings to continue, "
            "or name another out=."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("benchmark", benchmark, HELP, argv)
