"""The runs of a study: their settings, where they lie, and whether they are done."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from yaml import YAMLError

from eva_rl.adapters import AdaptedPolicy
from eva_rl.benchmark.records import write_record
from eva_rl.benchmark.study import METHOD, Study
from eva_rl.cli.loading import EXPERT, NONE, open_policy, resolve_policy, unused_for_files
from eva_rl.cli.parsing import parse
from eva_rl.cli.run_dir import ABOUT_FILE, CONFIG_FILE, SUMMARY_FILE, changed_from, changed_settings
from eva_rl.cli.values import INTERPOLATION, as_word
from eva_rl.configs.finetune import FinetuneConfig
from eva_rl.envs import env_spec
from eva_rl.errors import UserError
from eva_rl.files import write_json
from eva_rl.finetune import command as _finetune  # noqa: F401 - registers its keys
from eva_rl.finetune.adapter import check_adapter
from eva_rl.finetune.session import check_demonstrations, data_source
from eva_rl.launch.jobs import Job, check_names
from eva_rl.report.reading import DIVERGED, one_line, read_json_object
from eva_rl.report.runs import Run, read_config, read_record
from eva_rl.training.failures import NOT_FINITE_FILE

QUICKER = "eval.stop_at_success=true"
"""What every run of a benchmark gets unless it says otherwise: the same success rate for fewer env steps."""


@dataclass(frozen=True)
class Place:
    """Where the runs of a benchmark lie, and what all of them get.

    Attributes:
        out: Folder of run directories, logs and the report.
        records: Folder of the records.
        threads: CPU threads of a run.
        overrides: ``KEY=VALUE`` for every run.
    """

    out: Path
    records: Path
    threads: int
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        study: The study.
        place: Where it lies.
        task: Canonical name.
        method: Its name in the study.
        seed: Of training and of demonstrations.
        chosen: Settings that are tuned, or were chosen by tuning.
        tuning: Whether it belongs to the tuning phase.
    """

    study: Study
    place: Place
    task: str
    method: str
    seed: int
    chosen: Mapping[str, Any]
    tuning: bool = False

    @property
    def name(self) -> str:
        """Where it lies, below the folder of the study."""
        task = self.task.removeprefix("metaworld/").replace("/", "-")
        setting = f"/{setting_name(self.chosen)}" if self.tuning else ""
        return f"{'tuning/' if self.tuning else ''}{task}/{self.method}{setting}/seed_{self.seed}"

    @property
    def run_dir(self) -> Path:
        """Its run directory."""
        return self.place.out / self.name

    @property
    def record(self) -> Path:
        """Its record."""
        return self.place.records / f"{self.name}.json"

    @property
    def log(self) -> Path:
        """What it says."""
        return self.place.out / "logs" / f"{self.name.replace('/', '-')}.log"

    @property
    def about(self) -> dict[str, Any]:
        """Its method by the name that the study gives it, and the settings that are tried, if it is a tuning run.

        With what the study file decided to compare by.
        """
        study = self.study
        named: dict[str, Any] = {"method": self.method, "tuning": dict(self.chosen) if self.tuning else None}
        if study.digest:
            named |= {"endpoint": study.endpoint, "margin": study.margin, "reference": study.reference}
        return named

    @property
    def divergence(self) -> Path:
        """What is kept in place of a record where a loss was not finite, which counts as an answer while tuning."""
        return self.record.with_suffix(DIVERGED)

    @property
    def overrides(self) -> list[str]:
        """What finetune gets, from the general to the particular."""
        study = self.study
        own = {key: value for key, value in study.methods[self.method].items() if key != METHOD}
        settings = {**study.settings, **study.budgeted(self.method), **own, **self.chosen}
        first = [f"env={self.task}", f"adapter={study.methods[self.method][METHOD]}", QUICKER]
        named = [f"seed={self.seed}", f"data.seed={self.seed}", f"threads={self.place.threads}"]
        named.append(f"shared={as_word(self.place.out / 'shared')}")
        if study.digest:
            named.append(f"study={study.digest}")
        named.append(f"run_dir={as_word(self.run_dir)}")
        return [*first, *named, *self.place.overrides, *map(override, settings.items())]

    @cached_property
    def finetune(self) -> FinetuneConfig:
        """Its config, checked."""
        found: FinetuneConfig = parse("finetune", self.overrides)
        return found

    def note(self) -> None:
        """Write down which run of the study its run directory is of; a run may end after the benchmark was killed."""
        if not (self.run_dir / ABOUT_FILE).exists():
            write_json(self.run_dir / ABOUT_FILE, self.about)

    def job(self) -> Job:
        """What is launched."""
        command = ("eva_rl.finetune", *self.overrides)
        threads = self.finetune.threads or self.place.threads
        return Job(self.name, command, self.log, self.run_dir / SUMMARY_FILE, threads)

    def keep(self) -> bool:
        """Write the record of a run that has finished, or that diverged while tuning; whether there is one now."""
        finished = (self.run_dir / SUMMARY_FILE).exists()
        if finished:
            self.note()
        if self.record.exists() or self._keep_divergence():
            return True
        if finished:
            write_record(self.record, self.run_dir, self.name, self.about)
            return True
        return False

    def _keep_divergence(self) -> bool:
        """Write down that a tuning run diverged, by what it left; whether it did."""
        left = self.divergence if self.divergence.exists() else self.run_dir / NOT_FINITE_FILE
        if not self.tuning or not left.exists():
            return False
        found = read_json_object(left)
        if "method" not in found:  # the run's own, or an earlier version's
            what = {"name": self.name, "reason": one_line(found.get("reason")), "task": self.task, "seed": self.seed}
            write_json(self.divergence, what | self.about)
        return True

    def result(self) -> Run | None:
        """Its record; None where it diverged."""
        return read_record(self.record) if self.record.exists() else None


