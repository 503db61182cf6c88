"""The main job, in process and as a user starts it."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from eva_rl import collect, evaluate
from eva_rl.adapters import METHODS
from eva_rl.agents.policy_folder import save_policy
from eva_rl.cli.parsing import parse
from eva_rl.configs.algorithms import ALGORITHMS
from eva_rl.configs.finetune import AdapterOptions
from eva_rl.errors import UserError
from eva_rl.finetune import command as finetune
from eva_rl.finetune.adapter import warn_of_unused
from eva_rl.finetune.session import check_processes
from eva_rl.tracking.tracker import read_metrics
from tests import forks
from tests.adapters.making import usual_first
from tests.conftest import make_policy

SMALL = ["env=reach-v3", "data.episodes=2", "data.workers=1", "algo.updates=6", "algo.batch_size=8", "threads=1"]
SMALL += ["eval.episodes=2", "env.horizon=40", "data.only_successes=false", "checkpoint.every=2", "seed=3"]
SMALL += ["tracker=[]"]
OFTEN = ("lora", "eva_dora", "miss", "full")
"""One method of each kind; the others are slow tests."""


def small_run(base: Path, run_dir: Path, *more: str) -> int:
    return finetune.main([f"policy={base}", f"run_dir={run_dir}", *SMALL, *more])


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "wall_time" and not k.startswith("time/")} for row in rows]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies") / "base"
    save_policy(folder, make_policy())
    return folder


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    assert small_run(base, run_dir, "tracker=[tensorboard]") == 0
    return run_dir


def test_the_run_directory_is_complete(finished: Path) -> None:
    present = {path.relative_to(finished).as_posix() for path in finished.rglob("*")}
    assert present >= {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "eva_report.json",
        "evaluation.json",
        "versions.json",
        "tb",
        "checkpoint",
        "data/reach-v3.h5",
        "policy/policy.json",
        "policy/model.safetensors",
        "policy/README.md",
        "policy/adapter/adapter_config.json",
        "policy/adapter/adapter_model.safetensors",
    }
    summary = read(finished / "summary.json")
    assert {"env", "method", "seed", "eval/success_rate", "eval/mean_reward"} <= summary.keys()
    assert {"eval_before/success_rate", "eval_before/mean_reward", "trainable_parameters", "seconds"} <= summary.keys()
    assert summary["env"] == "metaworld/reach-v3"
    assert 0 < summary["trainable_parameters"] < summary["total_parameters"]
    report = read(finished / "eva_report.json")
    assert report["data"]["hash"] == summary["data"]["hash"]
    assert report["stopped"] in {"converged", "max_batches"}
    assert set(report["layers"]) == {f"blocks.{i}.{part}" for i in range(2) for part in LAYERS}


LAYERS = [f"attention.{p}_proj" for p in "qkvo"] + ["mlp.up_proj", "mlp.down_proj"]


def test_metrics_and_tensorboard_agree(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tb"))
    events.Reload()
    rows = read_metrics(finished)
    for key in ("train/loss", "eval/mean_reward", "eval/success_rate"):
        logged = [(row["step"], row[key]) for row in rows if key in row]
        assert logged
        assert [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(key)] == logged


def test_success_is_watched_while_training(base: Path, tmp_path: Path) -> None:
    more = ["eval.every=2", "eval.quick_episodes=3", "adapter=head"]
    assert small_run(base, tmp_path / "run", *more) == 0
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "validation/success_rate" in row] == [2, 4]
    assert [row["step"] for row in rows if "eval/success_rate" in row] == [0, 6]


def test_same_seed_same_metrics(base: Path, finished: Path, tmp_path: Path) -> None:
    assert small_run(base, tmp_path / "again") == 0
    assert timeless(read_metrics(tmp_path / "again")) == timeless(read_metrics(finished))
    assert small_run(base, tmp_path / "other", "seed=4", "data.seed=1") == 0
    assert timeless(read_metrics(tmp_path / "other")) != timeless(read_metrics(finished))


@pytest.mark.slow
def test_evaluated_again_in_a_new_process_the_result_is_identical(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "again.json"
    command = [sys.executable, "-m", "eva_rl.evaluate", f"policy={finished}", "eval.episodes=2", f"out={out}"]
    subprocess.run([*command, "env.horizon=40", "threads=1"], check=True, cwd=tmp_path, timeout=300)
    again = read(out)["tasks"]["metaworld/reach-v3"]
    assert again["episodes"] == read(finished / "evaluation.json")["after"]["episodes"]
    summary = read(finished / "summary.json")
    for key in ("eval/success_rate", "eval/mean_reward"):
        assert again["metrics"][key] == summary[key]


@pytest.mark.slow
def test_a_finetuned_policy_can_be_finetuned_again(finished: Path, tmp_path: Path) -> None:
    assert small_run(finished, tmp_path / "second", "adapter=lora") == 0
    first, second = read(finished / "summary.json"), read(tmp_path / "second" / "summary.json")
    assert second["eval_before/mean_reward"] == pytest.approx(first["eval/mean_reward"], rel=1e-4)
    assert second["total_parameters"] == first["total_parameters"], "the first adapter was folded in"


@pytest.mark.parametrize("method", usual_first((method for method in METHODS if method != "eva"), OFTEN))
def test_every_method_runs(method: str, base: Path, tmp_path: Path) -> None:
    tiny = ["algo.updates=4", "env.horizon=16", "eval.episodes=1"]
    assert small_run(base, tmp_path / method, f"adapter={method}", *tiny) == 0
    summary = read(tmp_path / method / "summary.json")
    assert summary["method"] == method
    assert (tmp_path / method / "policy" / "adapter").exists() == METHODS[method].adapter
    report = tmp_path / method / "eva_report.json"
    has_start = METHODS[method].adapter and not METHODS[method].miss  # MiSS has no A that could be measured
    assert report.exists() == has_start
    if has_start:
        start = read(report)["start"]
        assert len(start) == 12
        assert all(layer["gain"] >= 0 for layer in start.values())
        assert ("layers" in read(report)) == METHODS[method].eva


def test_settings_that_an_adapter_does_not_use_are_named(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_unused(AdapterOptions(method="lora", rank=2, rho=2.0, tau=0.5))
    assert "adapter=lora does not use adapter.rho=2.0, adapter.tau=0.5." in caplog.text
    caplog.clear()
    warn_of_unused(AdapterOptions(method="full", rank=4))
    assert "adapter=full does not use adapter.rank=4." in caplog.text
    caplog.clear()
    for method, key, value in [("miss", "alpha", 64.0), ("eva_adalora", "rho", 2.0)]:
        caplog.clear()
        warn_of_unused(AdapterOptions(method=method, **{key: value}))
        assert f"adapter={method} does not use adapter.{key}={value}." in caplog.text
    caplog.clear()
    warn_of_unused(AdapterOptions(method="eva", rank=4, rho=2.0, dropout=0.1), ALGORITHMS["bc_then_ppo"])
    assert caplog.text == ""
    warn_of_unused(AdapterOptions(method="eva", dropout=0.1), ALGORITHMS["ppo"])
    assert "algo=ppo does not use adapter.dropout=0.1" in caplog.text


def test_data_from_a_file(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demos.h5"
    assert collect.main(["env=reach-v3", "episodes=2", f"out={out}", "workers=1", "env.horizon=60"]) == 0
    assert f"To use them: data={out}" in capsys.readouterr().err
    assert small_run(base, tmp_path / "run", f"data={out}") == 0
    assert read(tmp_path / "run" / "summary.json")["data"]["steps"] == 120


def test_killed_and_continued_equals_uninterrupted(
    base: Path, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The process dies while it trains; the same command goes on and ends as if nothing had happened."""
    run_dir = tmp_path / "killed"
    assert forks.killed_at_checkpoint(partial(small_run, base, run_dir), 4, tmp_path / "log")
    assert not (run_dir / "summary.json").exists()
    assert "Before" in (tmp_path / "log").read_text()
    spent, last = read(run_dir / "phases.json"), read_metrics(run_dir)[-1]["wall_time"]
    capfd.readouterr()
    assert small_run(base, run_dir) == 0
    said = capfd.readouterr().err
    assert "Continuing from the checkpoint of step 4." in said
    assert "Training (gradient steps): 4 of 6" in said
    assert "After" in said
    assert "Before" not in said, "what was evaluated before the interruption is not played again"
    assert read(run_dir / "evaluation.json") == read(finished / "evaluation.json")
    assert timeless(read_metrics(run_dir)) == timeless(read_metrics(finished))
    seconds = read(run_dir / "summary.json")["seconds"]
    assert list(seconds) == list(read(finished / "summary.json")["seconds"])
    assert all(seconds[phase] > before for phase, before in spent["seconds"].items())
    assert seconds["train"] > last - spent["wall_time"] > 0
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (run_dir / "policy" / name).read_bytes() == (finished / "policy" / name).read_bytes()


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    error = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in error
    for word in words:
        assert word in error


