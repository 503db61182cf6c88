"""The record of a finished run: one small JSON file with all that a report reads, to be committed or sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eva_rl.files import write_json
from eva_rl.report.reading import RECORD, UPDATES, Row
from eva_rl.report.runs import DIGEST, FORMAT, digest, read_config, read_run
from eva_rl.tracking.tracker import ENV_STEPS

PLACES = ("run_dir", "shared")
"""Settings that say where a run lay on its machine: a record goes to others, to whom they say nothing."""
MOST_POINTS = 200
"""Points of the learning curve that a record keeps; of more, every second goes until they fit, evaluations last."""


def write_record(path: Path, run_dir: Path, name: str, about: Mapping[str, Any] | None = None) -> None:
    """Write the record of a finished run.

    Args:
        path: Where to.
        run_dir: The run directory.
        name: The run's name within its benchmark.
        about: ``method``, the name that the study gives it, ``tuning``, the settings tried, or None, and the
            ``endpoint`` and ``margin`` of a study file.

    Raises:
        UserError: The run is damaged.
    """
    run, _ = read_run(run_dir)
    goals = sorted(run.goals)
    body = {
        "about": dict(about or {"method": run.method, "tuning": None}),
        "config": {key: value for key, value in read_config(run_dir / "config.yaml").items() if key not in PLACES},
        "summary": run.summary,
        "episodes": {
            "seed": goals,
            "success": [int(run.goals[goal]["success"]) for goal in goals],
            "episode_return": [_return_of(run.goals[goal]) for goal in goals],
        },
        "curve": thinned(run.rows),
        "versions": run.versions,
    }
    write_json(path, {RECORD: FORMAT, "name": name, DIGEST: digest(body), **body})


def _return_of(goal: Mapping[str, float]) -> float | None:
    """None for an episode that was ended at its first success."""
    return round(goal["episode_return"], 4) if "episode_return" in goal else None


def thinned(rows: Sequence[Row]) -> list[Row]:
    """The evaluations among the rows of ``metrics.jsonl``, with the steps and seconds at which they were made."""
    kept = [_point(row) for index, row in enumerate(rows) if index == 0 or _importance(row) or set(UPDATES) & set(row)]
    if len(kept) > MOST_POINTS:
        kept = list(_with_updates(kept))
    while len(kept) > MOST_POINTS:
        kept = _halved(kept)
    return kept


def _importance(row: Row) -> int:
    """2 for an evaluation on held-out episodes, 1 for one on validation episodes, 0 for none."""
    kinds = {part for key in row for part in key.split("/")[:-1]}  # those of cloning come as bc/validation/...
    return 2 if "eval" in kinds else int("validation" in kinds)


def _with_updates(points: Sequence[Row]) -> Iterator[Row]:
    """The points, evaluations with the number of updates before them: the rows that said it may go."""
    updates: Row = {}
    for point in points:
        updates |= {key: point[key] for key in (*UPDATES, ENV_STEPS) if key in point}
        yield updates | point if _importance(point) else point


def _halved(points: Sequence[Row]) -> list[Row]:
    """Points without every second of the least important ones, but with the first and the last."""
    inner = range(1, len(points) - 1)
    least = min(_importance(points[index]) for index in inner)
    dropped = set([index for index in inner if _importance(points[index]) == least][::2])
    return [point for index, point in enumerate(points) if index not in dropped]


def _point(row: Row) -> Row:
    scores = ("success_rate", "mean_reward", "normalized_score", "cloning_loss")
    keys = {key for key in row if key.endswith(scores) or key in UPDATES} | {"step", "wall_time", ENV_STEPS}
    return {key: round(row[key], 6) for key in row if key in keys}
