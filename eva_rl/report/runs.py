"""Read the runs of a report; every run that does not count is listed with its reason."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eva_rl.cli.run_dir import ABOUT_FILE, CONFIG_FILE, SUMMARY_FILE, VERSIONS_FILE
from eva_rl.errors import UserError, counted
from eva_rl.files import check_files, check_seal
from eva_rl.report.reading import (
    DIVERGED,
    RECORD,
    Row,
    as_typed,
    clean_summary,
    episodes_by_seed,
    is_number,
    one_line,
    read_json_object,
    read_rows,
    read_yaml,
    recorded_goal,
)
from eva_rl.report.settings import ADAPTER, Decision, Settings, settings_of
from eva_rl.tracking.tracker import METRICS_FILE
from eva_rl.training.failures import NOT_FINITE_FILE

EVALUATION_FILE = "evaluation.json"
ONLINE = "algo.env_steps"
"""A setting that only runs have which act in the environment."""
READ_IN_PART = (METRICS_FILE, EVALUATION_FILE, VERSIONS_FILE)
"""Files without which, or with other numbers in which, a run still counts."""
FORMAT, DIGEST = 1, "sha256"
"""Of records: the number of their format, and the key of their checksum."""
RETURN = "mean_reward"
SCORES = {"success_rate": "success rate", "normalized_score": "normalised score", RETURN: "return"}
"""What a task is judged by: the first of these that its runs have."""


@dataclass(frozen=True)
class Run:
    """A finished fine-tuning run.

    Attributes:
        folder: Its run directory, its record, or the file of its learning curve.
        task: Canonical name.
        method: The adapter method, or the name that a study gives to a method with settings of its own.
        seed: Of the training.
        settings: What else decides its result, by dotted key; without keys that its method ignores.
        summary: ``summary.json``: finite numbers, and names on one line.
        goals: Held-out episodes by their seed; empty where they cannot be read.
        rows: Of ``metrics.jsonl``.
        versions: Of the libraries, and the machine.
        study: SHA-256 of the study file that it belongs to; empty for none.
        tuning: The settings that were tried, of a run of a tuning phase; None for a run that is compared.
        decided: What its study file decided on; None for no study, or where the run does not say.
        evaluates: Whether it was to be evaluated on held-out episodes while it learned (``eval.at``).
        counts_env_steps: Whether the steps of its rows are env steps, but for those of cloning.
    """

    folder: Path
    task: str
    method: str
    seed: int
    settings: Settings
    summary: Mapping[str, Any]
    goals: Mapping[int, Mapping[str, float]]
    rows: Sequence[Row]
    versions: Mapping[str, str] = field(default_factory=dict)
    study: str = ""
    tuning: Mapping[str, Any] | None = None
    decided: Decision | None = None
    evaluates: bool = False
    counts_env_steps: bool = False

    @property
    def place(self) -> str:
        """Where it lies, for people."""
        return one_line(self.folder)

    @property
    def data_hash(self) -> str:
        """Of its demonstrations; empty where there were none."""
        return str((self.summary.get("data") or {}).get("hash") or "")


@dataclass(frozen=True)
class Problem:
    """A run that does not count, or counts in part.

    Attributes:
        folder: Its run directory.
        kind: unfinished, damaged, diverged, left out, or in part.
        reason: In one sentence.
        run: Of a run that diverged: its task, method, seed and tuned settings, without any result.
    """

    folder: Path
    kind: str
    reason: str
    run: Run | None = None

    @property
    def place(self) -> str:
        """Where it lies, for people."""
        return one_line(self.folder)


class UnfinishedError(Exception):
    """The run has no summary yet."""


class PretrainingError(Exception):
    """The run made a policy; it compares no method."""


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[Problem]]:
    """Read all that can be read, and say what cannot."""
    runs: list[Run] = []
    problems: list[Problem] = []
    for folder in folders:
        try:
            if _has_diverged(folder):
                problems.append(read_divergence(folder))
                continue
            run, partly = read_run(folder)
            _check_noted(run)
        except UnfinishedError as error:
            problems.append(Problem(folder, "unfinished", one_line(error)))
        except PretrainingError:
            problems.append(Problem(folder, "left out", "a pretraining run, which has no method to compare"))
        except UserError as error:
            problems.append(Problem(folder, "damaged", " ".join(str(error).split())))
        else:
            runs.append(run)
            problems += partly
    return select(runs, problems)


def select(runs: Sequence[Run], problems: Sequence[Problem]) -> tuple[list[Run], list[Problem]]:
    """Leave out copies, and runs without the score that the other runs of their task are judged by."""
    return _without_scoreless(*_without_duplicates(*_without_recorded(runs, problems)))


def read_run(folder: Path) -> tuple[Run, list[Problem]]:
    """Read a run directory, or the record of a run.

    Raises:
        UnfinishedError: It has no summary.
        PretrainingError: It is no fine-tuning run.
        UserError: It is damaged.
    """
    if folder.is_file():
        return read_record(folder), []
    config = _config(folder)
    rows, damaged_rows = _rows(folder)
    path = folder / SUMMARY_FILE
    if not path.exists():
        last = int(rows[-1]["step"]) if rows else 0
        raise UnfinishedError(f"no {SUMMARY_FILE}; {counted(len(rows), 'point')} recorded, the last at step {last}")
    raw = read_json_object(path)
    summary = clean_summary(raw, path)
    check_seal(raw, path)
    check_files(raw, folder, [CONFIG_FILE], path)
    goals, damaged_goals = _goals(folder, summary["env"])
    run = _of_study(make_run(folder, config, summary, goals, rows, _versions(folder)))
    reasons = [reason for reason in (damaged_rows, damaged_goals) if reason]
    reasons += _changed(raw, folder, [name for name in READ_IN_PART if name not in " ".join(reasons)])
    return run, [Problem(folder, "in part", reason) for reason in reasons]


def _config(folder: Path) -> dict[str, Any]:
    """Of a fine-tuning run."""
    config = read_config(folder / CONFIG_FILE)
    if "size" in config and "adapter" not in config:
        raise PretrainingError
    return config


def _of_study(run: Run) -> Run:
    """A run with the method and the tuned settings that the benchmark which made it noted in its run directory."""
    path = run.folder / ABOUT_FILE
    if not path.exists():
        return run
    try:
        return _named(run, read_json_object(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} names no method of a study ({error}). Remove it to read the run by itself.") from error


def _check_noted(run: Run) -> None:
    """Raise for a run of a study whose benchmark was killed before it noted what it is: it may be a tuning run."""
    if run.study and run.folder.is_dir() and not (run.folder / ABOUT_FILE).exists():
        raise UnfinishedError(f"of a study, without {ABOUT_FILE}; type the study's command once more")


def _named(run: Run, about: Mapping[str, Any]) -> Run:
    """A run with the method and the tuned settings that its study says."""
    tuning = None if about["tuning"] is None else {one_line(k): as_typed(v) for k, v in about["tuning"].items()}
    method, adapter = one_line(about["method"]), run.summary.get("method")
    own = () if adapter in {None, method} else ((ADAPTER, json.dumps(adapter)),)
    decided = Decision.of(about) if "endpoint" in about else None
    settings = tuple(sorted((*run.settings, *own)))
    return replace(run, method=method, tuning=tuning, settings=settings, decided=decided)


def decision(runs: Iterable[Run]) -> Decision | None:
    """What all runs' studies decided on; None where there is none, or several."""
    found = {run.decided for run in runs}
    return found.pop() if len(found) == 1 else None


