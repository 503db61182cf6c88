"""The study file: tasks, methods, seeds, budgets, endpoint, margin and tuning, decided before anything is run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from eva_rl.adapters import find_method
from eva_rl.envs.registry import task_ids
from eva_rl.errors import UnknownNameError, UserError
from eva_rl.options import between
from eva_rl.report.reading import is_number, read_yaml
from eva_rl.report.verdicts import ENDPOINTS, FINAL
from eva_rl.seeding import MAX_SEED

Overrides = Mapping[str, Any]
METHOD, TUNE = "adapter", "tune"
"""Keys of a method that are no settings of a run: which adapter it is, and a tuning grid of its own."""
ALGO, CLONING = "algo", "bc"
UPDATES, ENV_STEPS = "algo.updates", "algo.env_steps"
"""What budgets count: of cloning, and of the online algorithms."""


@dataclass(frozen=True)
class Study:
    """What is compared, and how.

    Attributes:
        tasks: Canonical names, of the test phase.
        methods: By the name that tables show: settings of its own, ``adapter`` among them.
        seeds: Of the test phase.
        settings: What every run gets.
        budgets: Gradient steps, or env steps of an online algorithm, after which success is measured within a run; the
            last one ends it.
        endpoint: What is compared; a key of :data:`eva_rl.report.verdicts.ENDPOINTS`.
        margin: Difference below which methods count as equivalent, in the endpoint's unit; None tests none.
        reference: Method that each other one is compared with; empty compares each pair.
        tune: By method: the values to choose from, by key.
        tuning_tasks: Canonical names; none of them is a test task.
        tuning_seeds: None of them is a test seed.
        digest: SHA-256 of the file; empty where there is none.
    """

    tasks: Sequence[str]
    methods: Mapping[str, Overrides]
    seeds: Sequence[int]
    settings: Overrides = field(default_factory=dict)
    budgets: Sequence[int] = ()
    endpoint: str = FINAL
    margin: float | None = None
    reference: str = ""
    tune: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    tuning_tasks: Sequence[str] = ()
    tuning_seeds: Sequence[int] = ()
    digest: str = ""

    def candidates(self, method: str) -> list[dict[str, Any]]:
        """The settings that a method is tuned over, in the order of the file; one empty entry where it is not tuned."""
        grid = self.tune.get(method, {})
        return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]

    def budgeted(self, method: str) -> dict[str, Any]:
        """What the budgets say to a run: how long it is, and where success is measured."""
        if not self.budgets:
            return {}
        algo = self.methods[method].get(ALGO, self.settings.get(ALGO, CLONING))
        return {UPDATES if algo == CLONING else ENV_STEPS: self.budgets[-1], "eval.at": list(self.budgets)}


KEYS = tuple(f.name for f in fields(Study) if f.name != "digest")


def read_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        UserError: It cannot be read; a key, task, method or endpoint does not exist; or tuning and test overlap.
    """
    raw = read_yaml(path)
    for key in raw:
        if key not in KEYS:
            raise UnknownNameError("key", key, KEYS, f"in {path}.")
    missing = [key for key in ("tasks", "methods", "seeds") if not raw.get(key)]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}.")
    methods = _methods(raw["methods"])
    study = Study(
        tasks=tasks_of(raw["tasks"]),
        methods={name: {k: v for k, v in own.items() if k != TUNE} for name, own in methods.items()},
        seeds=seeds_of(raw["seeds"]),
        settings=_without_method(_settings(raw.get("settings") or {}, "settings"), "settings"),
        budgets=_budgets(raw.get("budgets") or []),
        endpoint=_endpoint(raw.get("endpoint", FINAL)),
        margin=_margin(raw.get("margin")),
        reference=str(raw.get("reference") or ""),
        tune=_grids(raw.get(TUNE) or {}, methods),
        tuning_tasks=tasks_of(raw.get("tuning_tasks") or []),
        tuning_seeds=seeds_of(raw["tuning_seeds"], "tuning_seeds") if raw.get("tuning_seeds") else [],
        digest=hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    check_study(study)
    return study


def check_study(study: Study) -> None:
    """Raise unless tuning and test are apart, and what is to be measured is measured.

    Raises:
        UserError: Naming what overlaps or is missing.
    """
    if study.endpoint not in ENDPOINTS:
        raise UnknownNameError("endpoint", str(study.endpoint), ENDPOINTS)
    if study.reference and study.reference not in study.methods:
        raise UnknownNameError("reference", study.reference, study.methods)
    if study.endpoint in {"area", "updates_to_90"} and len(study.budgets) < 2:
        raise UserError(f"endpoint: {study.endpoint} needs budgets, such as budgets: [10, 20, 40, 80].")
    if any(study.tune.values()) and not (study.tuning_tasks and study.tuning_seeds):
        raise UserError("tune: needs tuning_tasks and tuning_seeds, which the test phase does not use.")
    for name in ("tasks", "seeds"):
        both = sorted(set(getattr(study, name)) & set(getattr(study, f"tuning_{name}")))
        if both:
            raise UserError(
                f"tuning_{name} and {name} share {', '.join(map(str, both))}: what is tuned on cannot be tested on. "
                "Use others for tuning."
            )
    if study.budgets:
        check_budgets(study)


def check_budgets(study: Study) -> None:
    """Raise where something else says how long runs are, too.

    Raises:
        UserError: Naming the key, and where it stands.
    """
    named = [("settings", study.settings), *((f"methods: {name}", own) for name, own in study.methods.items())]
    for where, settings in [*named, *((f"tune of {name}", grid) for name, grid in study.tune.items())]:
        for key in (UPDATES, ENV_STEPS):
            if settings.get(key, study.budgets[-1]) != study.budgets[-1]:
                raise UserError(f"budgets end at {study.budgets[-1]}, and {where} says {key}. Leave {key} out.")


def tasks_of(value: Any) -> list[str]:
    """Canonical tasks of a name, names joined by +, or a list of them."""
    return list(dict.fromkeys(task for name in names_of(value) for task in task_ids(name)))


def names_of(value: Any) -> list[str]:
    """Entries of a list, or of names joined by + or commas; options of a task may hold commas themselves."""
    if isinstance(value, list):
        return [str(name) for name in value]
    text = str(value)
    return text.split("+") if "?" in text else [name.strip() for name in re.split(r"[+,]", text)]


def seeds_of(value: Any, name: str = "seeds") -> list[int]:
    """Seeds of a number of them, or of a list.

    Raises:
        UserError: It is neither, or one is out of range.
    """
    listed: list[Any] = value if isinstance(value, list) else list(range(value)) if isinstance(value, int) else []
    if not listed or not all(isinstance(number, int) and not isinstance(number, bool) for number in listed):
        raise UserError(f"{name}={value}: expected a number of seeds, or a list such as {name}=[0,1,2].")
    for number in listed:
        between(0, MAX_SEED, **{name: number})
    return list(dict.fromkeys(listed))


def _methods(raw: Any) -> dict[str, dict[str, Any]]:
    """Settings by name; a list names adapters without settings of their own."""
    listed = {str(name): {} for name in raw} if isinstance(raw, list) else raw
    if not isinstance(listed, Mapping):
        raise UserError(f"methods: {raw}: expected a list of adapters, or a mapping of names to settings.")
    found = {}
    for name, own in listed.items():
        settings = _settings(own or {}, f"methods: {name}", (TUNE,))
        settings[METHOD] = find_method(str(settings.get(METHOD, name))).name
        if not str(name).replace("_", "").replace("-", "").replace(".", "").isalnum():
            raise UserError(f"methods: {name}: expected letters, digits, -, _ and . in the name, which names folders.")
        found[str(name)] = settings
    return found


def _settings(raw: Any, where: str, groups: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: {raw}: expected KEY: VALUE, for instance algo.learning_rate: 0.005.")
    for key, value in raw.items():
        if isinstance(value, Mapping) and key not in groups:
            raise UserError(
                f"{where}: {key}: write the whole key, for instance {key}.{next(iter(value), 'KEY')}: VALUE."
            )
    return {str(key): value for key, value in raw.items()}


def _without_method(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """The same; the adapter of a run is its method's alone."""
    for key in (METHOD, "adapter.method"):
        if key in settings:
            raise UserError(f"{where}: {key}: methods: decides on that. Write methods: NAME: {{adapter: ...}}.")
    return settings


def _grids(shared: Any, methods: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """The tuning grid of each method: its own, or the common one without the keys that it sets itself."""
    found, common = {}, _without_method(_settings(shared, TUNE), TUNE)
    for name, own in methods.items():
        grid = _settings(own.get(TUNE, {k: v for k, v in common.items() if k not in own}), TUNE)
        grid = _without_method(grid, TUNE)
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                raise UserError(f"tune: {key}: {values}: expected a list of values, such as [0.001, 0.003].")
        found[name] = grid
    return found


def _budgets(raw: Any) -> list[int]:
    if not isinstance(raw, list) or not all(isinstance(n, int) and n > 0 for n in raw) or raw != sorted(set(raw)):
        raise UserError(f"budgets: {raw}: expected increasing numbers of steps, such as [10, 20, 40, 80].")
    return raw


def _endpoint(raw: Any) -> str:
    if not isinstance(raw, str):
        raise UserError(f"endpoint: {raw}: expected one of {', '.join(ENDPOINTS)}.")
    return raw


def _margin(raw: Any) -> float | None:
    if raw is not None and not (is_number(raw) and raw > 0):
        raise UserError(f"margin: {raw}: expected a number above 0, in the unit of the endpoint.")
    return None if raw is None else float(raw)
