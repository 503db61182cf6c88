"""Held-out cloning loss and success of every method at seven learning rates, on tuning tasks and seeds.

    python -m benchmarks.comparisons.learning_rates --out rates  # all of it, on one core
    for i in $(seq 0 15); do
        python -m benchmarks.comparisons.learning_rates --out rates --shard $i/16 --device cuda &
    done; wait
    python -m benchmarks.comparisons.learning_rates --out rates --seeds 1000  # a part of it
    python -m benchmarks.comparisons.learning_rates --out rates --seeds 1001 --promising 0.5  # rates that did not fail

The tasks are among those that the shipped policy does not solve; demonstrations are those of seeds from 1000 on, and
success is measured on validation goals, so that nothing here is seen by an evaluation. The rates of a method's sweep
lie half a decade apart, three decades in all. ``docs/learning_rates.md`` says what came out.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Container, Iterable
from statistics import fmean

import torch

from benchmarks.comparisons.cloning_runs import (
    Record,
    Records,
    TaskRuns,
    add_options,
    own_part,
    read_records,
    setting_of,
)
from eva_rl.adapters import METHODS

TASKS = ("push-back-v3", "stick-pull-v3", "shelf-place-v3")
SEEDS = (1000, 1001)
SETTINGS = ("25:100",)
"""Demonstrations and gradient steps: what a run has by default."""
HALF_DECADES = (1, 3)
CENTRES = {
    **dict.fromkeys(("full", "lora_plus"), 1e-3),
    **dict.fromkeys(("pissa", "olora", "corda", "milora", "lora_ga"), 3e-3),
    **dict.fromkeys(("adalora", "eva_adalora"), 3e-2),
}
"""Middle of a method's sweep; 1e-2 for the others."""
Unit = tuple[int, str, str, str]
"""Seed, setting, task, method."""
Tried = tuple[str, float]
"""Method and learning rate."""


def rates(method: str, points: int = 7) -> list[float]:
    """Learning rates half a decade apart, around the method's centre."""
    grid = [float(f"{digit}e{power}") for power in range(-7, 3) for digit in HALF_DECADES]
    first = grid.index(CENTRES.get(method, 1e-2)) - points // 2
    return grid[first : first + points]


def units(options: argparse.Namespace) -> list[Unit]:
    """What is attached once; one seed and setting after the other, so that a sweep that is cut short has whole ones."""
    found: list[Unit] = []
    for seed in options.seeds:
        for setting in options.settings:
            all_of_it = [(seed, setting, task, method) for task in options.tasks for method in options.methods]
            found += own_part(all_of_it, options.shard)
    return found


def failed(found: Iterable[Record], share: float) -> set[Tried]:
    """What has a mean success below this share of its method's best; a run that diverged counts as 0."""
    successes: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in found:
        successes[record["run"]["method"]][record["run"]["learning_rate"]].append(record.get("success") or 0.0)
    means = {method: {rate: fmean(all_of_it) for rate, all_of_it in own.items()} for method, own in successes.items()}
    return {(m, rate) for m, own in means.items() for rate, mean in own.items() if mean < share * max(own.values())}


def sweep(
    unit: Unit, options: argparse.Namespace, records: Records, known: dict[Unit, TaskRuns], left_out: Container[Tried]
) -> None:
    """Every rate of a unit that is missing."""
    seed, setting, task, method = unit
    asked: list[Record] = [
        {"seed": seed, "setting": setting, "task": task, "method": method, "learning_rate": rate, "rank": options.rank}
        for rate in options.rates or rates(method, options.points)
        if (method, rate) not in left_out
    ]
    missing = records.missing(asked)
    if not missing or records.late(options.minutes):
        return
    episodes, updates = map(int, setting.split(":"))
    runs = known.setdefault((seed, setting, task, ""), TaskRuns(task, seed, setting_of(options, episodes, updates)))
    started = runs.start(method)
    gain = [layer.gain for layer in started.adapter.start.values()]
    about = {"gain": sum(gain) / len(gain)} if gain else {}
    for run in missing:
        if not records.late(options.minutes):
            records.add(run, about | started.run(run["learning_rate"]))


def main() -> None:
    """Sweep this shard's part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--settings", nargs="+", default=SETTINGS, help="DEMONSTRATIONS:UPDATES")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--points", type=int, default=7, help="learning rates of each sweep, half a decade apart")
    promising = "leave out rates whose mean success on other seeds is below this share of their method's best"
    parser.add_argument("--promising", type=float, default=0.0, metavar="SHARE", help=promising)
    parser.add_argument("--rates", nargs="+", type=float, default=[], help="in place of each method's own")
    options = parser.parse_args()
    torch.set_num_threads(1)
    records, known = Records(options.out, options.shard), dict[Unit, TaskRuns]()
    others = [record for record in read_records(options.out) if record["run"]["seed"] not in options.seeds]
    left_out = failed(others, options.promising)
    for unit in units(options):
        sweep(unit, options, records, known, left_out)
    for runs in known.values():
        runs.close()


if __name__ == "__main__":
    main()
