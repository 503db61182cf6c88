"""CW10 from two demonstrations, at equal env steps: after cloning, after online learning, and SAC from scratch.

    python -m benchmarks.online.cw10 run push-v3 --algo self_imitation --seed 1 --out runs/cw10
    python -m benchmarks.online.cw10 table runs/cw10 --out docs/results/online-cw10.json --page docs/online_results.md
    python -m benchmarks.online.cw10 curve runs/cw10 --page docs/online_results.md

``run`` does one task, one seed and one algorithm on one thread, and leaves ``OUT/ALGO-TASK-SEED.json``. Everything that
begins with the shipped policy ``mt40`` clones the same two demonstrations first (``--seed`` chooses them, the goals of
training and the held-out goals). All but ``residual`` and ``sac`` are evaluated on the held-out goals while they learn,
too, which counts no env steps and decides nothing. ``sac`` is Stable-Baselines3's with its MLP, from scratch, with the
demonstrations in its replay. Settings were chosen on seed 100; see docs/online_results.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks import pictures
from benchmarks.online import runs as online_runs
from eva_rl.report.tables import Table

TASKS = (
    "hammer-v3", "push-wall-v3", "faucet-close-v3", "push-back-v3", "stick-pull-v3", "handle-press-side-v3", "push-v3",
    "shelf-place-v3", "window-close-v3", "peg-unplug-side-v3",
)  # fmt: skip
SETTINGS: dict[str, tuple[str, ...]] = {
    "self_imitation": (),
    "residual": ("algo.distill.env_steps=1000",),
    "odt": (
        "algo.steps_per_iteration=1000",
        "algo.updates_per_iteration=100",
        "algo.batch_size=16",
        "algo.eval_every=0",
    ),
    "odt_td3": (
        "algo.updates_per_iteration=200",
        "algo.batch_size=16",
        "algo.critic_warmup=1000",
        "algo.eval_every=0",
    ),
}
"""Of each algorithm besides the shared ones; gradient steps of the Transformer are as many as fit into minutes."""
ALGORITHMS = (*SETTINGS, "sac")
MEASURED_AT = (5_000, 10_000, 15_000)
"""Env steps after which the learning policy is evaluated on the held-out goals, where an algorithm can be."""
BATCH, UPDATES_PER_STEP = 128, 2
"""Of Stable-Baselines3's SAC: those of ``algo=residual``."""


def finetuned(arguments: argparse.Namespace, run_dir: Path) -> online_runs.Record:
    """One run of the command; what its summary says."""
    seed = arguments.seed
    measured = [] if arguments.algo == "residual" else [f"eval.at={list(MEASURED_AT)}"]
    found = online_runs.finetuned(
        run_dir,
        [
            f"env={arguments.task}", "policy=mt40", "adapter=eva", f"algo=bc_then_{arguments.algo}", f"seed={seed}",
            "data.episodes=2", f"data.seed={seed}", f"eval.seed={seed}", f"eval.episodes={arguments.episodes}",
            "eval.every=0", "eval.stop_at_success=true", "threads=1", "tracker=[]",
            f"algo.env_steps={arguments.env_steps}", "algo.checkpoint_every=0", "checkpoint.every=0",
            "checkpoint.seconds=0", *measured, *SETTINGS[arguments.algo], *arguments.settings,
        ],
    )  # fmt: skip
    names = {"before": "eval_before", "cloned": "eval_cloned", "residual": "eval_residual", "after": "eval"}
    rates = {name: found.get(f"{prefix}/success_rate") for name, prefix in names.items()}
    rates["at"] = {step: metrics["eval/success_rate"] for step, metrics in found.get("eval_at", {}).items()}
    kept = ("env_steps", "env_steps_played", "updates", "distill/updates", "seconds", "protocol")
    return rates | {key: found[key] for key in kept if key in found}


