"""The tuning phase: what was tried, in order; what was chosen; when a grid is said to be too narrow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from eva_rl.report.runs import Run
from eva_rl.report.tuning import (
    comparable,
    setting_of,
    task_ranks,
    tried_settings,
    tuning_figure,
    tuning_scores,
    tuning_sections,
)
from tests.report.making_groups import make_run


def tuned(method: str, settings: Mapping[str, Any], score: float, seed: int = 0) -> Run:
    """As a record is read: values as text."""
    run = make_run(method, "tuning-task", seed, score, settings=settings)
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in settings.items()}
    return replace(run, tuning=texts)


def grid(method: str, key: str, values: list[Any]) -> list[Run]:
    return [tuned(method, {key: value}, 0.25 * k, seed) for k, value in enumerate(values) for seed in (1, 0)]


def chosen(method: str, settings: Mapping[str, Any]) -> list[Run]:
    return [make_run(method, "t", 5, 0.5, settings=settings)]


def test_nothing_tuned_is_no_section() -> None:
    assert tuning_sections(chosen("a", {"x": 1}), chosen("a", {"x": 1}), "final") == []


def test_settings_are_in_ascending_order_of_numbers() -> None:
    runs = grid("a", "algo.learning_rate", [0.01, 2e-05, 0.0003])
    scores = tuning_scores(tried_settings(runs, "final"))["a"]
    assert list(scores) == ["learning_rate=2e-05", "learning_rate=0.0003", "learning_rate=0.01"]
    assert scores["learning_rate=2e-05"] == [0.25, 0.25]
    assert setting_of(tuned("a", {"x.b": 1, "y.a": "w"}, 0.5)) == "b=1, a=w"
    assert setting_of(make_run("a", "t", 0, 0.5)) == ""


@pytest.mark.parametrize(
    ("key", "values", "choice", "edge"),
    [
        ("algo.learning_rate", [0.001, 0.002, 0.004], 0.002, False),
        ("algo.learning_rate", [0.001, 0.002, 0.004], 0.004, True),
        ("algo.learning_rate", [0.001, 1e-05, 0.004], 1e-05, True),
        ("adapter.rank", [8], 8, False),
        ("adapter.center", [True, False], True, False),
        ("adapter.variant", ["b", "a"], "a", False),
        ("eval.limit", [None, 3], None, False),
        ("adapter.targets", [["q", "v"], ["q"]], ["q", "v"], False),
    ],
)
def test_what_was_chosen_and_whether_it_is_at_an_end(key: str, values: list[Any], choice: Any, edge: bool) -> None:
    """True and None were never found among true and null; of two words each was "at an end of the grid"."""
    (section,) = tuning_sections(grid("a", key, values), chosen("a", {key: choice, "other": 1}), "final")
    (table,) = section.tables
    assert [row[3:] for row in table.rows if row[5]] == [["2", "0", "yes"]]
    (row,) = [row for row in table.rows if row[5]]
    text = choice if isinstance(choice, str) else json.dumps(choice)
    assert row[:3] == ["a", f"{key.partition('.')[2]}={text}", f"{0.25 * values.index(choice):.3f}"]
    assert any("At an end of the grid" in line for line in section.text) == edge
    assert "on tuning-task and seeds 0, 1, none of which is tested above" in section.text[0]


def test_ends_of_a_grid_of_two_settings_and_its_axis() -> None:
    """Only the first and the last combination were called ends; a method's own grid came last on the axis."""
    runs = [tuned("a", {"algo.lr": lr, "adapter.rank": r}, 0.5) for lr in (0.1, 0.2, 0.3) for r in (2, 4, 8)]
    best = {"algo.lr": 0.3, "adapter.rank": 4}
    (section,) = tuning_sections([*runs, *chosen("a", best)], chosen("a", best), "final")
    assert any("At an end of the grid, so that a better value may lie outside: a (lr=0.3)." in t for t in section.text)
    own = [*grid("b", "algo.lr", [0.01, 0.02]), *grid("a", "algo.lr", [0.1, 0.2])]
    axes = tuning_figure(tuning_scores(tried_settings(own, "final")), "score").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["lr=0.01", "lr=0.02", "lr=0.1", "lr=0.2"]


