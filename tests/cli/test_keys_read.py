"""Each command shows the keys that it reads, and no others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from eva_rl import collect, datasets, doctor, evaluate, export, pretrain
from eva_rl.benchmark import command as benchmark
from eva_rl.cli.parsing import parse
from eva_rl.data import Trajectories, write_episodes
from eva_rl.finetune import command as finetune
from eva_rl.report import command as report
from eva_rl.rollouts.experts import collect_expert  # noqa: F401 - imported before reading is recorded
from tests.report.making_runs import make_study

AT_ONCE = {"env.reward", "env.kwargs", "env.goal"}
"""Read when the config is made: they become part of the task's name."""
NOT_READING = ("dataclasses.py", "options.py", "omegaconf")
"""Files that read every field, whatever a command does with it."""


def groups(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    yield prefix, config
    for f in fields(config):
        if is_dataclass(value := object.__getattribute__(config, f.name)):
            yield from groups(value, f"{prefix}{f.name}.")


def record(config: Any, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the keys that are read from now on."""
    read: set[str] = set()
    names = {id(group): prefix for prefix, group in groups(config)}

    def get(instance: Any, name: str) -> Any:
        caller = sys._getframe(1)
        prefix = "" if type(instance) is type(config) else names.get(id(instance))  # a command may change a copy
        if prefix is not None and not any(part in caller.f_code.co_filename for part in NOT_READING):
            read.add(prefix + name)
        return object.__getattribute__(instance, name)

    for kind in {type(group) for _, group in groups(config)}:
        monkeypatch.setattr(kind, "__getattribute__", get, raising=False)
    return read


def keys(config: Any) -> set[str]:
    return {
        prefix + f.name
        for prefix, group in groups(config)
        for f in fields(group)
        if not is_dataclass(object.__getattribute__(group, f.name))
    }


COLLECTED = ["env=reach-v3", "env.horizon=20", "data.episodes=2", "data.only_successes=false", "data.workers=1"]
RUN = ["run_dir=run", "threads=1"]
SMALL = ["algo.updates=2", "algo.batch_size=2", "size.hidden_size=16", "size.num_layers=1", "size.num_heads=2"]
UNREAD = {"resume", "algo.name", "algo.final_learning_rate", "size.name", "data.allow_pickle", "data.skip_damaged"}
"""Of pretraining: read for an unfinished run, a named size, the end of a longer training, and data from files."""
ROLLOUTS = {"adapter.eva.rollout_envs", "adapter.eva.rollout_steps"}
OF_A_COPY = {
    f"data.{name}" for name in ("episodes", "seed", "workers", "only_successes", "top", "first", "sample", "max_return")
}
"""Read where ``data=auto`` has been replaced by what it stands for."""
FINETUNE_UNREAD = UNREAD - {"size.name", "algo.name"} | ROLLOUTS | OF_A_COPY | {"eval.quick_episodes"}
"""Of fine-tuning by cloning: read by EVA from rollouts, by a longer training, for an unfinished run, and of a copy."""
PASSED = [f"finetune.{word}" for word in (*COLLECTED[1:], *SMALL[:2], "eval.episodes=1", "tracker=[]")]
LAUNCHERS = {"partition", "hours", "cluster", "address", "cpus_per_run", "gpus_per_run", "pilot"}
"""Of a benchmark: read by Ray and Slurm, and by plan=true."""
COMMANDS: dict[str, tuple[Any, list[str], set[str]]] = {
    "evaluate": (evaluate.evaluate, ["env=reach-v3", "env.horizon=12", "eval.episodes=1", "targets=[100,200]"], set()),
    "export": (export.export, ["out=exported"], {"private"}),
    "collect": (
        collect.collect,
        ["env=reach-v3", "env.horizon=20", "episodes=2", "only_successes=false", "workers=1", "out=x.h5"],
        {"expert.steps", "expert.until"},
    ),
    "doctor": (doctor.doctor, ["seconds=0.05"], set()),
    "datasets": (datasets.run, ["action=filter", "data=reach.h5", "data.first=1", "out=kept.h5"], set()),
    "finetune": (
        finetune.finetune,
        [*COLLECTED, *SMALL[:2], "eval.episodes=1", "run_dir=run", "threads=1"],
        FINETUNE_UNREAD,
    ),
    "pretrain": (pretrain.pretrain, [*COLLECTED, *SMALL, *RUN], UNREAD),
    "benchmark": (benchmark.benchmark, ["tasks=reach-v3", "methods=head", "seeds=1", "out=all", *PASSED], LAUNCHERS),
    "report": (report.report, ["studied", "out=compared", "replicates=20"], set()),
}
"""What runs each command, on what, and the keys that only another choice reads."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in {"benchmark", "doctor", "report"} else name
        for name in COMMANDS
    ],
)
def test_every_key_is_read(
    name: str,
    policy_folder: Path,
    reach_demonstrations: Trajectories,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_episodes(tmp_path / "reach.h5", reach_demonstrations)
    run, words, elsewhere = COMMANDS[name]
    words = words + [f"policy={policy_folder}"] * (name in {"evaluate", "export", "finetune"})
    words = words + [f"finetune.policy={policy_folder}"] * (name == "benchmark")
    if name == "report":
        make_study(tmp_path / "studied", ["eva", "lora"], lambda *_: 0.5, seeds=2, goals=10)
    config = parse(name, words)
    read = record(config, monkeypatch)
    run(config)
    unread = keys(config) - read - AT_ONCE - elsewhere
    assert not unread, " ".join(sorted(unread))


def test_evaluate_shows_nothing_of_training() -> None:
    shown = keys(parse("evaluate", []))
    assert not shown & {"run_dir", "resume", "eval.every", "eval.quick_episodes"}
