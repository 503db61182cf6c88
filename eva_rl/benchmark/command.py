"""``python -m eva_rl.benchmark``: tasks by methods by seeds, as independent runs that continue, and a report."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eva_rl.adapters import find_method
from eva_rl.benchmark.grid import Cell, Place, check, comparison_cells, setting_name, tuning_cells
from eva_rl.benchmark.plan import plan_table, read_pilot
from eva_rl.benchmark.study import (
    ALGO,
    ENV_STEPS,
    KEYS,
    METHOD,
    UPDATES,
    Study,
    names_of,
    read_study,
    seeds_of,
    tasks_of,
)
from eva_rl.benchmark.tuning import Chosen, choose
from eva_rl.cli.command import run_command
from eva_rl.cli.console import console, say
from eva_rl.cli.parsing import SHORT_KEYS, first_options, known_keys, register
from eva_rl.cli.run_dir import check_no_run
from eva_rl.cli.values import quoted, split_list, unquoted
from eva_rl.errors import UserError, counted
from eva_rl.files import check_folder, expanded
from eva_rl.launch.jobs import Job, LaunchOptions
from eva_rl.launch.launching import launch, list_failed
from eva_rl.options import option
from eva_rl.report import command as report
from eva_rl.report.page import terminal_table
from eva_rl.report.verdicts import CLONING_LOSS

HELP = """
Fine-tune every method on every task with every seed, and compare them: independent runs in
OUT/<task>/<method>/seed_<n>/, a small record of each in RECORDS/, and a report in OUT/report/. The same command
continues where it was interrupted: runs that have a record are skipped, also on another machine.

A study file decides beforehand on tasks, methods with settings of their own, seeds, budgets, endpoint, margin and
tuning; plan=true shows what it costs and what it can detect. Every key of python -m eva_rl.finetune can be given, with
finetune. before it. Demonstrations are collected for each seed and shared by all methods.

Examples:
  python -m eva_rl.benchmark study=study.yaml plan=true
  python -m eva_rl.benchmark study=study.yaml records=results out=runs/study
  python -m eva_rl.benchmark tasks=cw10 methods=[lora,eva,dora,eva_dora,full] seeds=5 out=runs/cw10
  python -m eva_rl.benchmark tasks=push-v3+reach-v3 methods=eva+lora seeds=[3,4] finetune.algo.updates=400
  python -m eva_rl.benchmark tasks=cw10 set=[algo=bc_then_odt,algo.env_steps=50000] jobs=8 threads=2
  python -m eva_rl.benchmark tasks=mt50 launcher=ray address=auto gpus_per_run=0.25
  python -m eva_rl.benchmark tasks=mt50 launcher=slurm partition=gpu gpus_per_run=1 hours=4
"""
OWN_KEYS = {
    "env": "tasks=", "env.id": "tasks=", "adapter": "methods=", "adapter.method": "methods=", "seed": "seeds=",
    "data.seed": "seeds=", "run_dir": "out=", "threads": "threads=", "resume": "nothing; runs always continue",
    "study": "study=", "shared": "out=", "eval.at": "budgets: in a study file",
}  # fmt: skip
"""Keys of finetune that the benchmark decides on itself, and by what."""
PASSED = "finetune."
HELD_OUT = "eval.demonstrations"
"""Key of finetune without which the cloning loss is not known."""
STUDY_FILE = "study.yaml"
GRID = ("tasks", "methods", "seeds")
"""Keys in place of which a study file can be given."""


@dataclass
class BenchmarkOptions:
    """What is compared."""

    study: str = option("", "study file (YAML), in place of tasks, methods and seeds")
    tasks: Any = option("cw10", "cw10, mt40, mt50, tasks joined by +, or a [list]")
    methods: Any = option("lora+eva+dora+eva_dora+full", "adapter methods joined by +, or a [list]")
    seeds: Any = option(5, "how many seeds, from 0 on, or a [list] of them")
    set: list[str] = field(
        default_factory=list,
        metadata={"help": "settings of every run: [algo.updates=400]; same as finetune.algo.updates=400"},
    )
    out: str = option("benchmark", "output folder; the same command resumes what it holds")
    records: str = option("", "folder of the records of finished runs, to be committed; empty for OUT/records")
    plan: bool = option(False, "only show runs, core-hours and the smallest difference that can be detected")
    pilot: str = option("", "plan: finished runs or records from which the spread over seeds is taken")


@dataclass
class BenchmarkConfig(LaunchOptions, BenchmarkOptions):
    """Config of ``python -m eva_rl.benchmark``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.grid()

    def grid(self) -> Study:
        """The study of a grid that was typed, or of the study file.

        Raises:
            UserError: A task, method or seed does not exist.
        """
        if not self.out:
            raise UserError("out= is empty: expected a folder.")
        if self.study:
            return read_study(expanded(self.study))
        methods = {name: {METHOD: name} for name in (find_method(name).name for name in names_of(self.methods))}
        if not methods:
            raise UserError("methods=[] names none. Type methods=lora+eva, say.")
        return Study(tasks_of(self.tasks), methods, seeds_of(self.seeds))

    @property
    def place(self) -> Place:
        """Where everything lies."""
        out = expanded(self.out).resolve()
        records = expanded(self.records).resolve() if self.records else out / "records"
        return Place(out, records, self.threads, self.set)


