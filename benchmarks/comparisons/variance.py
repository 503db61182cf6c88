"""What share of a run's variance comes from demonstrations, initialisation, data order and goals.

    python -m benchmarks.comparisons.variance --out variance --table  # all of it, on one core
    for i in $(seq 0 15); do
        python -m benchmarks.comparisons.variance --out variance --shard $i/16 --device cuda &
    done; wait

A nested design on each task: several draws of demonstrations; for each, several starts of the adapter; for each,
several orders of the windows; for each, several sets of goals. The mean squares of the levels give the components
(analysis of variance of a balanced nested design; Searle, Casella and McCulloch 1992, chapter 4). Components that come
out negative count as zero. ``--table`` prints them from the records.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import pages
from benchmarks.comparisons.cloning_runs import (
    MethodRuns,
    Record,
    Records,
    TaskRuns,
    add_options,
    own_part,
    read_records,
    setting_of,
)

TASKS = ("push-back-v3", "stick-pull-v3", "shelf-place-v3")
FIRST_SEED = 2000
LEVELS = ("demonstrations", "initialisation", "order", "goals")


def components(values: NDArray[np.float64]) -> dict[str, float]:
    """Variance of each level of a balanced nested design.

    Args:
        values: (demonstrations, initialisations, orders, goals), one number a run.
    """
    squares: list[float] = []
    for level in range(values.ndim):
        means = values.mean(axis=tuple(range(level + 1, values.ndim)))
        below = int(np.prod(values.shape[level + 1 :]))
        upper = means.mean(axis=-1, keepdims=True)
        freedom = int(np.prod(values.shape[:level])) * (values.shape[level] - 1)
        squares.append(float(below * ((means - upper) ** 2).sum() / max(1, freedom)))
    found = {}
    for level, name in enumerate(LEVELS[: values.ndim]):
        inner = squares[level + 1] if level + 1 < values.ndim else 0.0
        found[name] = max(0.0, (squares[level] - inner) / int(np.prod(values.shape[level + 1 :])))
    return found


def sweep(task: str, seed: int, options: argparse.Namespace, records: Records) -> None:
    """All runs with one draw of demonstrations."""
    runs = TaskRuns(task, seed, setting_of(options, options.episodes, options.updates))
    for start in range(options.starts):
        asked: list[Record] = [
            {"task": task, "seed": seed, "method": options.method, "start": start, "order": order, "goals": goals}
            for order in range(options.orders)
            for goals in range(options.goal_sets)
        ]
        missing = records.missing(asked)
        if not missing or records.late(options.minutes):
            continue
        started = runs.start(options.method, seed + 100 * start)
        for order, of_it in groupby(missing, key=itemgetter("order")):
            if not records.late(options.minutes):
                _train_and_measure(started, seed + 100 * order, list(of_it), options, records)
    runs.close()


def _train_and_measure(
    started: MethodRuns, order: int, asked: Sequence[Record], options: argparse.Namespace, records: Records
) -> None:
    """Train once, and measure on every set of goals."""
    found = started.run(options.learning_rate, order, FIRST_SEED + asked[0]["goals"])
    records.add(asked[0], found)
    for run in asked[1:]:
        records.add(run, found | {"success": started.runs.success(started.policy, FIRST_SEED + run["goals"])})


def table(found: Sequence[Record], measure: str) -> str:
    """Markdown: shares of the variance, a row a task."""
    by_task: dict[str, dict[tuple[int, ...], float]] = defaultdict(dict)
    for record in found:
        run = record["run"]
        place = (run["seed"] - FIRST_SEED, run["start"], run["order"], run["goals"])
        by_task[run["task"]][place] = record[measure]
    rows = []
    for task, own in by_task.items():
        values = np.full(np.max(list(own), axis=0) + 1, np.nan)
        for place, value in own.items():
            values[place] = value
        whole = values[~np.isnan(values).any(axis=(1, 2, 3))]
        if len(whole) < 2:
            continue
        parts = components(whole)
        total = sum(parts.values())
        shares = [f"{parts[level] / total:.0%}" if total else "-" for level in LEVELS]
        rows.append([f"`{task}`", str(whole.size), f"{np.sqrt(total):.3g}", *shares])
    return pages.table(["task", "runs", f"sd of {measure}", *LEVELS], rows)


def correlation(found: Sequence[Record]) -> dict[str, float]:
    """Spearman's, of held-out loss and success, by task."""
    from scipy.stats import spearmanr

    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in found:
        if record.get("loss") is not None and record.get("success") is not None:
            pairs[record["run"]["task"]].append((record["loss"], record["success"]))
    return {task: float(spearmanr(*np.array(own).T).statistic) for task, own in pairs.items() if len(own) > 2}


def main() -> None:
    """Run this shard's part, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--updates", type=int, default=60)
    for name, number in (("draws", 8), ("starts", 3), ("orders", 3), ("goal-sets", 2)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--table", action="store_true", help="print the shares and correlations at the end")
    options = parser.parse_args()
    torch.set_num_threads(1)
    records = Records(options.out, options.shard)
    units = [(task, FIRST_SEED + draw) for draw in range(options.draws) for task in options.tasks]
    for task, seed in own_part(units, options.shard):
        sweep(task, seed, options, records)
    if options.table:
        found = list(read_records(options.out))
        print(table(found, "loss"), table(found, "success"), correlation(found), sep="\n\n")


if __name__ == "__main__":
    main()