def _changed(raw: Mapping[str, Any], folder: Path, names: Sequence[str]) -> list[str]:
    """Which files are not those that the run ended with: their numbers count, and whoever reads the report knows."""
    reasons = []
    for name in names:
        try:
            check_files(raw, folder, [name], folder / SUMMARY_FILE)
        except (UserError, OSError):
            reasons.append(f"{name} was changed or lost after the run ended")
    return reasons


def make_run(
    place: Path,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    goals: Mapping[int, Mapping[str, float]],
    rows: Sequence[Row],
    versions: Mapping[str, str],
) -> Run:
    """A run from its parts."""
    settings = settings_of(config, summary)
    study = str(config.get("study") or "")
    names = summary["env"], summary["method"], summary["seed"]
    found = Run(place, *names, settings, summary, goals, rows, versions, study)
    evaluates = bool((config.get("eval") or {}).get("at"))
    return replace(found, evaluates=evaluates, counts_env_steps=ONLINE in dict(settings))


def digest(body: Mapping[str, Any]) -> str:
    """SHA-256 of a record's parts."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=True).encode()).hexdigest()


def read_record(path: Path) -> Run:
    """Read the record of a run.

    Raises:
        UserError: It is damaged, was changed, or is of another format.
    """
    record = read_json_object(path)
    if record.get(RECORD) != FORMAT:
        raise UserError(f"{path}: {RECORD}={one_line(record.get(RECORD))}, expected {FORMAT}.")
    body = {key: value for key, value in record.items() if key not in {RECORD, "name", DIGEST}}
    if record.get(DIGEST) != digest(body):
        raise UserError(f"{path} was changed: its {DIGEST} differs. Restore it, or remove it and run again.")
    try:
        return _run(path, body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not the record of a run: {type(error).__name__} {error}.") from error


def _run(path: Path, body: Mapping[str, Any]) -> Run:
    summary = clean_summary(body["summary"], path)
    episodes = body["episodes"]
    lists = (episodes["seed"], episodes["success"], episodes["episode_return"])
    goals = {int(seed): recorded_goal(success, total) for seed, success, total in zip(*lists, strict=True)}
    rows = [{key: float(value) for key, value in row.items() if is_number(value)} for row in body["curve"]]
    sound = [row for row in rows if {"step", "wall_time"} <= row.keys()]
    return _named(make_run(path, body["config"], summary, goals, sound, body["versions"]), body["about"])


def _has_diverged(place: Path) -> bool:
    """Whether it is what is kept of a tuning run that diverged, or the directory of a run that did and did not end."""
    without_result = (place / NOT_FINITE_FILE).exists() and not (place / SUMMARY_FILE).exists()
    return without_result if place.is_dir() else place.suffix == DIVERGED


def _left_behind(folder: Path) -> dict[str, Any]:
    """Which run a folder is of, and why it ended."""
    config, about = _config(folder), folder / ABOUT_FILE
    named = read_json_object(about) if about.exists() else {"method": config["adapter"]["method"], "tuning": None}
    return {**named, **read_json_object(folder / NOT_FINITE_FILE), "task": config["env"]["id"], "seed": config["seed"]}


def read_divergence(path: Path) -> Problem:
    """Read what is kept of a run that diverged.

    Raises:
        PretrainingError: It is no fine-tuning run.
        UserError: It is damaged, or of a version that did not say which run it was.
    """
    found = _left_behind(path) if path.is_dir() else read_json_object(path)
    try:
        task, seed = one_line(found["task"]), int(str(found["seed"]))
        run = _named(Run(path, task, "", seed, (), {}, {}, ()), found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} does not say which run diverged: {type(error).__name__} {error}. "
            "Type the study's command once more."
        ) from error
    return Problem(path, "diverged", one_line(found.get("reason")), run)


def read_config(path: Path) -> dict[str, Any]:
    """Read ``config.yaml`` of a run; interpolations stay text.

    Raises:
        UserError: It cannot be read, or is no config of a run.
    """
    config = read_yaml(path)
    if not isinstance(config.get("env"), dict):
        raise UserError(f"{path} is not the config of a run.")
    return config


def _rows(folder: Path) -> tuple[list[Row], str]:
    """The rows that can be read, and what is wrong with the rest."""
    path = folder / METRICS_FILE
    if not path.exists():
        return [], f"no {METRICS_FILE}; no learning curve"
    try:
        rows, damaged = read_rows(path)
    except UserError as error:
        return [], f"no learning curve: {' '.join(str(error).split())}"
    if not rows:
        return [], f"{METRICS_FILE} has no sound line; no learning curve"
    return rows, f"{METRICS_FILE}: {damaged} damaged line{'s' * (damaged > 1)} ignored" if damaged else ""


def _goals(folder: Path, task: str) -> tuple[dict[int, Row], str]:
    """Held-out episodes by seed, and what is wrong with them."""
    try:
        return episodes_by_seed(read_json_object(folder / EVALUATION_FILE), task), ""
    except (UserError, ValueError) as error:
        return {}, f"{EVALUATION_FILE} is damaged or missing; in no test over goals ({one_line(error)})"


def _versions(folder: Path) -> dict[str, str]:
    try:
        found = read_json_object(folder / VERSIONS_FILE)
    except UserError:  # written since 0.1.0; a run without it counts
        return {}
    return {str(key): one_line(value) for key, value in found.items() if isinstance(value, str)}


def _without_recorded(runs: Sequence[Run], problems: Sequence[Problem]) -> tuple[list[Run], list[Problem]]:
    """Leave out the run directory of a run whose record was found as well, and what is said of it: it counts once."""
    recorded = {_identity(run) for run in runs if run.folder.is_file()}
    twice = {run.folder for run in runs if not run.folder.is_file() and _identity(run) in recorded}
    return [run for run in runs if run.folder not in twice], [p for p in problems if p.folder not in twice]


def _identity(run: Run) -> tuple[Any, ...]:
    """What the record of a run has in common with its run directory, and no two runs have: seconds are in a summary."""
    settings = [setting for setting in run.settings if setting[0] != ADAPTER]  # where a study gives it another name
    return run.task, run.seed, tuple(settings), json.dumps(run.summary, sort_keys=True)


def _without_duplicates(runs: Sequence[Run], problems: list[Problem]) -> tuple[list[Run], list[Problem]]:
    """Of runs with one seed, task, method, settings and data, the first: a copy is no further evidence."""
    kept: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        key = (run.task, run.method, run.seed, run.settings, run.data_hash, run.tuning is None)
        if key in kept:
            problems.append(Problem(run.folder, "left out", f"the same seed, settings and data as {kept[key].place}"))
        kept.setdefault(key, run)
    return list(kept.values()), problems


def _without_scoreless(runs: Sequence[Run], problems: list[Problem]) -> tuple[list[Run], list[Problem]]:
    keys = score_keys(runs)
    missing = [run for run in runs if not has_score(run, keys[run.task])]
    problems += [Problem(run.folder, "damaged", f"no eval/{keys[run.task]}, which others have") for run in missing]
    return [run for run in runs if run not in missing], problems


def score_keys(runs: Sequence[Run]) -> dict[str, str]:
    """By task, the score that it is judged by: the first that at least half of its runs have."""
    by_task: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_task[run.task].append(run)
    return {task: next(key for key in SCORES if _half(own, key)) for task, own in by_task.items()}


def _half(runs: Sequence[Run], key: str) -> bool:
    return 2 * sum(has_score(run, key) for run in runs) >= len(runs)


def has_score(run: Run, key: str) -> bool:
    """Whether a run has a finite score of this kind."""
    return is_number(run.summary.get(f"eval/{key}"))
