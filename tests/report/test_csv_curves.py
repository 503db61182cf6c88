"""Learning curves of others, in the layout of TD-MPC2's results: read, compared, and checked against scipy."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy

from eva_rl.errors import UserError
from eva_rl.report import command as report
from eva_rl.report.csv_curves import read_csv_curves

STEPS = range(0, 500_000, 100_000)


def write_curves(root: Path, column: str = "success", scale: float = 1.0, tasks: int = 3) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """Two methods with four seeds; returns final scores (tasks, seeds)."""
    rng, finals = np.random.default_rng(0), {}
    for method, level in (("good", 0.8), ("poor", 0.4)):
        finals[method] = np.round(np.clip(rng.normal(level, 0.05, (tasks, 4)), 0, 1), 2) * scale
        for task, own in enumerate(finals[method]):
            lines = [f"{step},{final * step / STEPS[-1]},{seed}" for seed, final in enumerate(own, 1) for step in STEPS]
            path = root / method / f"mw-task{task}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"step,{column},seed\n" + "\n".join(lines) + "\n")
    return finals


def table(path: Path, **where: str) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == value for key, value in where.items())]


def test_published_curves_are_compared_as_scipy_would(tmp_path: Path) -> None:
    finals = write_curves(tmp_path / "results")
    out = tmp_path / "out"
    assert report.main([f"csv:{tmp_path / 'results'}", f"out={out}", "replicates=50", "margin=0.05"]) == 0
    rows = {row["statistic"]: row for row in table(out / "report.csv", table="verdict by final")}
    d = finals["good"] - finals["poor"]
    exact = scipy.permutation_test((d.ravel(),), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert float(rows["p of a difference, corrected"]["value"]) == pytest.approx(exact)  # one pair: nothing to correct
    assert float(rows["difference"]["value"]) == pytest.approx(d.mean())
    error = np.sqrt((d.var(axis=1, ddof=1) / 4).sum()) / 3
    t = [(d.mean() + 0.05) / error, (d.mean() - 0.05) / error]
    parts = d.var(axis=1, ddof=1) / 4
    degrees = parts.sum() ** 2 / (parts**2 / 3).sum()
    expected = max(scipy.t.sf(t[0], degrees), scipy.t.cdf(t[1], degrees))
    assert float(rows["p of equivalence, corrected"]["value"]) == pytest.approx(expected)
    assert rows["verdict"]["value"] == "good better"
    area = {row["statistic"]: row for row in table(out / "report.csv", table="verdict by area")}
    assert area["verdict"]["runs"] == rows["verdict"]["runs"], "further endpoints stand there, too"
    assert "By area under the score" in (out / "report.md").read_text()
    assert {row["runs"] for row in table(out / "report.csv", table="aggregate")} == {"12"}


def test_runs_of_different_length_are_compared_at_the_last_common_step(tmp_path: Path) -> None:
    write_curves(tmp_path)
    long = tmp_path / "poor" / "mw-task0.csv"
    long.write_text(long.read_text() + "500000,1.0,1\n")
    runs, problems = read_csv_curves(tmp_path)
    assert not problems
    (run,) = [r for r in runs if (r.method, r.task, r.seed) == ("poor", "mw-task0", 1)]
    assert run.rows[-1]["step"] == 400_000
    assert run.summary["eval/success_rate"] < 1


def test_rewards_are_returns_of_each_task(tmp_path: Path) -> None:
    write_curves(tmp_path / "results", "reward", 1000, tasks=2)
    assert report.main([f"csv:{tmp_path / 'results'}", f"out={tmp_path / 'out'}", "replicates=20"]) == 0
    scores = {row["score"] for row in table(tmp_path / "out" / "report.csv")}
    assert scores == {f"return on mw-task{task}" for task in range(2)}


@pytest.mark.parametrize(
    "text",
    ["", "step,seed\n1,1\n", "step,success,seed\n", "step,success,seed\n1,x,1\n", "step,success,seed\n1,1.5,1\n",
     "step,success,seed\n1,nan,1\n", "step,success,seed\n1,0.5\n", "\x00", "step,success,seed\n1,0.5,1e999\n"],
)  # fmt: skip
def test_a_damaged_file_is_listed(text: str, tmp_path: Path) -> None:
    write_curves(tmp_path)
    (tmp_path / "good" / "mw-task0.csv").write_text(text)
    runs, problems = read_csv_curves(tmp_path)
    assert len(runs) == 5 * 4
    assert [problem.folder.name for problem in problems] == ["mw-task0.csv"]


def test_where_there_are_no_curves(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"METHOD/TASK\.csv"):
        read_csv_curves(tmp_path)