class Predicted:
    """A model of Stable-Baselines3 as the evaluation plays a policy."""

    def __init__(self, model: Any, observation_dim: int, action_dim: int) -> None:
        self._model, self.observation_dim, self.action_dim = model, observation_dim, action_dim

    def reset(self, env_ids: Sequence[str]) -> None:
        """It remembers nothing."""

    def act(
        self, observations: NDArray[np.float32], rewards: NDArray[np.float32], episode_starts: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """Its deterministic actions."""
        actions: NDArray[np.float32] = self._model.predict(observations, deterministic=True)[0]
        return actions


def from_scratch(arguments: argparse.Namespace, run_dir: Path) -> dict[str, Any]:
    """Stable-Baselines3's SAC with the demonstrations in its replay."""
    import torch
    from stable_baselines3 import SAC

    from eva_rl import envs
    from eva_rl.rollouts.evaluation import evaluate_policy
    from eva_rl.rollouts.experts import collect_expert
    from eva_rl.seeding import ONLINE, episode_seeds

    torch.set_num_threads(1)
    began, seed = time.perf_counter(), arguments.seed
    data = collect_expert(arguments.task, 2, seed=seed)
    vec_env = envs.make_vec_env(arguments.task, 5, seed=episode_seeds(ONLINE, seed))
    model = SAC(
        "MlpPolicy", vec_env, batch_size=BATCH, learning_starts=0, train_freq=1, gradient_steps=5 * UPDATES_PER_STEP,
        seed=seed, device="cpu",
    )  # fmt: skip
    fill(model.replay_buffer, [data.episode(index) for index in range(data.num_episodes)], vec_env.num_envs)
    model.learn(arguments.env_steps)
    result = evaluate_policy(
        Predicted(model, 39, 4), arguments.task, episodes=arguments.episodes, seed=seed, stop_at_success=True
    )
    vec_env.close()
    return {
        "after": result.success_rate,
        "env_steps": arguments.env_steps,
        "env_steps_played": arguments.env_steps,
        "updates": model._n_updates,
        "seconds": {"all": time.perf_counter() - began},
        "protocol": result.protocol,
    }


def fill(buffer: Any, episodes: Sequence[Any], num_envs: int) -> None:
    """Put the episodes' transitions into a replay buffer of Stable-Baselines3, ``num_envs`` at a time."""
    rows = [
        (e.observations[t], e.observations[t + 1], e.actions[t], e.rewards[t], e.terminations[t], e.truncations[t])
        for e in episodes
        for t in range(len(e.rewards))
    ]
    for first in range(0, len(rows) - num_envs + 1, num_envs):
        now, later, actions, rewards, ended, cut = map(np.array, zip(*rows[first : first + num_envs], strict=True))
        buffer.add(now, later, actions, rewards, ended | cut, [{"TimeLimit.truncated": bool(x)} for x in cut])


def run(arguments: argparse.Namespace) -> None:
    """One task, seed and algorithm, unless its record is there."""

    def record(run_dir: Path) -> online_runs.Record:
        began = time.perf_counter()
        found = (from_scratch if arguments.algo == "sac" else finetuned)(arguments, run_dir)
        named = {name: getattr(arguments, name) for name in ("task", "algo", "seed", "settings")}
        return named | found | {"wall_seconds": round(time.perf_counter() - began)}

    online_runs.keep_record(arguments, f"{arguments.algo}-{arguments.task}-{arguments.seed}", record)


def table(arguments: argparse.Namespace) -> None:
    """Success by task and algorithm; written and drawn where asked to."""
    show = partial(success_table, seeds=arguments.seeds)
    records = online_runs.publish(arguments, show, around(arguments.part))
    if arguments.figure:
        draw(records, arguments.figure)


def curve(arguments: argparse.Namespace) -> None:
    """Success while learning, of the runs that were evaluated then."""
    online_runs.publish(arguments, curve_table, around(arguments.part, "curve"))


def around(part: str, command: str = "table") -> tuple[str, str]:
    """The lines around a table of a page."""
    return f"<!-- {part}, written by benchmarks/online/cw10.py {command} -->", f"<!-- end of {part} -->"


class Cell(NamedTuple):
    """Success of one task: its mean over seeds, the lowest and the highest, and how many seeds."""

    mean: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, records: Iterable[online_runs.Record], key: str) -> Cell | None:
        """What the records of a task say under a key; None where they say nothing."""
        values = [record[key] for record in records if record.get(key) is not None]
        return cls(float(np.mean(values)), min(values), max(values), len(values)) if values else None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ({self.low:.2f} to {self.high:.2f})" if self.low < self.high else "")


def cells(records: Sequence[online_runs.Record]) -> dict[str, dict[str, Cell]]:
    """Columns, each by task: before, after cloning (both from the first algorithm), and the end of each algorithm."""
    algos = [algo for algo in ALGORITHMS if any(record["algo"] == algo for record in records)]
    columns = {"before": (algos[0], "before"), "after cloning": (algos[0], "cloned")}
    columns |= {algo: (algo, "after") for algo in algos}
    found: dict[str, dict[str, Cell]] = {}
    for name, (algo, key) in columns.items():
        by_task = {task: [r for r in records if (r["task"], r["algo"]) == (task, algo)] for task in TASKS}
        found[name] = {task: cell for task, mine in by_task.items() if (cell := Cell.of(mine, key)) is not None}
    return found


def success_table(records: Sequence[online_runs.Record], seeds: Sequence[int] = ()) -> Table:
    """A row for each task, and means of the tasks that a column has; of some seeds alone where they are named."""
    columns = cells([record for record in records if not seeds or record["seed"] in seeds])
    rows = [
        (task, *(str(column.get(task, "-")) for column in columns.values()))
        for task in TASKS
        if any(task in column for column in columns.values())
    ]
    heads = (f"{name}{_seeds(column.values()) if name in ALGORITHMS else ''}" for name, column in columns.items())
    return Table("", ("task", *heads), [*rows, *_means(columns)])


