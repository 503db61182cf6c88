"""The formats of finished runs that ``benchmarks/fuzz/mutate.py`` mutates."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from benchmarks.fuzz.formats import Format
from eva_rl.benchmark.records import write_record
from eva_rl.cli.parsing import parse
from eva_rl.cli.run_dir import read_summary, write_summary
from eva_rl.errors import UserError
from eva_rl.finetune import command as _finetune  # noqa: F401 - registers its keys
from eva_rl.report.runs import read_record, read_runs

TASK = "metaworld/reach-v3"


def _make_run(folder: Path) -> None:
    run_dir = folder / "run"
    run_dir.mkdir()
    config = asdict(parse("finetune", ["env=reach-v3", "run_dir=run"]))
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    rows = [{"step": step, "wall_time": 1e9 + step, "validation/success_rate": step / 100} for step in (50, 100)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    episodes = [
        {"env_id": TASK, "episode_seed": seed, "episode_return": 10.0 + seed, "length": 200, "success": seed == 0}
        for seed in range(2)
    ]
    (run_dir / "evaluation.json").write_text(json.dumps({"after": {"episodes": episodes}}))
    (run_dir / "versions.json").write_text(json.dumps({"torch": "2.13.0", "machine": "x86_64"}))
    scores = {"eval/success_rate": 0.5, "eval/mean_reward": 10.5, "eval_before/success_rate": 0.0}
    write_summary(run_dir, {"env": TASK, "method": "eva", "seed": 0, **scores, "seconds": {"train": 1.0}})


def _read(folder: Path) -> str:
    """What a report knows of the run, where it knows of nothing that is wrong with it."""
    runs, problems = read_runs([folder / "run"])
    if problems:
        raise UserError("; ".join(problem.reason for problem in problems))
    return repr([(r.task, r.method, r.seed, r.settings, r.summary, r.goals, r.rows, r.versions) for r in runs])


def _make_record(folder: Path) -> None:
    _make_run(folder)
    write_record(folder / "record.json", folder / "run", "reach-v3/eva/seed_0")
    for path in (folder / "run").iterdir():
        path.unlink()
    (folder / "run").rmdir()


def _read_record(folder: Path) -> str:
    run = read_record(folder / "record.json")
    return repr((run.task, run.method, run.seed, run.settings, run.summary, run.goals, run.rows, run.versions))


FORMATS: dict[str, Format] = {
    "run directory": Format(_make_run, _read, ours=True),
    "summary": Format(_make_run, lambda folder: json.dumps(read_summary(folder / "run"), sort_keys=True), ours=True),
    "record of a run": Format(_make_record, _read_record, ours=True),
}
"""By name."""