def arguments(typed: Sequence[str]) -> list[str]:
    """Overrides, with ``finetune.KEY=VALUE`` and the entries of ``set=[...]`` gathered and quoted.

    Raises:
        UserError: Both a study file and part of a grid.
    """
    check_one_source(typed)
    gathered: list[str] = []
    rest = []
    for word in typed:
        if word.startswith("set="):
            gathered += map(unquoted, split_list(word.removeprefix("set=")))
        elif word.startswith(PASSED):
            gathered.append(word.removeprefix(PASSED))
        else:
            rest.append(word)
    return [*rest, f"set=[{','.join(map(quoted, gathered))}]"] if gathered else rest


def check_one_source(typed: Sequence[str]) -> None:
    """Raise where what a study file decides on is typed beside it.

    Raises:
        UserError: Naming the keys.
    """
    values = dict(word.partition("=")[::2] for word in typed)
    both = ", ".join(f"{key}=" for key in GRID if key in values)
    if both and unquoted(values.get("study", "")):
        raise UserError(
            f"study={values['study']} comes with {both}, which the study file decides on. Change it there, or leave "
            f"{both} out."
        )


def elsewhere(key: str, text: str) -> str:
    """What to type in place of a key of finetune or of a study file."""
    if key in OWN_KEYS:
        return f"A benchmark sets that through {OWN_KEYS[key]}."
    if key in KEYS:
        return f"Write {key}: {text} in a study file, and type study=FILE."
    groups = {known.partition(".")[0] for known in known_keys("finetune", first_options("finetune"))}
    return f"Type {PASSED}{key}={text}." if key.partition(".")[0] in groups else ""


register("benchmark", BenchmarkConfig, {}, arguments, elsewhere)


def benchmark(config: BenchmarkConfig) -> None:
    """Check everything; tune; run what is not finished; report."""
    study, place = config.grid(), config.place
    check_overrides([*config.set, *_keys_of(study)])
    check_apart(config.set, study)
    check_measured(config.set, study)
    if not config.plan:
        check_folder(place.out, "out=")
        check_no_run(place.out, "out=")
        check_folder(place.records, "records=" if config.records else "out=")
    tuned = tuning_cells(study, place)
    first: Chosen = {method: study.candidates(method)[0] for method in study.methods}
    check([*tuned, *(comparison_cells(study, place, first) if not tuned else [])])
    if config.plan:
        show_plan(config, study, len(tuned), len(comparison_cells(study, place, first)))
        return
    if study.digest:
        keep_study(expanded(config.study), place.out)
    chosen = first
    if tuned:
        run_cells(tuned, config, "Tuning")
        chosen = choose(study, tuned)
        for method in study.methods:
            say(f"Tuned {method}: {setting_name(chosen[method]) or 'nothing to tune'}")
    tested = comparison_cells(study, place, chosen)
    check(tested)
    try:
        run_cells(tested, config, "Test")
    finally:
        write_report([*tuned, *tested], config, study)


