"""Run directories with known results, in the shape that ``python -m eva_rl.finetune`` leaves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from eva_rl import envs
from eva_rl.__main__ import command_module
from eva_rl.cli.parsing import parse
from eva_rl.cli.run_dir import write_summary
from eva_rl.files import write_json
from eva_rl.rollouts.episodes import EpisodeRecord
from eva_rl.rollouts.evaluation import EvaluationResult
from eva_rl.seeding import EVALUATION

command_module("finetune")  # registers its keys


def make_run(folder: Path, task: str, solved: Sequence[bool], *overrides: str, finished: bool = True) -> Path:
    """A run whose held-out episodes ended as ``solved`` says.

    Args:
        folder: Run directory.
        task: Any name.
        solved: One entry a held-out goal.
        overrides: Of finetune's config: ``adapter=lora``, ``seed=3``, ...
        finished: Whether it has a summary.
    """
    config = parse("finetune", [f"env={task}", f"eval.episodes={len(solved)}", f"run_dir={folder}", *overrides])
    spec = envs.env_spec(task)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
    rate = float(np.mean(solved))
    rows = [
        {"step": step, "wall_time": 1e9 + step / 10, "validation/success_rate": rate * step / 100} for step in (50, 100)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        after, before = result(spec.env_id, solved), result(spec.env_id, [False] * len(solved))
        write_json(folder / "evaluation.json", {"before": before.record(), "after": after.record()})
        summary = {"env": spec.env_id, "method": config.adapter.method, "algo": "bc", "seed": config.seed}
        summary |= before.metrics("eval_before") | after.metrics() | {"policy": config.policy.path}
        summary |= {"trainable_parameters": 100 + config.adapter.rank, "total_parameters": 5000}
        summary |= {"data": {"source": f"expert:{spec.env_id}?episodes=25", "hash": f"{task}-{config.seed}"}}
        write_summary(folder, summary | {"seconds": {"train": 10.0, "adapter": 1.0}, "peak_memory_bytes": 2**20})
    return folder


def result(task: str, solved: Sequence[bool]) -> EvaluationResult:
    episodes = tuple(
        EpisodeRecord(task, EVALUATION + k, 1000.0 if one else 10.0, 200, bool(one), bool(one), 50 if one else -1)
        for k, one in enumerate(solved)
    )
    spec = envs.env_spec(task)
    return EvaluationResult(task, episodes, spec.protocol, spec.reports_success)


def make_study(
    root: Path, methods: Sequence[str], rate: Callable[[str, int, int], float], seeds: int = 5, goals: int = 50
) -> Path:
    """Runs on two tasks; ``rate(method, task index, seed)`` is the share of goals solved."""
    for method in methods:
        for index, task in enumerate(("reach-v3", "push-v3")):
            for seed in range(seeds):
                count = round(rate(method, index, seed) * goals)
                solved = [k < count for k in range(goals)]
                make_run(root / task / method / f"seed_{seed}", task, solved, f"adapter={method}", f"seed={seed}")
    return root
