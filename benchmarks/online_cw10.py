"""CW10 from two demonstrations, at equal env steps: after cloning, after online learning, and SAC from scratch.

    python benchmarks/online_cw10.py run push-v3 --algo self_imitation --seed 1 --out runs/cw10
    python benchmarks/online_cw10.py table runs/cw10 --out docs/results/online-cw10.json --page docs/online.md

``run`` does one task, one seed and one algorithm on one thread, and leaves ``OUT/ALGO-TASK-SEED.json``. Everything that
begins with the shipped policy ``mt40`` clones the same two demonstrations first (``--seed`` chooses them, the goals of
training and the held-out goals). ``sac`` is Stable-Baselines3's with its MLP, from scratch, with the demonstrations in
its replay. Settings were chosen on seed 100; see docs/online.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import online_runs
from numpy.typing import NDArray

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
        "algo.updates_per_iteration=20",
        "algo.batch_size=16",
        "algo.eval_every=0",
    ),
    "odt_td3": ("algo.updates_per_iteration=50", "algo.batch_size=16", "algo.critic_warmup=200", "algo.eval_every=0"),
}
"""Of each algorithm besides the shared ones; gradient steps of the Transformer are as many as fit into minutes."""
BATCH, UPDATES_PER_STEP = 128, 2
"""Of Stable-Baselines3's SAC: those of ``algo=residual``."""


def finetuned(arguments: argparse.Namespace, run_dir: Path) -> online_runs.Record:
    """One run of the command; what its summary says."""
    seed = arguments.seed
    found = online_runs.finetuned(
        run_dir,
        [
            f"env={arguments.task}", "policy=mt40", "adapter=eva", f"algo=bc_then_{arguments.algo}", f"seed={seed}",
            "data.episodes=2", f"data.seed={seed}", f"eval.seed={seed}", f"eval.episodes={arguments.episodes}",
            "eval.every=0", "eval.stop_at_success=true", "threads=1", "tracker=[]",
            f"algo.env_steps={arguments.env_steps}", "algo.checkpoint_every=0", "checkpoint.every=0",
            "checkpoint.seconds=0", *SETTINGS[arguments.algo], *arguments.settings,
        ],
    )  # fmt: skip
    names = {"before": "eval_before", "cloned": "eval_cloned", "residual": "eval_residual", "after": "eval"}
    rates = {name: found.get(f"{prefix}/success_rate") for name, prefix in names.items()}
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
    """Success by task, means over seeds; written where asked to."""
    online_runs.publish(arguments, success_table, around(arguments.part))


def around(part: str) -> tuple[str, str]:
    """The lines around a table of a page."""
    return f"<!-- {part}, written by benchmarks/online_cw10.py table -->", f"<!-- end of {part} -->"


HEAD = ("task", "algo", "seeds", "before", "after cloning", "at the end", "each seed, after cloning and at the end")


def success_table(records: Sequence[dict[str, Any]]) -> Table:
    """A row for each task and algorithm, and one for all tasks of an algorithm."""
    return Table("", HEAD, list(_rows(records)))


def _rows(records: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for algo in (*SETTINGS, "sac"):
        mine = [record for record in records if record["algo"] == algo]
        for task in TASKS:
            if one := sorted((r for r in mine if r["task"] == task), key=lambda r: r["seed"]):
                yield (task, algo, ",".join(str(r["seed"]) for r in one), *_means(one), _each(one))
        if mine:
            yield ("all", algo, str(len(mine)), *_means(mine), "")


def _each(records: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{_shown(r.get('cloned'))} to {_shown(r['after'])}" for r in records)


def _means(records: Sequence[dict[str, Any]]) -> list[str]:
    """Means over tasks of the means over seeds, before, after cloning and at the end."""
    by_task = [[r for r in records if r["task"] == task] for task in TASKS]
    means = []
    for key in ("before", "cloned", "after"):
        values = [[r[key] for r in mine if r.get(key) is not None] for mine in by_task]
        means.append(_shown(float(np.mean([np.mean(v) for v in values if v])) if any(values) else None))
    return means


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def main() -> None:
    """Run, or show."""
    parser, one, everything = online_runs.parsers(__doc__)
    one.add_argument("task")
    one.add_argument("--algo", choices=[*SETTINGS, "sac"], default="self_imitation")
    one.add_argument("--env-steps", type=int, default=20_000)
    one.add_argument("--episodes", type=int, default=100, help="held-out goals")
    one.add_argument("--out", type=Path, default=Path("runs/cw10"))
    one.set_defaults(call=run)
    everything.add_argument("--part", default="CW10", help="which table of the page")
    everything.set_defaults(call=table)
    arguments = parser.parse_args()
    arguments.call(arguments)


if __name__ == "__main__":
    main()