def _keys_of(study: Study) -> list[str]:
    """The settings of a study, as overrides without their values, to be checked."""
    several = [study.settings, *study.methods.values(), *study.tune.values()]
    return [f"{key}=" for settings in several for key in settings if key != METHOD]


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
            raise UserError(f"{PASSED}{key}: a benchmark sets that through {OWN_KEYS[key]}.")


def check_measured(words: Sequence[str], study: Study) -> None:
    """Raise where a study is decided by what none of its runs will tell.

    Raises:
        UserError: The endpoint is the cloning loss, and there are no held-out demonstrations to measure it on.
    """
    if study.endpoint != CLONING_LOSS or any(word.startswith(f"{HELD_OUT}=") for word in words):
        return
    for name, own in study.methods.items():
        grid = study.tune.get(name, {})
        if not {**study.settings, **own, **grid}.get(HELD_OUT):
            raise UserError(
                f"endpoint: {CLONING_LOSS} is measured on held-out demonstrations, and {name} has none. Write "
                f"{HELD_OUT}: 10 under settings in the study file."
            )


def check_apart(overrides: Sequence[str], study: Study) -> None:
    """Raise where every run would get a setting that the study decides on, and that would have no effect.

    Raises:
        UserError: Naming the first.
    """
    decided = {
        **{key: f"methods: {name}" for name, own in study.methods.items() for key in own},
        **{key: "tune" for grid in study.tune.values() for key in grid},
        **dict.fromkeys(study.settings, "settings"),
        **(dict.fromkeys((ALGO, UPDATES, ENV_STEPS), "budgets, which count its steps") if study.budgets else {}),
    }
    long = {SHORT_KEYS.get(key, key): where for key, where in decided.items()}
    for key in (override.partition("=")[0] for override in overrides):
        if (where := long.get(SHORT_KEYS.get(key, key))) is not None:
            raise UserError(
                f"{PASSED}{key}: the study file decides on that ({where}). Change it there, or leave {PASSED}{key} out."
            )


def keep_study(path: Path, out: Path) -> None:
    """Keep a copy of the study file beside its runs."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, out / STUDY_FILE)


def show_plan(config: BenchmarkConfig, study: Study, tuning_runs: int, test_runs: int) -> None:
    """Print what the study costs and what it can detect."""
    table = plan_table(study, read_pilot(config.pilot, study), tuning_runs, test_runs, config.threads)
    console.print(terminal_table(table, console.width))
    say(table.note)


def run_cells(cells: Sequence[Cell], config: BenchmarkConfig, phase: str) -> None:
    """Run what has no record yet, and leave a record of each run that ends.

    Raises:
        UserError: Some runs failed.
    """
    out = config.place.out
    left = [cell for cell in cells if not cell.keep()]
    by_name = {cell.name: cell for cell in left}
    say(
        f"{phase}: {counted(len(cells), 'run')}, {len(cells) - len(left)} of them finished before. {out}",
    )

    for cell in left:
        cell.note()

    def ended(job: Job) -> None:
        by_name[job.name].keep()

    failed = launch([cell.job() for cell in left], len(cells) - len(left), config, out / "logs" / "launcher", ended)
    lost = [job for job in failed if not by_name[job.name].keep()]
    list_failed(lost)
    if lost:
        raise UserError(f"{len(lost)} of {len(cells)} runs failed. Fix the cause and rerun the command to resume.")


def write_report(cells: Sequence[Cell], config: BenchmarkConfig, study: Study) -> None:
    """Report on the records there are; runs without one are listed."""
    for cell in cells:
        cell.keep()
    several = [(cell.record, cell.divergence, cell.run_dir) for cell in cells]
    places = [place for own in several if (place := next((one for one in own if one.exists()), None))]
    if not any(cell.record.exists() for cell in cells if not cell.tuning):
        return
    options = report.ReportConfig(
        runs=[str(place) for place in places],
        out=str(config.place.out / "report"),
        title="Study" if study.digest else "Benchmark",
        endpoint=study.endpoint,
        margin=study.margin,
    )
    report.report(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("benchmark", benchmark, HELP, argv, continues=True)
