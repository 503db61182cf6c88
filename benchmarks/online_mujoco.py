"""MuJoCo from a medium policy: residual learning in the environment, distilled into the adapter, without any data.

    python benchmarks/online_mujoco.py run Hopper-v5 --seed 1 --out runs/mujoco
    python benchmarks/online_mujoco.py table runs/mujoco --out docs/results/online-mujoco.json --page docs/online.md

``run`` does one task and one seed on one thread, with the shipped policy of that task, and leaves
``OUT/TASK-SEED.json``. All env steps count, those of validation and distillation included. Settings were chosen on
seed 100; see docs/online.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pages
from rich.console import Console

from eva_rl.report.page import markdown_table, terminal_table
from eva_rl.report.tables import Table

POLICIES = {"Hopper-v5": "hopper", "Walker2d-v5": "walker2d"}
SCORE = "normalized_score"
PHASES = {"before": "eval_before", "residual": "eval_residual", "after": "eval"}
MARKS = ("<!-- MuJoCo, written by benchmarks/online_mujoco.py table -->", "<!-- end of MuJoCo -->")


def run(arguments: argparse.Namespace) -> None:
    """One task and seed, unless its record is there."""
    from eva_rl.finetune.command import main
    from eva_rl.tracking.tracker import read_metrics

    name, seed = f"{arguments.task}-{arguments.seed}", arguments.seed
    path, run_dir = arguments.out / f"{name}.json", arguments.out / name
    if path.exists():
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    status = main(
        [
            f"env={arguments.task}", f"policy={arguments.policy or POLICIES[arguments.task]}", "data=none",
            "adapter.rank=32", "algo=residual", f"algo.env_steps={arguments.env_steps}", "algo.eval_every=10000",
            "algo.checkpoint_every=0", f"seed={seed}", f"eval.seed={seed}", f"eval.episodes={arguments.episodes}",
            "eval.quick_episodes=5", "threads=1", "tracker=[]", f"run_dir={run_dir}", *arguments.settings,
        ]
    )  # fmt: skip
    if status:
        raise SystemExit(status)
    found = json.loads((run_dir / "summary.json").read_text())
    record = {"task": arguments.task, "algo": found["algo"], "seed": seed, "settings": arguments.settings}
    record |= {name: _scores(found, prefix) for name, prefix in PHASES.items()}
    record |= {key: found[key] for key in ("env_steps_played", "updates", "seconds", "protocol")}
    curve = [(row["step"], row[f"validation/{SCORE}"]) for row in read_metrics(run_dir) if f"validation/{SCORE}" in row]
    record["validation"] = curve
    path.write_text(json.dumps(record, indent=1) + "\n")
    if not arguments.keep:
        shutil.rmtree(run_dir, ignore_errors=True)


def _scores(summary: dict[str, Any], prefix: str) -> dict[str, float]:
    return {key: summary[f"{prefix}/{key}"] for key in ("mean_reward", SCORE) if f"{prefix}/{key}" in summary}


def table(arguments: argparse.Namespace) -> None:
    """Normalised scores by task and seed; written where asked to."""
    records = pages.json_records(arguments.folder)
    shown = Table("", HEAD, list(_rows(records)))
    Console(width=140).print(terminal_table(shown))
    if arguments.out:
        arguments.out.write_text(json.dumps(records, indent=1) + "\n")
    if arguments.page:
        pages.write_between(arguments.page, *MARKS, markdown_table(shown))


HEAD = ("task", "seed", "before", "best validation", "residual policy", "at the end", "gain", "mean return", "minutes")


def _rows(records: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for task in POLICIES:
        mine = sorted((record for record in records if record["task"] == task), key=lambda record: record["seed"])
        for record in mine:
            yield _row(task, str(record["seed"]), [record])
        if len(mine) > 1:
            yield _row(task, "mean", mine)


def _row(task: str, seed: str, records: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    before, residual, after = (_mean(records, phase, SCORE) for phase in PHASES)
    best = float(np.mean([max(score for _, score in record["validation"]) for record in records]))
    returns = f"{_mean(records, 'before', 'mean_reward'):,.0f} to {_mean(records, 'after', 'mean_reward'):,.0f}"
    minutes = float(np.mean([sum(record["seconds"].values()) for record in records])) / 60
    scores = (f"{score:.1f}" for score in (before, best, residual, after))
    return (task, seed, *scores, f"{after - before:+.1f}", returns, f"{minutes:.0f}")


def _mean(records: Sequence[dict[str, Any]], phase: str, key: str) -> float:
    return float(np.mean([record[phase][key] for record in records]))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    of_run = commands.add_parser("run")
    of_run.add_argument("task", choices=POLICIES)
    of_run.add_argument("--policy", help="another than the shipped one of the task")
    of_run.add_argument("--seed", type=int, default=1)
    of_run.add_argument("--env-steps", type=int, default=70_000, help="of training and distillation")
    of_run.add_argument("--episodes", type=int, default=50, help="held-out ones of each evaluation")
    of_run.add_argument("--settings", nargs="*", default=[])
    of_run.add_argument("--out", type=Path, required=True)
    of_run.add_argument("--keep", action="store_true", help="keep the run directory")
    of_run.set_defaults(function=run)
    of_table = commands.add_parser("table")
    of_table.add_argument("folder", type=Path)
    of_table.add_argument("--out", type=Path)
    of_table.add_argument("--page", type=Path)
    of_table.set_defaults(function=table)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
