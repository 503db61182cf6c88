"""A short run of ``benchmarks/fuzz.py``: what it counts as a fault does not happen, and a fault would be seen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
FAULTY = """
import sys
sys.path.insert(0, {benchmarks!r})
import fuzz, fuzz_formats
fuzz.FORMATS["careless"] = fuzz_formats.Format(
    lambda folder: (folder / "a.txt").write_text("12"),
    lambda folder: str(int((folder / "a.txt").read_text())),
    ours=True,
)
sys.argv = ["fuzz.py", "--formats", "careless", "--mutations", "15", "--seed", "0"]
raise SystemExit(fuzz.main())
"""


def test_a_short_run_finds_nothing() -> None:
    command = [sys.executable, str(BENCHMARKS / "fuzz.py"), "--mutations", "8", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("seed 3, 8 mutations of each format")
    rows = {line[:16].strip(): line[16:].split() for line in done.stdout.splitlines()[2:]}
    assert {"episode file", "store", "D4RL", "pickle"} <= set(rows)
    assert all(sum(map(int, row)) == 8 for row in rows.values() if row[0].isdecimal())


def test_faults_are_seen() -> None:
    command = [sys.executable, "-c", FAULTY.format(benchmarks=str(BENCHMARKS))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "careless, seed 0, mutation" in done.stdout
    assert "ValueError: invalid literal for int()" in done.stdout