def test_a_misspelt_task(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert small_run(base, tmp_path / "run", "env=pusch-v3") == 2
    refused(capsys, "'pusch-v3'", "push-v3", "--help")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter.rnk=4", ["rnk"]),
        ("adapter=evva", ["'evva'", "'eva'"]),
        ("algo.updates=0", ["algo.updates=0", "above 0"]),
        ("algo.updates=many", ["many", "whole number"]),
        ("algo.loss=l3", ["algo.loss", "'l3'", "l1"]),
        ("device=tpu9", ["device=tpu9"]),
        ("policy=nowhere", ["'nowhere'"]),
        ("adapter.targets=[query]", ["'query'", "q_proj"]),
        ("env=", ["''"]),
    ],
)
def test_wrong_settings(
    override: str, words: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert small_run(base, tmp_path / "run", override) == 2
    refused(capsys, *words)


def test_a_missing_data_file(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert small_run(base, tmp_path / "run", f"data={tmp_path}/nothing.h5") == 2
    refused(capsys, "nothing.h5", "eva_rl.collect")


def test_dimensions_that_do_not_fit(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert small_run(base, tmp_path / "run", "env=mujoco/hopper") == 2
    refused(capsys, "Hopper-v5", "11", "39")


def test_a_finished_run_is_not_overwritten(base: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert small_run(base, finished) == 2
    refused(capsys, "finished run", "run_dir=")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_a_folder_of_something_else_is_not_touched(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert small_run(base, tmp_path) == 2
    refused(capsys, "not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unfinished_run_with_other_settings(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    assert small_run(base, tmp_path / "run", f"data={tmp_path}/nothing.h5") == 2
    assert small_run(base, tmp_path / "run", "algo.updates=2", "adapter=head") == 0, "nothing had begun"
    (tmp_path / "run" / "summary.json").unlink()
    assert small_run(base, tmp_path / "run", "algo.updates=4", "adapter=head") == 2
    refused(capsys, "other settings", "algo")


def test_a_full_disk(base: Path, tmp_path: Path) -> None:
    """No file may grow beyond 60 kB: the checkpoint cannot be written, and what is there stays whole."""

    def limited() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000))
        return small_run(base, tmp_path / "run", "adapter=full")

    status, said = forks.status(limited, tmp_path / "log"), (tmp_path / "log").read_text()
    assert status == 2, said
    assert "could not be written" in " ".join(said.split())
    assert "Traceback" not in said
    assert list((tmp_path / "run").rglob("*.partial")) == []
    assert not (tmp_path / "run" / "summary.json").exists()


def test_help_explains_and_lists_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (finetune, evaluate, collect):
        assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("Examples", "adapter.rank=8", "metaworld/push-v3", "Hopper-v5", "eval.episodes=50"):
        assert word in text


def test_processes_share_held_out_episodes_and_no_online_learning() -> None:
    check_processes(parse("finetune", ["eval.episodes=2"]), 2)
    check_processes(parse("finetune", ["algo=odt"]), 1)
    with pytest.raises(UserError, match=r"eval\.episodes=2: 3 processes .*expected at least eval\.episodes=3"):
        check_processes(parse("finetune", ["eval.episodes=2"]), 3)
    with pytest.raises(UserError, match=r"algo=odt runs in a single process; this run has 2"):
        check_processes(parse("finetune", ["algo=odt"]), 2)
