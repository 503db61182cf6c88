"""The benchmark: what it refuses before it starts, what it runs, and that a killed one continues to the same report."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from eva_rl.agents.policy_folder import save_policy
from eva_rl.benchmark import command as benchmark
from eva_rl.benchmark.command import BenchmarkConfig
from eva_rl.benchmark.grid import override
from eva_rl.cli.parsing import parse
from eva_rl.cli.values import split_list, value_of
from eva_rl.errors import UserError
from eva_rl.finetune import command as finetune
from eva_rl.launch import multirun
from eva_rl.launch.jobs import Job, LaunchOptions
from eva_rl.launch.multirun import combinations, launch_options
from tests.conftest import make_policy

TINY = ["data.episodes=1", "data.workers=1", "data.only_successes=false", "algo.updates=4", "algo.batch_size=4"]
TINY += ["eval.episodes=4", "eval.every=2", "eval.quick_episodes=2", "env.horizon=30", "tracker=[]"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies") / "base"
    save_policy(folder, make_policy())
    return folder


def grid(base: Path, out: Path, *more: str) -> list[str]:
    passed = [f"finetune.{override}" for override in [f"policy={base}", *TINY]]
    return ["tasks=reach-v3+push-v3", "methods=[lora,eva,head]", "seeds=2", f"out={out}", *passed, *more]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [row for row in csv.DictReader(file) if row["table"] != "cost"]


def test_what_is_typed() -> None:
    config: BenchmarkConfig = parse("benchmark", ["tasks=cw10", "methods=[lora,eva]", "seeds=3"])
    study = config.grid()
    assert (len(study.tasks), list(study.methods), study.seeds) == (10, ["lora", "eva"], [0, 1, 2])
    config = parse("benchmark", ["tasks=[push-v3,reach-v3+push-v3]", "methods=full+head", "seeds=[4,2]"])
    study = config.grid()
    assert study.tasks == ["metaworld/push-v3", "metaworld/reach-v3"]
    assert (study.methods, study.seeds) == ({"full": {"adapter": "full"}, "head": {"adapter": "head"}}, [4, 2])
    config = parse(
        "benchmark",
        [
            "set=[algo=odt,adapter.targets=[q_proj,v_proj]]",
            "finetune.data=expert:push-v3?episodes=3",
            "finetune.algo.updates=2",
        ],
    )
    assert config.set == [
        "algo=odt", "adapter.targets=[q_proj,v_proj]", "data=expert:push-v3?episodes=3", "algo.updates=2",
    ]  # fmt: skip
    assert split_list("a=1") == ["a=1"]
    assert split_list("['a=b,c',d={e:1,f:2}]") == ["'a=b,c'", "d={e:1,f:2}"]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("methods=[lora,evva]", "Did you mean 'eva'"),
        ("tasks=push-v33", "push-v3"),
        ("seeds=none", "a number of seeds"),
        ("seeds=[]", "a number of seeds"),
        ("finetune.algo.update=3", "update"),
        ("finetune.seed=3", "a benchmark sets that through seeds="),
        ("finetune.adapter=eva", "methods="),
        ("set=[updates]", "expected KEY=VALUE"),
        ("finetune.adapter.targets=[nowhere]", "nowhere"),
        ("finetune.policy=nowhere", "nowhere"),
        ("tasks=mujoco/hopper", "observation"),
        ("launcher=rya", "Did you mean 'ray'"),
        ("out=", "out= is empty"),
        ("methods=[]", "methods=[] names none"),
        ("launchr=ray", "launchr"),
    ],
)
def test_mistakes_are_found_before_anything_starts(
    typed: str, message: str, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(grid(base, tmp_path / "out", typed)) == 2
    assert message in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["finetune.data=expert"], "No scripted expert for Hopper-v5"),
        (["finetune.data=d4rl:x.hdf5", "finetune.eval.demonstrations=2"], "and Hopper-v5 has none. Leave the key out"),
    ],
)
def test_tasks_without_an_expert_are_found_before_anything_starts(
    typed: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every run of them failed."""
    command = ["tasks=Hopper-v5", "finetune.policy=hopper", "methods=lora", "seeds=1", f"out={tmp_path / 'out'}"]
    assert benchmark.main([*command, *typed]) == 2
    assert message in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("d4rl:x.hdf5", "No data at x.hdf5"),
        ("x.npz", "No data at x.npz"),
        ("trajectories:x.npz?actions=keep", "No data at x.npz"),
        ("csv:x", "csv"),
    ],
)
def test_files_that_are_not_there_are_found_before_anything_starts(
    source: str, message: str, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every run of them failed."""
    assert benchmark.main(grid(base, tmp_path / "out", f"finetune.data={source}")) == 2
    assert message in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_study_of_own_data_says_how_each_seed_draws_its_own(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "a.npz"
    data.write_bytes(b"")
    words = ["finetune.data.episodes=3", f"finetune.data={data}"]
    with pytest.raises(UserError, match=r"same demonstrations: data.episodes=3.*data.sample=3"):
        benchmark.benchmark(parse("benchmark", grid(base, tmp_path / "out", *words)))


@pytest.mark.slow
def test_failures_are_listed_with_their_logs(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A folder in the way makes one run fail; the others count, and mending it completes the benchmark."""
    out = tmp_path / "out"
    only = ["tasks=reach-v3", "methods=[lora,head]", "seeds=1", "retries=0", "jobs=2"]
    in_the_way = out / "reach-v3" / "lora" / "seed_0" / "notes.txt"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("mine")
    assert benchmark.main(grid(base, out, *only)) == 2
    shown = " ".join(capfd.readouterr().err.split())
    assert "Failed: reach-v3/lora/seed_0" in shown
    assert "is not empty and not a run" in shown.replace("\n", " ")
    assert str(out / "logs" / "reach-v3-lora-seed_0.log") in shown
    assert {row["method"] for row in rows(out / "report" / "report.csv") if row["method"]} == {"head"}
    in_the_way.unlink()
    assert benchmark.main(grid(base, out, *only)) == 0
    assert {row["method"] for row in rows(out / "report" / "report.csv") if row["method"]} == {"head", "lora"}
    capfd.readouterr()
    assert benchmark.main(grid(base, out, *only, "finetune.algo.updates=5")) == 2
    assert "other settings of algo.updates" in " ".join(capfd.readouterr().err.split())
    assert benchmark.main(grid(base, out, *only, "finetune.algo.log_every=1", "finetune.env.timeout=99")) == 0


def test_sweeps_are_hydras() -> None:
    found = combinations(["env=push-v3,reach-v3", "seed=range(0,2)", "data=expert:push-v3?episodes=3", "algo.loss=l1"])
    assert {fixed for fixed, _ in [(tuple(f), s) for f, s in found]} == {
        ("data=expert:push-v3?episodes=3", "algo.loss=l1")
    }
    assert [swept for _, swept in found] == [
        ["env=push-v3", "seed=0"], ["env=push-v3", "seed=1"], ["env=reach-v3", "seed=0"], ["env=reach-v3", "seed=1"],
    ]  # fmt: skip
    assert combinations(["seed=3"]) == [(["seed=3"], [])]
    with pytest.raises(UserError, match="List the values"):
        combinations(["seed=interval(0,2)"])
    with pytest.raises(UserError, match="List the values"):
        combinations(["env=glob(*)"])
    with pytest.raises(UserError, match="Keys: launcher, jobs"):
        launch_options(["job=3"])


def test_swept_values_reach_the_command_as_typed() -> None:
    """Hydra's sweeper writes a backslash before each colon."""
    swept = combinations(["env=own:A-v0,own:B-v0", "data=d4rl:a.h5,minari:mujoco/x-v0", "env.kwargs={g:1},{g:2}"])
    assert swept[0][1] == ["env=own:A-v0", "data=d4rl:a.h5", "env.kwargs={g:1}"]
    assert swept[-1][1] == ["env=own:B-v0", "data=minari:mujoco/x-v0", "env.kwargs={g:2}"]


def test_a_sweep_is_checked_before_it_starts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert finetune.main(["-m", "env=push-v3,reach-v3", "algo.update=3", f"run_dir={tmp_path / 'out'}"]) == 2
    assert "update" in capfd.readouterr().err
    from eva_rl import evaluate

    assert evaluate.main(["--multirun", "env=push-v3,reach-v3"]) == 2
    assert "--multirun sweeps finetune and pretrain" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "typed",
    [
        ["env=push-v3,reach-v3", "adapter.rank=2", "run_dir=mz", "multirun.launcher=ray", "multirun.gpus_per_run=1"],
        ["--env", "push-v3,reach-v3", "--adapter.rank=2", "--run-dir", "mz", "--multirun.launcher=ray",
         "--multirun.gpus-per-run", "1"],
    ],
)  # fmt: skip
def test_a_sweep_takes_keys_with_dashes(typed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--env`` was not swept, and ``--run_dir`` named the folder of nothing."""
    launched: list[tuple[list[Job], LaunchOptions]] = []
    monkeypatch.setattr(multirun, "launch", lambda jobs, done, options, logs: launched.append((jobs, options)) or [])
    monkeypatch.chdir(tmp_path)
    assert finetune.main(["--multirun", *typed]) == 0
    ((jobs, options),) = launched
    assert [job.done.parent for job in jobs] == [tmp_path / "mz" / f"env={task}" for task in ("push-v3", "reach-v3")]
    assert (options.launcher, options.gpus_per_run) == ("ray", 1)
    assert all("adapter.rank=2" in job.command for job in jobs)


@pytest.mark.parametrize(
    ("words", "threads", "most"),
    [(["seed=0,1"], [2, 2], 2), (["threads=4", "seed=0,1"], [4, 4], 4), (["threads=2,4"], [2, 4], 4)],
)
def test_a_sweep_has_the_threads_that_are_typed(
    words: list[str], threads: list[int], most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swept ones gave way to one, under names that said otherwise; four times the threads ran as one would."""
    launched: list[tuple[list[Job], LaunchOptions]] = []
    monkeypatch.setattr(multirun, "launch", lambda jobs, _, options, *__: launched.append((jobs, options)) or [])
    multirun.multirun("finetune", ["env=push-v3", *words, f"run_dir={tmp_path}", "multirun.threads=2"])
    ((jobs, options),) = launched
    assert [parse("finetune", list(job.command[1:])).threads for job in jobs] == threads
    assert [job.threads for job in jobs] == threads
    assert options.threads == most


def test_a_sweep_whose_runs_would_share_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="share the folder policy=runs-a"):
        multirun.multirun("finetune", ["env=push-v3", "policy=runs/a,runs-a", f"run_dir={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_runs_below_a_run_are_refused(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Reports saw the one above alone."""
    (tmp_path / "summary.json").write_text("{}")
    assert benchmark.main(grid(base, tmp_path)) == 2
    assert "is the directory of a single run (it holds summary.json)" in " ".join(capfd.readouterr().err.split())
    with pytest.raises(UserError, match=r"single run .* Name another run_dir="):
        multirun.multirun("finetune", ["env=push-v3", "seed=0,1", f"run_dir={tmp_path}"])
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_the_folder_of_a_sweep_is_the_same_for_all_its_runs(tmp_path: Path) -> None:
    """Each run got one of its own, which neither the report nor the same sweep found again."""
    with pytest.raises(UserError, match=r"run_dir=.*\$\{seed\}: a sweep has one folder.*Name it without"):
        multirun.multirun("finetune", ["env=push-v3", "seed=0,1", f"run_dir={tmp_path}/j-${{seed}}"])


def test_settings_of_a_study_arrive_as_they_are_written() -> None:
    written = {"data.source": "'q'", "eval.at": [1, 2], "algo.updates": "${seed}"}
    config = parse("finetune", ["env=push-v3", "seed=3", *map(override, written.items())])
    assert config.data.source == "'q'"
    assert config.eval.at == [1, 2]
    assert config.algo.updates == 3
    assert value_of("k", list[str], override(("k", ["a, b", "c"])).removeprefix("k=")) == ["a, b", "c"]


@pytest.mark.parametrize("empty", ["run_dir=", "run_dir=''"])
def test_a_sweep_without_a_folder_gets_a_new_one(empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty ``run_dir=`` put the runs into the current folder."""
    launched: list[Job] = []
    monkeypatch.setattr(multirun, "launch", lambda jobs, *others: launched.extend(jobs) or [])
    monkeypatch.chdir(tmp_path)
    assert finetune.main(["--multirun", "env=push-v3,reach-v3", empty]) == 0
    assert {job.done.parents[2] for job in launched} == {tmp_path / "runs"}


@pytest.mark.slow
def test_multirun(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    typed = [
        "--multirun",
        "env=reach-v3",
        "adapter=head,lora",
        "seed=0",
        f"policy={base}",
        *TINY,
        f"run_dir={tmp_path}/it's",
    ]
    assert finetune.main([*typed, "multirun.jobs=2"]) == 0
    assert {p.parent.name for p in tmp_path.glob("it's/*/summary.json")} == {"adapter=head", "adapter=lora"}
    capfd.readouterr()
    assert finetune.main([*typed, "multirun.jobs=2"]) == 0
    assert "2 of them finished before" in capfd.readouterr().err
    assert finetune.main([*typed, "algo.updates=9"]) == 2, "they were taken for finished runs of these settings"
    assert "holds a finished run with other settings of algo.updates" in " ".join(capfd.readouterr().err.split())


def start(argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "eva_rl.benchmark", *argv]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)


def finished(out: Path) -> int:
    return len(list(out.glob("*/*/*/summary.json")))


@pytest.mark.slow
def test_killed_and_started_again_it_reports_the_same(base: Path, tmp_path: Path) -> None:
    """2 tasks, 3 methods, 2 seeds: killed without a chance to clean up, interrupted, and then left alone."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    jobs = f"jobs={max(2, len(os.sched_getaffinity(0)))}"
    for number in (signal.SIGKILL, signal.SIGTERM):
        before = finished(killed)
        process = start(grid(base, killed, jobs))
        while finished(killed) < before + 3:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        status = process.wait()
        assert status == (-9 if number == signal.SIGKILL else 128 + signal.SIGTERM)
        assert finished(killed) < 12
    assert benchmark.main(grid(base, killed, jobs)) == 0
    assert benchmark.main(grid(base, alone, jobs)) == 0
    assert finished(killed) == finished(alone) == 12
    found = rows(killed / "report" / "report.csv")
    assert found == rows(alone / "report" / "report.csv")
    assert {row["method"] for row in found if row["table"] == "aggregate"} == {"lora", "eva", "head"}
    assert {row["runs"] for row in found if row["table"] == "aggregate"} == {"4"}
