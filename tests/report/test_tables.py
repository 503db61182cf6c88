"""Cells as they are read, rows against values by hand, and CSV as Python and a spreadsheet read it."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy

from eva_rl.report import stats
from eva_rl.report.comparison import analyse
from eva_rl.report.methods import group_tasks
from eva_rl.report.settings import Decision
from eva_rl.report.tables import (
    CSV_COLUMNS,
    aggregate_table,
    comparison_table,
    cost_table,
    costs_of,
    number,
    records,
    task_table,
    verdict_records,
    verdict_table,
    with_interval,
    write_csv,
)
from eva_rl.report.verdicts import verdicts
from tests.report.making_groups import QUICK, analysis_of, make_group, make_run

SCORES = {"a": {"t": [0.5, 0.7, 0.6], "u": [0.2, 0.4, 0.3]}, "b": {"t": [0.5, 0.5, 0.5], "u": [0.1, 0.2, 0.3]}}


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0.000"), (-0.0, "0.000"), (-0.0004, "0.000"), (-0.0006, "-0.001"), (0.9995, "1.000"), (9.87654, "9.877"),
     (10.0, "10.0"), (-1234.56, "-1234.6"), (math.nan, "-"), (math.inf, "-"), (-math.inf, "-"), (1, "1.000")],
)  # fmt: skip
def test_a_score_for_reading(value: float, shown: str) -> None:
    assert number(value) == shown


def test_an_interval_that_is_not_known_is_not_shown() -> None:
    assert with_interval(stats.Estimate(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"
    assert with_interval(stats.Estimate(np.float64(0.5), np.nan, np.nan)) == "0.500"
    assert with_interval(stats.Estimate(np.nan, np.nan, np.nan)) == "-"


def test_the_best_method_comes_first() -> None:
    table = aggregate_table(analysis_of(SCORES))
    assert table.title == "Success rate over 2 tasks"
    assert list(table.columns) == ["method", "rank", "runs", "IQM", "mean", "median"]
    assert [row[:3] for row in table.rows] == [["a", "-", "6"], ["b", "-", "6"]]
    assert [row[4].split()[0] for row in table.rows] == ["0.450", "0.350"]
    turned = aggregate_table(analysis_of({"b": SCORES["a"], "a": SCORES["b"]}))
    assert [row[0] for row in turned.rows] == ["b", "a"]


def test_a_task_keeps_its_name() -> None:
    """It was written in small letters: "Return on pendulum-v1"."""
    scores = {"a": {"Pendulum-v1": [-900.0]}}
    assert aggregate_table(analysis_of(scores, "mean_reward")).title == "Return on Pendulum-v1 over 1 task"


def test_pairs_against_scipy() -> None:
    analysis = analysis_of(SCORES)
    (row,) = comparison_table(analysis).rows
    d = np.array(SCORES["a"]["t"] + SCORES["a"]["u"]) - np.array(SCORES["b"]["t"] + SCORES["b"]["u"])
    p = scipy.permutation_test((d,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    won = [scipy.mannwhitneyu(SCORES["a"][t], SCORES["b"][t]).statistic / 9 for t in ("t", "u")]
    assert row[0] == "a - b"
    assert row[1].startswith(f"{d.mean():.3f} [")
    assert row[2].startswith(f"{np.mean(won):.3f} [")
    assert row[3:] == ["6", f"{p:.3g}", f"{p:.3g}", "0", "-", "no"]


def test_verdicts_with_and_without_a_margin() -> None:
    group = make_group(SCORES)
    for margin, width in ((None, 6), (0.05, 8)):
        by = Decision("final", margin)
        table = verdict_table(verdicts(group, by), by, 0.95, decided=margin is not None)
        assert [len(row) for row in table.rows] == [len(table.columns)] == [width]
        assert ("further endpoint" in table.title) == (margin is None)
    (row,) = table.rows
    first, second = (np.array(SCORES["a"][t]) - np.array(SCORES["b"][t]) for t in ("t", "u"))
    mean = (first.mean() + second.mean()) / 2
    error = np.sqrt(first.var(ddof=1) / 3 + second.var(ddof=1) / 3) / 2
    degrees = scipy.ttest_ind(first, second, equal_var=False).df
    low, high = scipy.t.interval(0.95, degrees, mean, error)
    assert row[1:3] == [f"{mean:.3f} [{low:.3f}, {high:.3f}]", "6"]
    one_seed = make_group({"a": {"t": [0.5]}, "b": {"t": [0.25]}})
    by = Decision("final", 0.1)
    (row,) = verdict_table(verdicts(one_seed, by), by, 0.95, decided=True).rows
    assert list(row) == ["a - b", "-", "1", "1", "1", "-", "1", "undecided"]
    statistics = [record["statistic"] for record in verdict_records(one_seed, by, 0.95)]
    assert statistics == ["p of a difference, corrected", "verdict"]


def test_a_task_that_a_method_lacks_has_a_dash() -> None:
    table = task_table(analysis_of({"a": {"t": [0.5], "u": [0.25]}, "b": {"t": [1.0]}}))
    assert list(table.columns) == ["task", "before", "a", "b"]
    assert [list(row) for row in table.rows] == [["t", "-", "0.500", "1.000"], ["u", "-", "0.250", "-"]]


def test_costs_by_hand() -> None:
    known = [
        {"trainable_parameters": 1234.0, "peak_memory_bytes": 1.5 * 2**20, "seconds": {"train": 0.5}},
        {
            "trainable_parameters": 2234.0,
            "peak_memory_bytes": 3.5 * 2**20,
            "seconds": {"train": 99.96},
            "env_steps": 0.0,
        },
        {"trainable_parameters": 9999999.0, "seconds": None},
        {},
    ]
    runs = [make_run("a", "t", seed, 0.5, summary=own) for seed, own in enumerate(known)]
    (group,) = group_tasks([*runs, make_run("b", "t", 0, 0.5)])
    table = cost_table(group)
    assert list(table.columns) == ["method", "trained parameters", "peak memory (MiB)", "seconds to train", "env steps"]
    assert [list(row) for row in table.rows] == [["a", "2,234", "2", "50.2", "0"], ["b", "-", "-", "-", "-"]]
    assert costs_of(group.methods[0])["seconds.train"] == pytest.approx(50.23)
    assert costs_of(group.methods[1]) == {}


def test_records_are_unrounded_and_under_the_headings(tmp_path: Path) -> None:
    runs = [
        make_run(m, "t", seed, (0.1 + seed) / 3, goals=[True, False], summary={"eval_before/success_rate": 1 / 3})
        for m in ("a", "=b")
        for seed in range(3)
    ]
    (group,) = group_tasks(runs)
    rows = list(records(analyse(group, QUICK)))
    assert {key for row in rows for key in row} == set(CSV_COLUMNS)
    write_csv(tmp_path / "x.csv", CSV_COLUMNS, rows)
    with (tmp_path / "x.csv").open(newline="") as file:
        back = list(csv.DictReader(file))
    assert len(back) == len(rows)
    (before,) = [row for row in back if row["table"] == "before"]
    assert float(before["value"]) == 1 / 3
    assert (before["method"], before["low"]) == ("", "")
    (mean,) = [
        row for row in back if row["table"] == "aggregate" and (row["method"], row["statistic"]) == ("a", "mean")
    ]
    assert float(mean["value"]) == float(np.mean([run.summary["eval/success_rate"] for run in runs[:3]]))
    assert (mean["runs"], {row["method"] for row in back}) == ("3", {"", "a", "'=b"})
    (goals,) = [row for row in back if row["statistic"] == "p over goals"]
    assert (goals["runs"], goals["value"]) == ("2", "1.0")


@settings(max_examples=50)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_hostile_cells_are_what_they_were(tmp_path_factory: pytest.TempPathFactory, cells: list[str]) -> None:
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    columns = [f"c{k}" for k in range(len(cells))]
    write_csv(path, columns, [dict(zip(columns, cells, strict=True)), {columns[0]: -1.5}])
    with path.open(newline="", encoding="utf-8") as file:
        heading, row, last = csv.reader(file)
    assert (heading, last) == (columns, ["-1.5", *[""] * (len(cells) - 1)])
    for cell, back in zip(cells, row, strict=True):
        assert back in {cell, f"'{cell}"}
        assert not back.startswith(tuple("=+-@\t\r"))


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((0.5, 0.4, 0.6), "0.500 [0.400, 0.600]"),
        ((-0.00123, -0.0021, -0.0004), "-0.0012 [-0.0021, -0.0004]"),
        ((0.00012, 0.00002, 0.00021), "0.00012 [0.00002, 0.00021]"),
        ((1.0, 1.0, 1.0), "1.000 [1.000, 1.000]"),
    ],
)
def test_the_ends_of_a_narrow_interval_can_be_told_apart(values: tuple[float, float, float], shown: str) -> None:
    assert with_interval(stats.Estimate(*map(np.float64, values))) == shown
