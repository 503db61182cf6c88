"""Find and read the runs of a report; every run that does not count is listed with its reason."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from eva_rl.adapters import METHODS
from eva_rl.cli.run_dir import CONFIG_FILE, FREE_TO_CHANGE, SUMMARY_FILE
from eva_rl.errors import UserError
from eva_rl.files import read_json
from eva_rl.tracking.tracker import METRICS_FILE, Row, read_metrics

EVALUATION_FILE = "evaluation.json"
NEEDED = ("env", "method", "seed", "eval/mean_reward")
NO_SETTINGS = FREE_TO_CHANGE | {"seed", "env.id", "adapter.method", "data.source", "data.seed", "data.workers"}
"""Keys that name a run or change no result; the rest tells methods apart."""
NO_SETTINGS |= {"eval.every", "eval.quick_episodes", "algo.eval_every", "algo.checkpoint_every"}
NO_SETTINGS |= {"algo.accumulate", "algo.compile", "algo.workers", "algo.replay_on_disk"}
EVA_KEYS = ("adapter.rho", "adapter.tau", "adapter.center", "adapter.score", "adapter.variant")

Settings = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Run:
    """A finished fine-tuning run.

    Attributes:
        folder: Its run directory.
        task: Canonical name.
        method: The adapter method.
        seed: Of the training.
        settings: What else decides its result, by dotted key; without keys that its method ignores.
        summary: ``summary.json``.
        goals: Held-out episodes by their seed; empty where they cannot be read.
        rows: Of ``metrics.jsonl``.
    """

    folder: Path
    task: str
    method: str
    seed: int
    settings: Settings
    summary: Mapping[str, Any]
    goals: Mapping[int, Mapping[str, Any]]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Problem:
    """A run that does not count, or counts in part.

    Attributes:
        folder: Its run directory.
        kind: unfinished, damaged, left out, or in part.
        reason: In one sentence.
    """

    folder: Path
    kind: str
    reason: str


class UnfinishedError(Exception):
    """The run has no summary yet."""


def find_runs(places: Sequence[str]) -> list[Path]:
    """Run directories at or below some folders.

    Args:
        places: Run directories, folders that hold some (however deep), or patterns such as ``runs/*``.

    Raises:
        UserError: One of them does not exist, or there is no run in any.
    """
    folders: dict[Path, Path] = {}
    for place in places:
        matches = sorted(map(Path, glob.glob(str(Path(place).expanduser()))))
        if not matches:
            raise UserError(
                f"No folder {place}. Name run directories, a folder that holds some, or a pattern: 'runs/*'."
            )
        for match in matches:
            folders |= {folder.resolve(): folder for folder in _runs_below(match)}
    if not folders:
        raise UserError(f"No run in {', '.join(places)}: a run directory holds a {CONFIG_FILE}.")
    return list(folders.values())


def _runs_below(folder: Path) -> Iterator[Path]:
    if _is_run(folder):
        yield folder
    elif folder.is_dir():
        for inner in sorted(folder.iterdir()):
            if inner.is_dir() and not inner.is_symlink() and not inner.name.startswith("."):
                yield from _runs_below(inner)


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG_FILE).exists() or (folder / SUMMARY_FILE).exists()


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[Problem]]:
    """Read all that can be read, and say what cannot."""
    runs: list[Run] = []
    problems: list[Problem] = []
    for folder in folders:
        try:
            run, partly = read_run(folder)
        except UnfinishedError as error:
            problems.append(Problem(folder, "unfinished", str(error)))
        except UserError as error:
            problems.append(Problem(folder, "damaged", str(error)))
        else:
            runs.append(run)
            problems += partly
    return _without_duplicates(runs, problems)


def read_run(folder: Path) -> tuple[Run, list[Problem]]:
    """Read one run.

    Raises:
        UnfinishedError: It has no summary.
        UserError: It is damaged, or no fine-tuning run.
    """
    config = _read_config(folder / CONFIG_FILE)
    if not (folder / SUMMARY_FILE).exists():
        rows = _rows(folder)[0]
        raise UnfinishedError(f"no {SUMMARY_FILE}; {len(rows)} points recorded, the last at step {_last_step(rows)}")
    summary = read_json(folder / SUMMARY_FILE)
    _check(folder, summary)
    rows, damaged_rows = _rows(folder)
    goals, damaged_goals = _goals(folder, summary["env"])
    settings = _settings(config, summary)
    run = Run(folder, summary["env"], summary["method"], int(summary["seed"]), settings, summary, goals, rows)
    reasons = [reason for reason in (damaged_rows, damaged_goals) if reason]
    return run, [Problem(folder, "in part", reason) for reason in reasons]


def _check(folder: Path, summary: Any) -> None:
    missing = [key for key in NEEDED if not isinstance(summary, dict) or key not in summary]
    if missing:
        raise UserError(f"{folder / SUMMARY_FILE} has no {', '.join(missing)}: no run of finetune, or damaged.")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError as error:
        raise UserError(f"No file {path}.") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not readable YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("env"), dict):
        raise UserError(f"{path} is not the config of a run.")
    return {str(key): value for key, value in config.items()}


def _rows(folder: Path) -> tuple[list[Row], str]:
    """The rows that can be read, and what is wrong with the rest."""
    path = folder / METRICS_FILE
    try:
        rows = read_metrics(folder)
        lines = len(path.read_text().splitlines()) if path.exists() else 0
    except (OSError, ValueError) as error:
        return [], f"{METRICS_FILE} cannot be read ({error}); no learning curve"
    sound = [row for row in rows if isinstance(row, dict) and {"step", "wall_time"} <= row.keys()]
    if not lines:
        return [], f"no {METRICS_FILE}; no learning curve"
    return sound, f"{METRICS_FILE} is damaged after line {len(sound)}" if len(sound) < lines else ""


def _last_step(rows: Sequence[Row]) -> int:
    return int(rows[-1]["step"]) if rows else 0


def _goals(folder: Path, task: str) -> tuple[dict[int, Mapping[str, Any]], str]:
    """Held-out episodes by seed, and what is wrong with them."""
    try:
        episodes = read_json(folder / EVALUATION_FILE)["after"]["episodes"]
        return {int(e["episode_seed"]): e for e in episodes if e["env_id"] == task and "episode_return" in e}, ""
    except (UserError, KeyError, TypeError, ValueError) as error:
        return {}, f"{EVALUATION_FILE} is damaged or missing; in no test over goals ({type(error).__name__})"


def _settings(config: Mapping[str, Any], summary: Mapping[str, Any]) -> Settings:
    flat = {key: value for key, value in _flat(config) if not _ignored(key, summary)}
    data = summary.get("data") or {}
    task = summary["env"]
    origin = str(data.get("source", "none"))
    flat["data.source"] = origin.replace(task, "TASK").replace(task.rpartition("/")[2], "TASK")
    return tuple(sorted((key, json.dumps(value)) for key, value in flat.items()))


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _ignored(key: str, summary: Mapping[str, Any]) -> bool:
    """Whether a setting changes no result, or the run's method ignores it."""
    method = METHODS.get(str(summary["method"]))
    if key in NO_SETTINGS or key.partition(".")[0] in NO_SETTINGS:
        return True
    if method is None or not key.startswith("adapter."):
        return False
    if not method.adapter:
        return True
    return (not method.eva and key in EVA_KEYS) or (not method.needs and key.startswith("adapter.eva."))


def _without_duplicates(runs: Sequence[Run], problems: list[Problem]) -> tuple[list[Run], list[Problem]]:
    """Of runs with one seed, task, method and settings, the first: a copy is no further evidence."""
    kept: dict[tuple[Any, ...], Run] = {}
    found = list(problems)
    for run in runs:
        key = (run.task, run.method, run.seed, run.settings)
        if key in kept:
            found.append(Problem(run.folder, "left out", f"the same seed and settings as {kept[key].folder}"))
        kept.setdefault(key, run)
    return list(kept.values()), found
