"""A short run of ``benchmarks.fuzz.mutate``: what it counts as a fault does not happen, and a fault would be seen."""

from __future__ import annotations

import sys

import pytest

from benchmarks.fuzz import mutate


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mutate.py", *options])
    status: int = mutate.main()
    return status


@pytest.mark.slow
@pytest.mark.parametrize("mutations", [4, 8])
def test_a_short_run_finds_nothing(
    mutations: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    status = run(monkeypatch, "--mutations", str(mutations), "--seed", "3")
    shown = capfd.readouterr().out
    assert status == 0, shown
    assert shown.startswith(f"seed 3, {mutations} mutations of each format")
    rows = {line[:16].strip(): line[16:].split() for line in shown.splitlines()[2:]}
    assert {"episode file", "store", "D4RL", "pickle"} <= set(rows)
    assert all(sum(map(int, row)) == mutations for row in rows.values() if row[0].isdecimal())


def test_faults_are_seen(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    careless = mutate.Format(
        lambda folder: (folder / "a.txt").write_text("12"),
        lambda folder: str(int((folder / "a.txt").read_text())),
        ours=True,
    )
    monkeypatch.setitem(mutate.FORMATS, "careless", careless)
    assert run(monkeypatch, "--formats", "careless", "--mutations", "15", "--seed", "0") == 1
    shown = capfd.readouterr().out
    assert "careless, seed 0, mutation" in shown
    assert "ValueError: invalid literal for int()" in shown
