"""Killed at any moment of any phase, and continued by the same command, a run ends as one that was left alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from eva_rl.agents.policy_folder import save_policy
from eva_rl.benchmark.command import main as benchmark
from eva_rl.finetune.command import main as finetune
from eva_rl.launch.jobs import Ended, Job, Running
from eva_rl.launch.launchers import LocalLauncher
from eva_rl.tracking.tracker import read_metrics
from tests.conftest import make_policy
from tests.faults.killing import Command

TASK = ["env=reach-v3", "env.horizon=10", "data.episodes=1", "data.workers=1", "data.only_successes=false"]
TASK += ["eval.episodes=2", "eval.quick_episodes=1", "adapter.rank=2", "adapter.eva.max_batches=2", "threads=1"]
BC = ["algo.updates=6", "algo.batch_size=4", "eval.every=2", "checkpoint.every=2"]
ONLINE = ["algo=bc_then_odt_td3", "algo.bc.updates=3", "algo.bc.batch_size=4", "checkpoint.every=2", "algo.num_envs=2"]
ONLINE += ["algo.env_steps=80", "algo.eval_every=40", "algo.checkpoint_every=40", "algo.steps_per_iteration=20"]
ONLINE += ["algo.updates_per_iteration=2", "algo.batch_size=4", "algo.critic_warmup=2", "algo.policy_delay=1"]
RESIDUAL = ["algo=bc_then_residual", "algo.learning_starts=20", "algo.distill.updates=3", "algo.distill.batch_size=4"]
RESIDUAL += [
    "algo.embedding_size=8",
    "algo.distill.rounds=1",
    "algo.distill.env_steps=20",
    *(o for o in ONLINE[1:] if "policy_delay" not in o),
]
GRID = ["tasks=reach-v3", "methods=[lora,head]", "seeds=1", "jobs=1"]
COMMANDS = {"bc": BC, "online": ONLINE, "residual": RESIDUAL}
KILLS = {
    "bc": {"start": 4, "data": 2, "evaluation": 3, "eva": 2, "record": 2, "train": 3, "checkpoint": 3, "save": 2},
    "online": {"record": 2, "evaluation": 2, "train": 2, "checkpoint": 3, "save": 2},
    "residual": {"train": 2, "checkpoint": 2, "distillation": 2},
    "benchmark": {"start": 2, "save": 2, "keep": 2, "report": 2},
}
"""How often each command is killed in each phase: at its first moment, its last, and others between."""
CASES = [(kind, phase, n) for kind, phases in KILLS.items() for phase, kills in phases.items() for n in range(kills)]
MEASURED = ("second", "time", "memory", "sha256", "files", "versions")
READ_AS_THEY_ARE = ("runs.csv", "config.yaml", "adapter_config.json", "study.yaml")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Lab:
    """Where a command is run, once undisturbed for each kind.

    Args:
        folder: For everything.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_policy(folder / "base", make_policy())

    def command(self, kind: str) -> Command:
        policy = f"policy={self.folder / 'base'}"
        if kind == "benchmark":
            passed = [f"finetune.{override}" for override in [policy, *TASK[1:-1], *BC, "tracker=[]"]]
            return Command(benchmark_in_one_process, [*GRID, "out={out}", *passed])
        return Command(finetune, [policy, "run_dir={out}", *TASK, *COMMANDS[kind]])

    @cache  # noqa: B019 - lives as long as the module's tests
    def undisturbed(self, kind: str) -> tuple[list[str], dict[str, Any]]:
        """Phases of all moments, and what the run leaves behind."""
        out = self.folder / kind
        return self.command(kind).moments(out), contents(out)


def benchmark_in_one_process(argv: Sequence[str]) -> int:
    """The benchmark, with its runs where they are killed together with it."""

    def start(launcher: LocalLauncher, job: Job) -> Running:
        assert finetune(job.command[1:]) == 0
        return Ended()

    LocalLauncher.start = start  # type: ignore[method-assign] - of a process that ends here
    return benchmark(argv)


def contents(out: Path) -> dict[str, Any]:
    """Everything in a folder that is the same in every run, by file."""
    files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    found = {name: content(path, out) for name, path in files.items() if "/tb/" not in f"/{name}"}
    points = {f"{folder.relative_to(out)}": scalars(folder) for folder in out.rglob("tb")}
    return found | points


def content(path: Path, out: Path) -> Any:
    """What a file says, but for the time and the memory that a run took, and where it lies."""
    if path.name in READ_AS_THEY_ARE or path.suffix == ".safetensors":
        return path.read_bytes().replace(str(out).encode(), b"OUT")
    if path.suffix == ".json" and path.name != "versions.json":
        return timeless(json.loads(path.read_text().replace(str(out), "OUT")))
    if path.name == "metrics.jsonl":
        return timeless(read_metrics(path.parent))
    return None


def timeless(value: Any) -> Any:
    if isinstance(value, list):
        return [timeless(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: timeless(item) for key, item in value.items() if not any(word in key for word in MEASURED)}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "time/" not in tag]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize(("kind", "phase", "which"), CASES)
def test_killed_and_continued(kind: str, phase: str, which: int, lab: Lab) -> None:
    phases, expected = lab.undisturbed(kind)
    moments = [index for index, name in enumerate(phases) if name == phase]
    kills = KILLS[kind][phase]
    assert len(moments) >= kills
    moment = moments[which * (len(moments) - 1) // (kills - 1)]
    out = lab.folder / f"{kind}-{phase}-{which}"
    lab.command(kind).killed(out, moment)
    if kind == "benchmark" or not (out / "summary.json").exists():  # else it was the last thing that the run wrote
        lab.command(kind).finished(out)
    found = contents(out)
    different = {name: (found.get(name), expected.get(name)) for name in found.keys() | expected.keys()}
    assert {name: pair for name, pair in different.items() if pair[0] != pair[1]} == {}
