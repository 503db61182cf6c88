"""A short run of ``benchmarks/fuzz.py``: what it counts as a fault does not happen, and a fault would be seen."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark's module; each mutated file is loaded in a fork of this process."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fuzz

    return fuzz


def run(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fuzz.py", *options])
    status: int = fuzz.main()
    return status


@pytest.mark.slow
@pytest.mark.parametrize("mutations", [4, 8])
def test_a_short_run_finds_nothing(
    mutations: int, fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    status = run(fuzz, monkeypatch, "--mutations", str(mutations), "--seed", "3")
    shown = capfd.readouterr().out
    assert status == 0, shown
    assert shown.startswith(f"seed 3, {mutations} mutations of each format")
    rows = {line[:16].strip(): line[16:].split() for line in shown.splitlines()[2:]}
    assert {"episode file", "store", "D4RL", "pickle"} <= set(rows)
    assert all(sum(map(int, row)) == mutations for row in rows.values() if row[0].isdecimal())


def test_faults_are_seen(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    careless = fuzz.Format(
        lambda folder: (folder / "a.txt").write_text("12"),
        lambda folder: str(int((folder / "a.txt").read_text())),
        ours=True,
    )
    monkeypatch.setitem(fuzz.FORMATS, "careless", careless)
    assert run(fuzz, monkeypatch, "--formats", "careless", "--mutations", "15", "--seed", "0") == 1
    shown = capfd.readouterr().out
    assert "careless, seed 0, mutation" in shown
    assert "ValueError: invalid literal for int()" in shown
