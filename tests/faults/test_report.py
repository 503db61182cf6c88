"""Damaged and hostile runs: the report is written whatever one of them holds, and a killed one is written anew."""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from eva_rl.adapters.markdown import markdown_text
from eva_rl.benchmark.records import write_record
from eva_rl.errors import UserError
from eva_rl.report import command as report
from eva_rl.report.reading import MOST_CHARACTERS, find_runs
from eva_rl.report.runs import read_record, read_runs
from eva_rl.report.tables import csv_cell, write_csv
from tests import forks
from tests.conftest import unseal
from tests.report.making_runs import make_run

FILES = ("config.yaml", "summary.json", "evaluation.json", "metrics.jsonl", "versions.json")
VALUES: tuple[Any, ...] = (
    None, True, -1, 10**400, 1e308, float("nan"), float("inf"), "", "x" * 5000, [], [[]], {}, {"a": {"b": [1]}},
    "\ud800", "a\x00b\n| c", "=1+1", "$\\frac{", "[bold]", "_x", "<b>",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As runs were before their summaries held digests: everything is left to the other checks."""
    root = tmp_path_factory.mktemp("runs")
    for method in ("eva", "lora"):
        for seed in range(2):
            make_run(root / f"{method}-{seed}", "reach-v3", [True, seed == 0], f"adapter={method}", f"seed={seed}")
            unseal(root / f"{method}-{seed}" / "summary.json")
    return root


def damaged_text(text: bytes, rng: np.random.Generator) -> bytes:
    """A file cut off, with bytes changed, removed or repeated, or something else altogether."""
    place, other = sorted(int(k) for k in rng.integers(len(text) + 1, size=2))
    choices = (
        text[:place],
        text[:place] + bytes(rng.integers(256, size=3, dtype=np.uint8)) + text[place + 3 :],
        text[:place] + text[other:],
        text[:place] + text[place:other] * 3 + text[other:],
        b"[" * 100_000,
        b"5\n" + text,
        b"a: &a [x]\nb: [*a, *a]\n",
        b"env: {id: '${oc.env:HOME}'}\nx: ${",
        bytes(rng.integers(256, size=64, dtype=np.uint8)),
    )
    return choices[int(rng.integers(len(choices)))]


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    return [path, *(p for key, one in inner for p in places_in(one, (*path, key)))]


def with_value(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = value.copy()
    changed[path[0]] = with_value(value[path[0]], path[1:], new)
    return changed


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("seed", range(12))
def test_one_run_with_damaged_bytes_is_read_in_part_or_listed(runs: Path, tmp_path: Path, name: str, seed: int) -> None:
    rng = np.random.default_rng([seed, len(name)])
    shutil.copytree(runs, tmp_path / "runs")
    victim = tmp_path / "runs" / "eva-0" / name
    victim.write_bytes(damaged_text(victim.read_bytes() if victim.exists() else b'{"torch": "1"}', rng))
    found, problems = read_runs(find_runs([str(tmp_path / "runs")]))
    assert {run.folder.name for run in found} >= {"eva-1", "lora-0", "lora-1"}
    assert len(found) == 4 or [p.folder.name for p in problems if p.kind == "damaged"] == ["eva-0"]


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 2, 4])
def test_every_value_of_a_summary_may_be_anything(first: int, runs: Path, tmp_path: Path) -> None:
    """Each place of each JSON file takes some of the odd values; what is left is a report of sound values."""
    folder = tmp_path / "runs"
    for name in ("eva-0", "lora-0"):
        shutil.copytree(runs / name, folder / name)
    rng = np.random.default_rng(0)
    for name in ("summary.json", "evaluation.json"):
        victim = folder / "eva-0" / name
        sound = json.loads(victim.read_text())
        for place in places_in(sound):
            for value in rng.permutation(len(VALUES))[first : first + 2]:
                victim.write_text(json.dumps(with_value(sound, place, VALUES[value])))
                found, problems = read_runs(find_runs([str(folder)]))
                assert len(found) == 2 or any(p.folder.name == "eva-0" for p in problems), (place, VALUES[value])
                rates = [run.summary["eval/success_rate"] for run in found if run.folder.name == "eva-0"]
                assert all(0 <= rate <= 1 for rate in rates)
        victim.write_text(json.dumps(sound))


NAMES = [value for value in VALUES if isinstance(value, str) and value]


@pytest.mark.parametrize(
    "names",
    [pytest.param(NAMES[:4], id="long and unprintable", marks=pytest.mark.slow), pytest.param(NAMES[4:], id="markup")],
)
def test_hostile_names_are_text_everywhere(names: list[str], runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(runs, folder)
    for name, run in zip(names, sorted(folder.iterdir()), strict=False):
        path = run / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"method": name}))
    out = tmp_path / "out"
    assert report.main([str(folder), f"out={out}", "replicates=20", f"title={'[red]$x_ #'!r}"]) == 0
    for figure in (out / "figures").glob("*.svg"):
        ElementTree.parse(figure)
    with (out / "report.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [c for c in cells if c[:1] in {"=", "+", "@"} or (c[:1] == "-" and not c[1:2].isdigit())]
    tables = [line for line in (out / "report.md").read_text().splitlines() if line.startswith("|")]
    assert max(len(cell) for line in tables for cell in line.split("|")) < 4 * MOST_CHARACTERS
    assert "<b>" not in (out / "report.html").read_text()


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "evaluation.json", "metrics.jsonl"])
@pytest.mark.parametrize("seed", range(8))
def test_no_number_of_a_finished_run_changes_silently(name: str, seed: int, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "reach-v3", [True, False], "adapter=eva")
    (sound, *_), _ = read_runs([folder])
    path, rng = folder / name, np.random.default_rng([seed, len(name)])
    text = bytearray(path.read_bytes())
    digits = [index for index, byte in enumerate(text) if chr(byte).isdigit()]
    place = digits[int(rng.integers(len(digits)))]
    text[place] = ord("0") + (text[place] - ord("0") + int(rng.integers(1, 10))) % 10
    path.write_bytes(text)
    found, problems = read_runs([folder])
    assert [problem.kind for problem in problems] == [
        "damaged" if name in {"config.yaml", "summary.json"} else "in part"
    ]
    assert len(found) == (problems[0].kind == "in part")
    assert name in problems[0].reason
    if found:
        assert found[0].summary == sound.summary


@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_does_not_block(name: str, kind: str, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    victim = tmp_path / "runs" / "eva-0" / name
    victim.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(victim)
    elif kind == "folder":
        victim.mkdir()
    else:
        victim.symlink_to(victim)
    found, _ = read_runs(find_runs([str(tmp_path / "runs")]))
    assert {run.folder.name for run in found} >= {"eva-1", "lora-0", "lora-1"}


def test_text_for_markdown_and_spreadsheets(tmp_path: Path) -> None:
    assert markdown_text("a|b *c* [x](http://y)") == r"a\|b \*c\* [x\](http" + "\N{ZERO WIDTH NON-JOINER}://y)"
    assert markdown_text("seed_0 [0.2, 0.3]") == "seed_0 [0.2, 0.3]"
    assert [csv_cell(x) for x in ("=1", "+1", "-1", "@a", -1.5, "a=1")] == ["'=1", "'+1", "'-1", "'@a", -1.5, "a=1"]
    write_csv(tmp_path / "a.csv", ["x"], [{"x": "=cmd()"}])
    assert (tmp_path / "a.csv").read_text().splitlines() == ["x", "'=cmd()"]


def test_a_record_is_the_run_or_refused(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, runs / "eva-0", "reach-v3/eva/seed_0")
    (whole,), _ = read_runs([runs / "eva-0"])
    assert path.stat().st_size < 8000
    assert find_runs([str(tmp_path)]) == [path]
    found = read_record(path)
    for name in ("task", "method", "settings", "goals"):
        assert getattr(found, name) == getattr(whole, name)
    assert found.summary == whole.summary
    text = path.read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(60):
        damaged = damaged_text(text, rng)
        path.write_bytes(damaged)
        if damaged == text:
            continue
        try:
            read = read_record(path)
        except UserError:
            continue
        assert read == found  # damage outside of what is read, such as spaces or the name


@pytest.mark.slow
def test_a_report_killed_while_it_is_written_is_written_again(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = [str(runs), f"out={out}", "replicates=50"]
    process = forks.start(partial(report.main, argv), tmp_path / "log")
    while not list(tmp_path.glob(".out.*.partial/figures/*")) and process.is_alive():
        time.sleep(0.005)
    process.kill()
    process.join()
    (tmp_path / "log").unlink()
    assert report.main(argv) == 0
    assert (out / "report.html").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "report.csv").unlink()  # as an interrupted report of 0.1.0 left its folder
    (out / ".report.html.12345678.partial").touch()
    assert report.check_out(str(out)) == out
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"something other than a report: notes\.txt"):
        report.check_out(str(out))
