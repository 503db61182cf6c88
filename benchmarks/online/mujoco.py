"""MuJoCo from a medium policy: residual learning in the environment, distilled into the adapter, without any data.

    python -m benchmarks.online.mujoco run Hopper-v5 --seed 2 --out runs/mujoco
    python -m benchmarks.online.mujoco table runs/mujoco --page docs/online_results.md

``run`` does one task and one seed on one thread, with the shipped policy of that task, and leaves
``OUT/TASK-SEED.json``. All env steps count, those of validation, of distillation and of EVA's pass included. Settings
were chosen on Hopper's seeds 1 and 100 to 102, HalfCheetah's on seed 100; see docs/online_results.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.online import runs as online_runs
from eva_rl.report.tables import Table

POLICIES = {"Hopper-v5": "hopper", "Walker2d-v5": "walker2d", "HalfCheetah-v5": "halfcheetah"}
SETTINGS = {
    "HalfCheetah-v5": [
        "algo.updates_per_iteration=400",
        "algo.embedding_size=256",
        "algo.critics=2",
        "algo.policy_delay=2",
        "algo.critic_learning_rate=1e-3",
        "algo.learning_rate=1e-3",
        "algo.tau=0.02",
        "algo.decay=0.3",
        "algo.eval_every=20000",
        "eval.quick_episodes=2",
    ]
}
"""Of tasks that the defaults do not suit."""
ENV_STEPS = {"Hopper-v5": 70_000, "Walker2d-v5": 70_000, "HalfCheetah-v5": 92_000}
"""Of training and distillation."""
SCORE = "normalized_score"
PHASES = {"before": "eval_before", "residual": "eval_residual", "after": "eval"}
MARKS = ("<!-- MuJoCo, written by benchmarks/online/mujoco.py table -->", "<!-- end of MuJoCo -->")


def run(arguments: argparse.Namespace) -> None:
    """One task and seed, unless its record is there."""
    online_runs.keep_record(arguments, f"{arguments.task}-{arguments.seed}", partial(record_of, arguments))


def record_of(arguments: argparse.Namespace, run_dir: Path) -> online_runs.Record:
    """One run of the command: scores before and after, and of the validations between."""
    from eva_rl.tracking.tracker import read_metrics

    seed, settings = arguments.seed, [*SETTINGS.get(arguments.task, ()), *arguments.settings]
    env_steps = arguments.env_steps or ENV_STEPS[arguments.task]
    found = online_runs.finetuned(
        run_dir,
        [
            f"env={arguments.task}", f"policy={arguments.policy or POLICIES[arguments.task]}", "data=none",
            "adapter.rank=32", "algo=residual", f"algo.env_steps={env_steps}", "algo.eval_every=10000",
            "algo.checkpoint_every=10000", f"seed={seed}", f"eval.seed={seed}", f"eval.episodes={arguments.episodes}",
            "eval.quick_episodes=5", "threads=1", "tracker=[]", *settings,
        ],
    )  # fmt: skip
    record = {"task": arguments.task, "algo": found["algo"], "seed": seed, "settings": settings}
    record |= {name: _scores(found, prefix) for name, prefix in PHASES.items()}
    record |= {key: found[key] for key in ("env_steps_played", "updates", "seconds", "protocol")}
    curve = [(row["step"], row[f"validation/{SCORE}"]) for row in read_metrics(run_dir) if f"validation/{SCORE}" in row]
    return record | {"validation": curve}


def _scores(summary: online_runs.Record, prefix: str) -> dict[str, float]:
    return {key: summary[f"{prefix}/{key}"] for key in ("mean_reward", SCORE) if f"{prefix}/{key}" in summary}


def table(arguments: argparse.Namespace) -> None:
    """Normalised scores by task and seed; written where asked to."""
    online_runs.publish(arguments, score_table, MARKS)


HEAD = ("task", "seed", "before", "best validation", "residual policy", "at the end", "gain", "mean return", "minutes")


def score_table(records: Sequence[online_runs.Record]) -> Table:
    """A row for each run, and one for all of a task."""
    return Table("", HEAD, list(_rows(records)))


def _rows(records: Sequence[online_runs.Record]) -> Iterator[tuple[str, ...]]:
    for task in POLICIES:
        mine = sorted((record for record in records if record["task"] == task), key=lambda record: record["seed"])
        for record in mine:
            yield _row(task, str(record["seed"]), [record])
        if len(mine) > 1:
            yield _row(task, "mean", mine)


def _row(task: str, seed: str, records: Sequence[online_runs.Record]) -> tuple[str, ...]:
    before, residual, after = (_mean(records, phase, SCORE) for phase in PHASES)
    best = float(np.mean([max(score for _, score in record["validation"]) for record in records]))
    returns = f"{_mean(records, 'before', 'mean_reward'):,.0f} to {_mean(records, 'after', 'mean_reward'):,.0f}"
    minutes = float(np.mean([sum(record["seconds"].values()) for record in records])) / 60
    scores = (f"{score:.1f}" for score in (before, best, residual, after))
    return (task, seed, *scores, f"{after - before:+.1f}", returns, f"{minutes:.0f}")


def _mean(records: Sequence[online_runs.Record], phase: str, key: str) -> float:
    return float(np.mean([record[phase][key] for record in records]))


def main() -> None:
    """Run, or show."""
    parser, one, everything = online_runs.parsers(__doc__)
    one.add_argument("task", choices=POLICIES)
    one.add_argument("--policy", help="another than the shipped one of the task")
    one.add_argument("--env-steps", type=int, help="of training and distillation, instead of the table's")
    one.add_argument("--episodes", type=int, default=50, help="held-out ones of each evaluation")
    one.add_argument("--out", type=Path, default=Path("runs/mujoco"))
    one.set_defaults(call=run)
    everything.set_defaults(call=table)
    arguments = parser.parse_args()
    arguments.call(arguments)


if __name__ == "__main__":
    main()
