"""Learning curves of others: one folder a method, one CSV file a task, with the columns step, success or reward, seed.

The layout of TD-MPC2's published results (github.com/nicklashansen/tdmpc2, ``results/``).
"""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from eva_rl.errors import UserError
from eva_rl.report.reading import Row, is_number, one_line, read_text
from eva_rl.report.runs import Problem, Run

CSV_PREFIX = "csv:"
COLUMNS = {"success": "success_rate", "success_rate": "success_rate", "reward": "mean_reward", "return": "mean_reward"}
"""Columns that hold a score, and what it is called here; of several in a file the first of these is read."""

Curves = dict[int, dict[float, float]]
"""By seed: score by step."""


def read_csv_curves(folder: Path) -> tuple[list[Run], list[Problem]]:
    """Read the learning curves below a folder; a file that cannot be read is listed.

    Curves end at the last step that all runs of their task have reached, so that no method profits from longer runs: a
    run that has no point there is interpolated linearly. Steps are taken for env steps.

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
        UserError: A column is missing, a value is no number, a success rate is none, or a step has two scores.
    """
    reader = csv.DictReader(io.StringIO(read_text(path).removeprefix("\ufeff")))  # spreadsheets put a mark in front
    curves: Curves = defaultdict(dict)
    try:
        column = _score_column(reader.fieldnames or (), path)
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            step, score, seed = (_number(row, name, where) for name in ("step", column, "seed"))
            _check(score, seed, column, where)
            if curves[int(seed)].setdefault(step, score) != score:
                raise UserError(
                    f"{where}: {column}={score:g} at step {step:g} of seed {seed:g}, which had "
                    f"{curves[int(seed)][step]:g} before. Expected one row for each step and seed."
                )
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}.") from error
    if not curves:
        raise UserError(f"{path} has no rows.")
    return COLUMNS[column], curves


def _score_column(names: Sequence[str], path: Path) -> str:
    column = next((name for name in COLUMNS if name in names), None)
    if column is None or not {"step", "seed"} <= set(names):
        raise UserError(
            f"{path}: columns {one_line(', '.join(names) or 'none')}, expected step, success or reward, seed."
        )
    return column


def _number(row: Mapping[str, str | None], name: str, where: str) -> float:
    try:
        value = float(row[name] or "")
    except ValueError:
        value = math.nan
    if not is_number(value):
        raise UserError(f"{where}: {name}={one_line(row[name] or '')}, expected a number.")
    return value


def _check(score: float, seed: float, column: str, where: str) -> None:
    if COLUMNS[column] == "success_rate" and not 0 <= score <= 1:
        raise UserError(f"{where}: {column}={score:g}, expected a share between 0 and 1.")
    if not seed.is_integer():
        raise UserError(f"{where}: seed={seed:g}, expected a whole number.")


def _run(path: Path, key: str, seed: int, curve: Mapping[float, float], end: float) -> Run:
    known = sorted(curve)
    last = float(np.interp(end, known, [curve[step] for step in known]))
    points = {step: curve[step] for step in known if step < end} | {end: last}
    rows: list[Row] = [{"step": step, "wall_time": 0.0, f"eval/{key}": score} for step, score in points.items()]
    method, task = one_line(path.parent.name), one_line(path.stem)
    summary = {
        "env": task,
        "method": method,
        "seed": seed,
        "policy": "published curves",
        f"eval/{key}": last,
    }
    place = path.parent / f"{path.name}#{seed}"
    return Run(place, task, method, seed, (), summary, {}, rows, evaluates=True, counts_env_steps=True)