def override(setting: tuple[str, Any]) -> str:
    """``KEY=VALUE`` as the command line takes it; ``${other.key}`` stands for that key's value, as it does there."""
    key, value = setting
    return f"{key}={value if isinstance(value, str) and INTERPOLATION in value else as_word(value)}"


def setting_name(chosen: Mapping[str, Any]) -> str:
    """A name for folders and figures: ``learning_rate=0.001``."""
    return ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in chosen.items()).replace("/", "-")


def tuning_cells(study: Study, place: Place) -> list[Cell]:
    """The runs of the tuning phase: of every method that has more than one setting."""
    several = {name: found for name in study.methods if len(found := study.candidates(name)) > 1}
    return [
        Cell(study, place, task, method, seed, chosen, tuning=True)
        for seed in study.tuning_seeds
        for task, method in product(study.tuning_tasks, several)
        for chosen in several[method]
    ]


def comparison_cells(study: Study, place: Place, chosen: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
    """The runs of the test phase, one seed of all methods and tasks after the other."""
    places = [(task, method, seed) for seed in study.seeds for task, method in product(study.tasks, study.methods)]
    return [Cell(study, place, task, method, seed, chosen[method]) for task, method, seed in places]


def check(cells: Sequence[Cell]) -> None:
    """Raise unless every run can start: its config, task, policy, adapter and expert, and its output folder.

    Raises:
        UserError: Naming the first run that cannot.
    """
    check_names([cell.name for cell in cells])
    checked, policies = set(), dict[str, AdaptedPolicy]()
    for cell in cells:
        check_unchanged(cell)
        key = (cell.task, cell.method, setting_name(cell.chosen))
        if key not in checked:
            checked.add(key)
            config = cell.finetune
            spec = env_spec(config.env.id, config.env.horizon)
            named = resolve_policy(config.policy, spec.env_id)
            if str(named) not in policies:
                policies[str(named)] = open_policy(named, torch.device("cpu"), merge=True)
            policy = policies[str(named)]
            policy.check_dimensions(spec.observation_dim, spec.action_dim, spec.env_id)
            policy.check_action_bounds(spec.action_low, spec.action_high, spec.env_id)
            check_adapter(policy, config.adapter)
            check_demonstrations(config, spec)
            check_seeds_differ(config)


def check_seeds_differ(config: FinetuneConfig) -> None:
    """Raise where all seeds would get the same demonstrations though the study says how many each is to have.

    Raises:
        UserError: Saying what to write.
    """
    options = replace(config.data, source=data_source(config))
    if options.source.partition(":")[0] not in {EXPERT, NONE} and (unused := unused_for_files(options)):
        raise UserError(f"All seeds would have the same demonstrations: {unused}")


def check_unchanged(cell: Cell) -> None:
    """Raise where a run was made with other settings, so that no report mixes two studies.

    Raises:
        UserError: Naming the settings.
    """
    changed: Iterable[str] = ()
    where = cell.record
    if cell.record.exists():
        read_record(cell.record)
        changed = _changed_record(cell)
    elif (cell.run_dir / CONFIG_FILE).exists() and (
        (cell.run_dir / SUMMARY_FILE).exists() or (cell.run_dir / "checkpoint").exists()
    ):
        changed, where = _changed_run(cell), cell.run_dir
    if "study" in changed:
        raise UserError(
            f"{where} was made when the study file was another one. Restore the file that was decided on, or begin a "
            "new study with another out=."
        )
    if changed:
        raise UserError(
            f"{where} was created with other settings of {', '.join(changed)}. Use the same settings to continue, "
            "or name another out=."
        )


def _changed_run(cell: Cell) -> Iterable[str]:
    try:
        read_config(cell.run_dir / CONFIG_FILE)
        return changed_settings(cell.run_dir, cell.finetune)
    except (OSError, ValueError, YAMLError) as error:
        raise UserError(f"{cell.run_dir} cannot be read: {error}. Remove it and rerun the same command.") from error


def _changed_record(cell: Cell) -> Iterable[str]:
    return changed_from(json.loads(cell.record.read_text())["config"], cell.finetune)