def test_settings_are_ranked_within_tasks() -> None:
    nan = float("nan")
    tried = [
        [("t", 1.0), ("u", 50.0), ("t", 3.0), ("u", 50.0)],
        [("t", 2.0), ("u", 90.0)],
        [("t", 9.0), ("t", nan), ("u", 999.0)],
        [("t", 1.0), ("u", 10.0)],
    ]
    np.testing.assert_array_equal(task_ranks(tried), [[1.5, 2.0], [1.5, 1.0], [nan, nan], [3.0, 3.0]])
    assert np.isnan(task_ranks([[("t", nan)], [("u", 1.0)]])).all()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["success_rate", "success_rate"], True),
        (["normalized_score", "normalized_score"], True),
        (["mean_reward"], True),
        (["mean_reward", "mean_reward"], False),
        (["success_rate", "normalized_score"], False),
        (["success_rate", "mean_reward"], False),
    ],
)
def test_what_may_be_averaged_over_tasks(keys: list[str], expected: bool) -> None:
    assert comparable({f"task {index}": key for index, key in enumerate(keys)}) is expected


@pytest.mark.parametrize(("endpoint", "ranks"), [("final", ["1.250", "1.750"]), ("cloning_loss", ["2.000", "1.000"])])
def test_the_report_shows_the_ranks_that_were_averaged(endpoint: str, ranks: list[str]) -> None:
    """A mean of 3 and 900 was shown as that of the method."""
    returns = {("t", 1): [3.0, 5.0], ("t", 2): [4.0, 4.0], ("u", 1): [900.0, 800.0], ("u", 2): [9.0, 9.0]}
    runs = []
    for (task, x), scores in returns.items():
        for seed, score in enumerate(scores):
            summary = {"eval/cloning_loss": 1 / x}
            run = make_run("a", task, seed, score, key="mean_reward", settings={"algo.x": x}, summary=summary)
            runs.append(replace(run, tuning={"algo.x": str(x)}))
    (section,) = tuning_sections(runs, chosen("a", {"algo.x": 1}), endpoint)
    (table,) = section.tables
    assert table.columns[2] == "mean rank"
    assert [row[1:4] for row in table.rows] == [["x=1", ranks[0], "4"], ["x=2", ranks[1], "4"]]
    assert "mean rank over tasks by" in section.text[0]


def test_settings_that_diverged_are_shown_and_take_no_rank() -> None:
    returns = {("t", 1): 3.0, ("t", 2): 4.0, ("t", 3): 9.0, ("u", 1): 900.0, ("u", 2): 9.0}
    runs = []
    for (task, x), score in returns.items():
        run = make_run("a", task, 0, score, key="mean_reward", settings={"algo.x": x})
        runs.append(replace(run, tuning={"algo.x": str(x)}))
    lost = [replace(make_run("a", "u", 0, 0.0), summary={}, tuning={"algo.x": x}) for x in ("3", "4")]
    (section,) = tuning_sections(runs, chosen("a", {"algo.x": 2}), "final", [*lost, *lost])
    assert [row[1:] for row in section.tables[0].rows] == [
        ["x=1", "1.500", "2", "0", ""],
        ["x=2", "1.500", "2", "0", "yes"],
        ["x=3", "-", "1", "1", ""],
        ["x=4", "-", "0", "1", ""],
    ]
    assert len(section.text) == 1, "x=2 is at no end"
    assert "A run that diverged rules its setting out." in section.tables[0].note
    (section,) = tuning_sections([], [], "final", lost)
    assert [row[2:] for row in section.tables[0].rows] == [["-", "0", "1", ""]] * 2


def test_a_method_whose_choice_is_not_tested_has_none() -> None:
    (section,) = tuning_sections(grid("a", "x", [1, 2]), chosen("b", {"x": 1}), "final")
    assert {row[5] for row in section.tables[0].rows} == {""}
    assert len(section.text) == 1


def test_the_figure_shows_means_and_single_runs() -> None:
    scores = {"a": {"x=1": [0.0, 0.5], "x=2": [1.0]}, "_b": {"x=2": [0.25], "x=3": [0.5, 0.75]}}
    axes = tuning_figure(scores, "score").axes[0]
    means = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert [line.get_label() for line in means] == [" _b", "a"]
    np.testing.assert_allclose([line.get_xdata() for line in means], [[1, 2], [0, 1]])
    np.testing.assert_allclose([line.get_ydata() for line in means], [[0.25, 0.625], [0.25, 1.0]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["x=1", "x=2", "x=3"]