def _seeds(column: Iterable[Cell]) -> str:
    """How many seeds each task has."""
    counts = sorted({cell.seeds for cell in column})
    return f", {' or '.join(map(str, counts))} {'seed' if counts == [1] else 'seeds'}"


def _means(columns: Mapping[str, Mapping[str, Cell]]) -> Iterator[tuple[str, ...]]:
    """Means over tasks: all that cloning was measured on, and those that every column has, where these are fewer."""
    whole = list(columns["after cloning"])
    shared = [task for task in whole if all(task in column for column in columns.values())]
    named = {f"mean of {len(whole)}": whole} | (
        {} if shared == whole else {f"mean of the {len(shared)} without a dash": shared}
    )
    for name, tasks in named.items():
        means = (
            f"{np.mean([column[task].mean for task in tasks]):.2f}" if column.keys() >= set(tasks) else "-"
            for column in columns.values()
        )
        yield (name, *means)


def curve_table(records: Sequence[online_runs.Record]) -> Table:
    """By task, the mean success after so many env steps, and the most that a run's last lies below its best."""
    by_task = {task: [r for r in records if r["task"] == task and r.get("at")] for task in TASKS}
    curves = {task: [_curve(record) for record in mine] for task, mine in by_task.items() if mine}
    rows = [_curve_row(task, found) for task, found in curves.items()]
    everything = [one for found in curves.values() for one in found]
    steps = ("after cloning", *(f"{step:,}" for step in MEASURED_AT), "at the end")
    heads = ("task", *steps, "last below best, at most")
    return Table("", heads, [*rows, _curve_row(f"mean of {len(rows)}", everything)])


def _curve(record: online_runs.Record) -> list[float]:
    """After cloning, at each measured number of env steps, and at the end."""
    rates = {int(step): rate for step, rate in record["at"].items()}
    return [
        record["cloned"],
        *(rates[min(step for step in rates if step >= at)] for at in MEASURED_AT),
        record["after"],
    ]


def _curve_row(name: str, curves: Sequence[Sequence[float]]) -> tuple[str, ...]:
    lost = max(max(one) - one[-1] for one in curves)
    return (name, *(f"{mean:.2f}" for mean in np.mean(curves, axis=0)), f"{lost:.2f}")


def draw(records: Sequence[online_runs.Record], path: Path) -> None:
    """By task, from cloning to the end of the first algorithm, with every seed, and where the others end."""
    columns = cells(records)
    first, *others = list(columns)[2:]
    order = sorted(columns["after cloning"], key=lambda task: columns["after cloning"][task].mean)
    figure = Figure(figsize=(7.2, 3.9), layout="constrained")
    axes = figure.subplots()
    for row, task in enumerate(order):
        start, end = columns["after cloning"][task].mean, columns[first][task].mean
        axes.plot([start, end], [row, row], color="C0", lw=2, alpha=0.5, zorder=2)
        seeds = [record["after"] for record in records if (record["task"], record["algo"]) == (task, first)]
        axes.plot(seeds, [row] * len(seeds), "|", color="C0", ms=9, zorder=3)
    rows = range(len(order))
    starts = [columns["after cloning"][task].mean for task in order]
    axes.plot(starts, rows, "o", color="C0", mfc="none", ms=7, zorder=4, label="after cloning 2 demonstrations")
    axes.plot([columns[first][task].mean for task in order], rows, "o", color="C0", ms=7, zorder=5, label=first)
    for marker, colour, name in zip("s^DX", ("C1", "C2", "C4", "C3"), others, strict=False):
        there = [(columns[name][task].mean, row) for row, task in enumerate(order) if task in columns[name]]
        axes.plot(*zip(*there, strict=True), marker, color=colour, ms=5, alpha=0.8, zorder=1, label=name)
    axes.set(yticks=rows, yticklabels=order, xlim=(-0.03, 1.03), xlabel="success on 100 held-out goals, mean of seeds")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    pictures.save(figure, path)


def main() -> None:
    """Run, or show."""
    parser, one, everything, learning = online_runs.parsers(__doc__, "curve")
    one.add_argument("task")
    one.add_argument("--algo", choices=ALGORITHMS, default="self_imitation")
    one.add_argument("--env-steps", type=int, default=20_000)
    one.add_argument("--episodes", type=int, default=100, help="held-out goals")
    one.add_argument("--out", type=Path, default=Path("runs/cw10"))
    one.set_defaults(call=run)
    everything.add_argument("--part", default="CW10", help="which table of the page")
    everything.add_argument("--seeds", type=int, nargs="*", help="of the table, not all that there are")
    everything.add_argument("--figure", type=Path, help="draw it")
    everything.set_defaults(call=table)
    learning.add_argument("--part", default="CW10 while learning", help="which table of the page")
    learning.set_defaults(call=curve)
    arguments = parser.parse_args()
    arguments.call(arguments)


if __name__ == "__main__":
    main()
