"""Run directories: which settings a continued run may change, what marks one, and what is never overwritten."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from eva_rl.cli.parsing import parse
from eva_rl.cli.run_dir import (
    CONFIG_FILE,
    FREE_BYTES,
    SUMMARY_FILE,
    changed_settings,
    flat_hyperparameters,
    open_run,
    read_summary,
    write_summary,
)
from eva_rl.errors import UserError
from eva_rl.files import read_yaml
from eva_rl.finetune import command  # noqa: F401 - registers the command

SUMMARY = {"env": "push-v3", "method": "eva", "seed": 3, "eval/success_rate": 0.5}


def config(run_dir: Path, *words: str) -> Any:
    return parse("finetune", ["env=push-v3", "policy=mt40", f"run_dir={run_dir}", *words])


def begun(run_dir: Path, *words: str) -> Path:
    """An unfinished run with a checkpoint."""
    open_run("finetune", config(run_dir, *words))
    (run_dir / "checkpoint").mkdir()
    return run_dir


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ([], set()),
        (["threads=3", "device=cuda", "tracker=[]", "video=true", "checkpoint.seconds=5", "resume=auto"], set()),
        (["algo.accumulate=2", "algo.compile=default", "algo.log_every=3", "data.workers=1"], set()),
        (["seed=4"], {"seed"}),
        (["env.horizon=10"], {"env.horizon"}),
        (["adapter.rank=3", "algo.updates=77"], {"adapter.rank", "algo.updates"}),
        (["adapter=lora"], {"adapter.method"}),
        (["adapter.rank_caps={q_proj:2}"], {"adapter.rank_caps"}),
    ],
)
def test_what_a_continued_run_may_change(words: Sequence[str], changed: set[str], tmp_path: Path) -> None:
    run_dir = begun(tmp_path / "run")
    assert set(changed_settings(run_dir, config(run_dir, *words))) == changed


def test_a_table_that_was_empty_and_one_that_was_not(tmp_path: Path) -> None:
    empty, full = begun(tmp_path / "empty"), begun(tmp_path / "full", "adapter.rank_caps={q_proj:2,v_proj:3}")
    assert changed_settings(empty, config(empty, "adapter.rank_caps={q_proj:2}")) == {"adapter.rank_caps": {}}
    assert changed_settings(full, config(full)) == {"adapter.rank_caps.q_proj": 2, "adapter.rank_caps.v_proj": 3}
    assert changed_settings(full, config(full, "adapter.rank_caps={q_proj:2}")) == {"adapter.rank_caps.v_proj": 3}


def test_the_value_to_type_is_that_of_the_run(tmp_path: Path) -> None:
    run_dir = begun(tmp_path / "run", "algo.updates=50", "adapter=lora")
    with pytest.raises(UserError) as caught:
        open_run("finetune", config(run_dir, "algo.updates=60", "adapter=eva"))
    assert "algo.updates=50" in str(caught.value)
    assert "adapter.method=lora" in str(caught.value)
    assert (run_dir / "checkpoint").is_dir()
    again = open_run("finetune", config(run_dir, "algo.updates=50", "adapter=lora"))
    assert again == run_dir


def test_what_an_earlier_version_did_not_know_of_cloning_first_is_the_default(tmp_path: Path) -> None:
    """It was none of the defaults where those clone nothing, and the run was refused."""
    run_dir = begun(tmp_path / "run", "algo=bc_then_odt")
    old = read_yaml(run_dir / CONFIG_FILE)
    del old["algo"]["bc"]["ema"]
    (run_dir / CONFIG_FILE).write_text(OmegaConf.to_yaml(OmegaConf.create(old)))
    assert changed_settings(run_dir, config(run_dir, "algo=bc_then_odt")) == {}
    assert changed_settings(run_dir, config(run_dir, "algo=bc_then_odt", "algo.bc.ema=0.2")) == {"algo.bc.ema": 0.0}


def test_names_of_earlier_versions_are_those_of_today(tmp_path: Path) -> None:
    run_dir = begun(tmp_path / "run", "algo=odt", "algo.warmup_steps=7")
    old = read_yaml(run_dir / CONFIG_FILE)
    old["algo"]["warmup"] = old["algo"].pop("warmup_steps")
    old["algo"]["target_scale"] = 3  # did nothing
    del old["algo"]["updates_per_iteration"]  # was not known, and was what is the default now
    (run_dir / CONFIG_FILE).write_text(OmegaConf.to_yaml(OmegaConf.create(old)))
    assert changed_settings(run_dir, config(run_dir, "algo=odt", "algo.warmup_steps=7")) == {}
    changed = changed_settings(run_dir, config(run_dir, "algo=odt", "algo.warmup_steps=8"))
    assert changed == {"algo.warmup_steps": 7}
    old["algo"]["unheard_of"] = 1
    (run_dir / CONFIG_FILE).write_text(OmegaConf.to_yaml(OmegaConf.create(old)))
    assert changed_settings(run_dir, config(run_dir, "algo=odt", "algo.warmup_steps=7")) == {"algo.unheard_of": 1}


def test_before_the_first_checkpoint_any_settings_do(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    open_run("finetune", config(run_dir, "seed=1"))
    (run_dir / "data").mkdir()
    (run_dir / "held_out").mkdir()
    record = [run_dir / name for name in ("eva_report.json", "metrics.jsonl", "figures/eva_ranks.png", "tb/events")]
    for path in record:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    open_run("finetune", config(run_dir, "seed=1"))
    assert all(path.exists() for path in record)
    open_run("finetune", config(run_dir, "seed=2"))
    assert not any(path.exists() for path in record), "of a run with other settings"
    assert read_yaml(run_dir / CONFIG_FILE)["seed"] == 2
    assert (run_dir / "data").is_dir()
    open_run("finetune", config(run_dir, "seed=2", "eval.demonstrations=3"))
    assert (run_dir / "data").is_dir()
    assert not (run_dir / "held_out").exists(), "held-out demonstrations of other settings"
    (run_dir / "held_out").mkdir()
    open_run("finetune", config(run_dir, "seed=2", "eval.demonstrations=3", "env.horizon=9"))
    assert not (run_dir / "data").exists(), "demonstrations of other settings"
    assert not (run_dir / "held_out").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run_dir: write_summary(run_dir, SUMMARY), "holds a finished run, which is not overwritten"),
        (lambda run_dir: (run_dir / "thesis.tex").write_text("mine"), "not empty and not a run of eva-rl"),
        (begun, "Continue it with resume=auto"),
    ],
)
def test_what_is_not_overwritten(make: Any, message: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    make(run_dir)
    before = {path.name for path in run_dir.iterdir()}
    with pytest.raises(UserError, match=message):
        open_run("finetune", config(run_dir, "resume=never"))
    assert {path.name for path in run_dir.iterdir()} - {".lock"} == before - {".lock"}


def test_the_folder_is_named_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = open_run("finetune", parse("finetune", ["env=push-v3", "policy=mt40"]))
    assert run_dir.parent == Path("runs")
    assert capsys.readouterr().err == f"Run directory: {run_dir}\n"


def test_a_full_disk_is_said_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 10, FREE_BYTES - 1))
    with pytest.raises(UserError, match="a run needs 200 MiB"):
        open_run("finetune", config(tmp_path / "run"))
    assert not (tmp_path / "run" / CONFIG_FILE).exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"Name another run_dir="):
        open_run("finetune", config(tmp_path / "run/deep"))


def test_a_run_without_a_name_gets_one_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = parse("finetune", ["env=push-v3"])
    run_dir = open_run("finetune", options)
    assert run_dir.parent == Path("runs")
    assert run_dir.name.startswith("finetune-")


def test_a_summary_is_sealed_with_the_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    write_summary(tmp_path, SUMMARY)
    assert read_summary(tmp_path) == SUMMARY
    raw = json.loads((tmp_path / SUMMARY_FILE).read_text())
    assert list(raw["files"]) == ["metrics.jsonl"]
    raw["eval/success_rate"] = 0.6
    (tmp_path / SUMMARY_FILE).write_text(json.dumps(raw))
    with pytest.raises(UserError, match="does not match its own checksum"):
        read_summary(tmp_path)
    (tmp_path / SUMMARY_FILE).write_text(json.dumps({"env": "push-v3", "seed": "three", "method": "eva"}))
    with pytest.raises(UserError, match="seed"):
        read_summary(tmp_path)


def test_the_table_of_runs_shows_first_what_runs_differ_in(tmp_path: Path) -> None:
    shown = flat_hyperparameters(config(tmp_path / "run", "adapter=lora", "adapter.rank=3", "seed=5"))
    first = {"adapter": "lora", "algo": "bc", "env": "push-v3", "rank": 3, "seed": 5}
    assert dict(list(shown.items())[:5]) == first
    assert all(name.startswith("settings/") for name in list(shown)[5:])
    assert not any("run_dir" in key or "tracker" in key for key in shown)
    assert all(isinstance(value, str | int | float | bool | None) for value in shown.values())
