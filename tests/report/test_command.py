"""The report's command: its folder, its first lines, its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from eva_rl.errors import UserError
from eva_rl.report import command as report
from eva_rl.report.command import (
    ReportConfig,
    check_out,
    lead,
    nothing_to_compare,
    read_places,
    sections_of,
)
from eva_rl.report.comparison import analyse
from eva_rl.report.methods import group_tasks
from eva_rl.report.runs import ABOUT_FILE, Problem
from tests.report.making_groups import QUICK, make_run, make_runs
from tests.report.making_runs import make_study


@pytest.mark.parametrize(
    ("confidence", "shown"), [(0.95, "95%"), (0.975, "97.5%"), (0.999, "99.9%"), (0.57, "57%"), (0.5, "50%")]
)
def test_the_confidence_is_the_one_that_was_asked_for(confidence: float, shown: str) -> None:
    """0.999 was shown as 100%, 0.975 as 98%."""
    text = lead(make_runs({"a": {"t": [0.5]}}), ReportConfig(confidence=confidence))
    assert f"Intervals: {shown}, 2000 resamples, seed 0." in text


def test_the_first_lines_count_what_there_is() -> None:
    runs = make_runs({"a": {"t": [0.5, 0.6], "u": [0.1, 0.2]}})
    known = {"policy": "mt40", "updates": 80.0, "data": {"episodes": 5.0}}
    known_runs = [replace(run, summary={**run.summary, **known}, versions={"torch": "2.1"}) for run in runs]
    text = lead(known_runs, ReportConfig())
    assert text.startswith(
        "4 finished runs, 2 tasks, 2 seeds, starting from mt40. Updates: 80. Demonstrations: 5. torch: 2.1."
    )
    more = replace(
        known_runs[0], summary={**known_runs[0].summary, "updates": 20.0}, versions={"torch": "2.0"}, study="ab"
    )
    text = lead([more, *known_runs[1:]], ReportConfig())
    for part in ("Updates: 20 to 80. ", "torch: 2.0, 2.1. ", "Study file: SHA-256 ab. "):
        assert part in text
    assert "Updates" not in lead(runs, ReportConfig())


@pytest.mark.parametrize("name", [".", "..", "/", "x/..", "./"])
def test_a_folder_that_stands_open_is_not_replaced(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``out=.`` in an empty folder once ended in a traceback after all was computed."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"out=.* Name a new one: out=report"):
        check_out(name)


def test_only_a_report_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "report"
    assert check_out(str(out)) == out
    (out / "figures").mkdir(parents=True)
    (out / "report.md").write_text("")
    left = tmp_path / ".report.0a1b2c3d.partial"
    left.mkdir()
    other = tmp_path / ".other.0a1b2c3d.partial"
    other.mkdir()
    assert check_out(str(out)) == out
    assert (left.exists(), other.exists()) == (False, True)
    (out / "notes\n.txt").write_text("mine")
    with pytest.raises(UserError, match=r"something other than a report: notes \.txt\. Name another folder"):
        check_out(str(out))
    with pytest.raises(UserError, match="a file"):
        check_out(str(out / "report.md"))


def test_places_that_are_none() -> None:
    with pytest.raises(UserError, match=r"csv:~nobody-of-that-name/x: no CSV files"):
        read_places(["csv:~nobody-of-that-name/x"])
    problems = [Problem(Path(f"r{k}"), "damaged", "why") for k in range(5)]
    text = nothing_to_compare(["x"], [], problems)
    assert text.startswith("No finished, undamaged run among 5 (r0: damaged, why; r1")
    assert "Continue them" not in text
    unfinished = [*problems, Problem(Path("r5"), "unfinished", "why")]
    assert nothing_to_compare(["x"], [], unfinished).endswith("Continue them first.")
    assert "r3" not in text
    tuned = make_runs({"a": {"t": [0.5]}})
    assert nothing_to_compare(["x", "y"], tuned, []).startswith("x, y holds tuning runs only (1).")


def test_no_two_tasks_share_a_picture() -> None:
    """A blank and a dash, or what lies beyond 48 letters, were one: the second picture replaced the first."""
    tasks = ["walk run", "walk-run", "w" * 60 + "1", "w" * 60 + "2", "Walk-v1"]
    groups = group_tasks([make_run("a", task, 0, 1.0, key="mean_reward") for task in tasks])
    names = [
        shown.name
        for group in groups
        for section in sections_of(analyse(group, QUICK), {}, [], ReportConfig())
        for shown in section.pictures
        if shown.name.endswith("-tasks")
    ]
    assert len(set(names)) == len(tasks)
    assert "return-on-Walk-v1-tasks" in names
    assert all(set(name) < set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-") for name in names)


@pytest.mark.parametrize(
    ("typed", "compared", "warned"),
    [
        ([], "", False),
        (["endpoint=cloning_loss", "margin=0.04", "reference=eva"], "", False),
        (["margin=0.5"], "endpoint=cloning_loss margin=0.5 reference=eva", True),
        (["endpoint=final"], "endpoint=final margin=None reference=eva", True),
        (["reference=lora"], "endpoint=cloning_loss margin=0.04 reference=lora", True),
    ],
)
def test_what_the_study_decided_on_is_what_is_compared_by(
    typed: list[str], compared: str, warned: bool, tmp_path: Path
) -> None:
    root = make_study(tmp_path / "runs", ["eva", "lora", "dora"], lambda *_: 0.5, seeds=2, goals=4)
    decided = {"endpoint": "cloning_loss", "margin": 0.04, "reference": "eva"}
    for summary in root.rglob("summary.json"):
        about = {"method": summary.parent.parent.name, "tuning": None} | decided
        (summary.parent / ABOUT_FILE).write_text(json.dumps(about))
    assert report.main([str(root), f"out={tmp_path / 'out'}", "replicates=50", *typed]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    stated = "The study decided on endpoint=cloning_loss margin=0.04 reference=eva before its runs"
    assert (f"{stated}; this report compares by {compared}." in text) is warned
    pair = "| eva - lora |" if typed == ["reference=lora"] else "| lora - eva |"
    assert pair in text
    assert "| dora - lora |" not in text or typed == ["reference=lora"]


def test_a_study_whose_reference_has_no_runs_yet_has_a_report(tmp_path: Path) -> None:
    root = make_study(tmp_path / "runs", ["eva", "lora"], lambda *_: 0.5, seeds=1, goals=4)
    decided = {"endpoint": "final", "margin": None, "reference": "dora"}
    for summary in root.rglob("summary.json"):
        about = {"method": summary.parent.parent.name, "tuning": None} | decided
        (summary.parent / ABOUT_FILE).write_text(json.dumps(about))
    assert report.main([str(root), f"out={tmp_path / 'out'}", "replicates=50"]) == 0
    assert "| eva |" in (tmp_path / "out" / "report.md").read_text()


def test_a_reference_that_no_run_has_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_study(tmp_path / "runs", ["eva", "lora"], lambda *_: 0.5, seeds=1, goals=4)
    assert report.main([str(root), f"out={tmp_path / 'out'}", "reference=lorra"]) == 2
    assert "Unknown reference 'lorra'. Did you mean 'lora'?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
