"""Learning curves of others: one folder a method, one CSV file a task, with the columns step, success or reward, seed.

The layout of TD-MPC2's published results (github.com/nicklashansen/tdmpc2, ``results/``).
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from eva_rl.errors import UserError
from eva_rl.report.reading import LARGEST, Row, one_line, read_text
from eva_rl.report.runs import Problem, Run

CSV_PREFIX = "csv:"
COLUMNS = {"success": "success_rate", "success_rate": "success_rate", "reward": "mean_reward", "return": "mean_reward"}
"""Columns that hold a score, and what it is called here."""

Curves = dict[int, dict[float, float]]
"""By seed: score by step."""


def read_csv_curves(folder: Path) -> tuple[list[Run], list[Problem]]:
    """Read the learning curves below a folder; a file that cannot be read is listed.

    The final score of a run is taken at the largest step that all runs of its task have reached, so that no method
    profits from longer runs.

    Args:
        folder: Holds a folder for each method, or, of one method alone, the files themselves.

    Raises:
        UserError: No such folder, or no CSV file in it.
    """
    paths = sorted(folder.glob("*/*.csv")) or sorted(folder.glob("*.csv"))
    if not paths:
        raise UserError(
            f"{CSV_PREFIX}{folder}: no CSV files. Expected {folder}/METHOD/TASK.csv with step, success, seed."
        )
    found: dict[Path, tuple[str, Curves]] = {}
    problems = []
    for path in paths:
        try:
            found[path] = read_csv_curve(path)
        except UserError as error:
            problems.append(Problem(path, "damaged", " ".join(str(error).split())))
    ends: dict[str, list[float]] = defaultdict(list)
    for path, (_, curves) in found.items():
        ends[path.stem] += [max(curve) for curve in curves.values()]
    return [
        _run(path, key, seed, curve, min(ends[path.stem]))
        for path, (key, curves) in found.items()
        for seed, curve in sorted(curves.items())
    ], problems


def read_csv_curve(path: Path) -> tuple[str, Curves]:
    """The score's name and the curve of each seed.

    Raises:
        UserError: A column is missing, a value is no number, or a success rate is none.
    """
    reader = csv.DictReader(io.StringIO(read_text(path)))
    columns = [name for name in reader.fieldnames or () if name in COLUMNS]
    if not columns or not {"step", "seed"} <= set(reader.fieldnames or ()):
        raise UserError(f"{path}: columns {one_line(reader.fieldnames)}, expected step, success or reward, seed.")
    curves: Curves = defaultdict(dict)
    for number, row in enumerate(reader, start=2):
        try:
            step, score, seed = float(row["step"]), float(row[columns[0]]), int(float(row["seed"]))
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path}, line {number}: {one_line(error)}.") from error
        if not (abs(step) <= LARGEST and abs(score) <= LARGEST) or (columns[0].startswith("s") and not 0 <= score <= 1):
            raise UserError(f"{path}, line {number}: {columns[0]}={score} at step {step}.")
        curves[seed][step] = score
    if not curves:
        raise UserError(f"{path} has no rows.")
    return COLUMNS[columns[0]], curves


def _run(path: Path, key: str, seed: int, curve: Mapping[float, float], end: float) -> Run:
    steps = sorted(step for step in curve if step <= end) or sorted(curve)[:1]
    rows: list[Row] = [{"step": step, "wall_time": 0.0, f"eval/{key}": curve[step]} for step in steps]
    method, task = one_line(path.parent.name), one_line(path.stem)
    summary = {
        "env": task,
        "method": method,
        "seed": seed,
        "policy": "published curves",
        f"eval/{key}": curve[steps[-1]],
    }
    return Run(path.parent / f"{path.name}#{seed}", task, method, seed, (), summary, {}, rows)
