"""Learning curves of others, in the layout of TD-MPC2's results: read, compared, and checked against scipy."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy

from eva_rl.errors import UserError
from eva_rl.report import command as report
from eva_rl.report.comparison import Resampling
from eva_rl.report.csv_curves import read_csv_curve, read_csv_curves
from eva_rl.report.curves import curves_of, points_of
from eva_rl.report.methods import group_tasks

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
    assert "By area under the learning curve" in (out / "report.md").read_text()
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


@pytest.mark.slow
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


def curve(tmp_path: Path, text: str) -> tuple[str, dict[int, dict[float, float]]]:
    path = tmp_path / "task.csv"
    path.write_text(text, encoding="utf-8")
    return read_csv_curve(path)


def test_a_file_by_hand(tmp_path: Path) -> None:
    text = "extra,seed,step,success\n?,2,0,0.25\n\n?,1,10,1\n?,2,1e1,0.5\n"
    assert curve(tmp_path, text) == ("success_rate", {2: {0: 0.25, 10: 0.5}, 1: {10: 1.0}})
    assert curve(tmp_path, "\ufeff" + text) == curve(tmp_path, text), "a spreadsheet marks UTF-8"
    assert curve(tmp_path, text.replace("\n", "\r\n")) == curve(tmp_path, text)
    assert curve(tmp_path, text + text.partition("\n")[2]) == curve(tmp_path, text), "a row twice says nothing new"
    assert curve(tmp_path, 'step,"success",seed\n"3",".5","7"\n') == ("success_rate", {7: {3: 0.5}})


@pytest.mark.parametrize("order", ["reward,success", "success,reward"])
def test_of_two_scores_success_is_read_whatever_their_order(order: str, tmp_path: Path) -> None:
    """It depended on the order of the columns, and methods that differed in it were not compared."""
    row = {"reward,success": "900,0.5", "success,reward": "0.5,900"}[order]
    assert curve(tmp_path, f"step,{order},seed\n1,{row},0\n") == ("success_rate", {0: {1: 0.5}})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "columns none, expected step, success or reward, seed"),
        ("step,score,seed\n1,1,1\n", "columns step, score, seed, expected step"),
        ("step,success,seed\n\n\n1,x,1\n", "line 4: success=x, expected a number"),
        ("step,success,seed\n1,0.5\n", "line 2: seed=, expected a number"),
        ("step,reward,seed\n1,inf,1\n", "line 2: reward=inf, expected a number"),
        ("step,success,seed\n1,1,1\n1,-0.1,2\n", "line 3: success=-0.1, expected a share"),
        ("step,success,seed\n1,1,1.5\n", r"line 2: seed=1\.5, expected a whole number"),
        ('step,success,seed\n1,1,1\n"' + "1\n" * 70_000, "field larger than field limit"),
        ("step,success,seed\n", "has no rows"),
        ("step,success,seed\n5,0.5,1\n5,0.5,2\n5,0.25,1\n", r"line 4: success=0\.25 at step 5 of seed 1, which had 0"),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        curve(tmp_path, text)


def test_a_method_alone_and_the_names_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "my_method"
    folder.mkdir()
    (folder / "walk=run.csv").write_text("step,return,seed\n0,-3,1\n5,7,1\n0,1,0\n")
    runs, problems = read_csv_curves(folder)
    assert not problems
    assert [(r.method, r.task, r.seed) for r in runs] == [("my_method", "walk=run", 0), ("my_method", "walk=run", 1)]
    assert [r.summary["eval/mean_reward"] for r in runs] == [1, -3], "at step 0, which both have reached"


def test_where_there_are_no_curves(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"METHOD/TASK\.csv"):
        read_csv_curves(tmp_path)


def test_curves_of_different_intervals_are_compared_at_one_step(tmp_path: Path) -> None:
    """Two equal learners differed by 400 points: each was taken at its own last step before the common end."""
    for method, steps in (("a", (0, 500, 1000)), ("b", (0, 300, 600, 900))):
        rows = [f"{step},{step + seed},{seed}" for seed in range(3) for step in steps]
        path = tmp_path / method / "task.csv"
        path.parent.mkdir()
        path.write_text("step,reward,seed\n" + "\n".join(rows) + "\n")
    runs, _ = read_csv_curves(tmp_path)
    assert [run.summary["eval/mean_reward"] for run in runs] == [900, 901, 902] * 2
    assert {run.rows[-1]["step"] for run in runs} == {900}
    assert {len(points_of(run, "mean_reward").places["env_steps"]) for run in runs} == {3, 4}
    (group,) = group_tasks(runs)
    assert "gradient_steps" not in curves_of(group, Resampling(20)), "a published step is an env step"
