"""What a reader is warned of, in the words that he reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eva_rl.report.comparison import analyse
from eva_rl.report.methods import group_tasks
from eva_rl.report.runs import Problem, Run
from eva_rl.report.warnings import ReportWarning, warnings_of
from tests.report.making_groups import QUICK, make_run, make_runs

FIVE = [0.5, 0.6, 0.7, 0.4, 0.55]


def told(runs: list[Run], problems: list[Problem] | None = None, **how: Any) -> list[ReportWarning]:
    (group,) = group_tasks(runs)
    return warnings_of(analyse(group, QUICK), problems or [], **how)


def text(runs: list[Run], **how: Any) -> str:
    return "\n".join(warning.text for warning in told(runs, **how))


def test_severe_warnings_come_first() -> None:
    found = told(make_runs({"a": {"t": [0.5]}, "b": {"t": [0.5]}}), [Problem(Path("x"), "damaged", "")])
    severe = [warning.severe for warning in found]
    assert severe == sorted(severe, reverse=True)
    assert severe.count(True) == 2
    assert found[-1].text == "1 unfinished or damaged run left out; see the list below."


def test_only_lost_runs_are_counted() -> None:
    problems = [Problem(Path("x"), kind, "") for kind in ("unfinished", "damaged", "left out", "in part")]
    runs = make_runs({"a": {"t": FIVE}})
    assert [w.text for w in told(runs, problems)] == [
        "There is only one method: nothing is compared.",
        "2 unfinished or damaged runs left out; see the list below.",
    ]
    assert len(told(runs)) == 1


def test_one_seed_on_many_tasks_is_a_test_of_methods() -> None:
    """It was said that there was none, beside the verdict "a better"."""
    scores = {method: {f"t{k}": [score] for k in range(6)} for method, score in (("a", 0.9), ("b", 0.1))}
    found = text(make_runs(scores))
    assert "has one seed on some task: there is no interval. With 6 pairs of runs no p value" in found
    assert "below 0.031" in found
    assert "nor a test" not in found
    assert "differ significantly" not in found


@pytest.mark.parametrize(
    ("first", "second", "pairs", "least"),
    [
        ((2, 9), (2, 9), 11, "0.00098"),
        ((2, 2), (2, 2), 4, "0.12"),
        ((3, 9), (9, 2), 5, "0.062"),
        ((2, 0), (2, 3), 2, "0.5"),
    ],
)
def test_the_smallest_p_value_is_that_of_all_pairs(
    first: tuple[int, int], second: tuple[int, int], pairs: int, least: str
) -> None:
    """It was taken from the smallest number of seeds: "no p value below 0.12" beside one of 0.001."""
    scores = {
        m: {f"t{k}": [0.5 + 0.01 * (m == "a")] * n for k, n in enumerate(own) if n}
        for m, own in (("a", first), ("b", second))
    }
    found = text(make_runs(scores))
    assert "Few seeds: 2 for some method and task." in found
    assert f"With {pairs} pairs of runs no p value over runs can be below {least}, before" in found


def test_no_pairs_promise_no_p_value() -> None:
    alone = text(make_runs({"a": {"t": FIVE[:2]}}))
    assert "Few seeds: 2 for some method and task. Add seeds." in alone
    apart = told(make_runs({"a": {"t": FIVE}, "b": {"u": FIVE}}))
    assert apart[0] == ReportWarning("The methods have no task in common: they cannot be compared.", severe=True)
    strangers = [make_run("a", "t", 0, 0.5), make_run("b", "t", 1, 0.5)]
    assert "No two runs of one task and seed tell of the score after the last update." in text(strangers)


@pytest.mark.parametrize(("count", "warned"), [(49, True), (50, False), (0, False)])
def test_few_episodes(count: int, warned: bool) -> None:
    runs = [make_run("a", "t", seed, 0.5, goals=[True] * (count if seed else 60 * (count > 0))) for seed in range(5)]
    assert (f"Few episodes: {count} in some evaluation" in text(runs)) == warned
    if warned:
        assert "a standard error of 7 points" in text(runs)  # 100 * 0.5 / 7


@pytest.mark.parametrize(
    ("levels", "expected"),
    [((0.95, 1.0), "solved by every method, hence uninformative: t"), ((0.0, 0.05), "failed by every method"),
     ((0.94, 1.0), ""), ((0.0, 0.06), "")],
)  # fmt: skip
def test_tasks_that_tell_nothing(levels: tuple[float, float], expected: str) -> None:
    found = text(make_runs({"a": {"t": [levels[0]] * 5}, "b": {"t": [levels[1]] * 5}}))
    assert expected in found
    assert ("uninformative" in found) == bool(expected)
    assert "uninformative" not in text(make_runs({"a": {"t": [1.0] * 5}}))
    returns = make_runs({"a": {"t": [1.0] * 5}, "b": {"t": [0.99] * 5}}, key="mean_reward")
    assert "uninformative" not in text(returns), "a return of 1 is no success"


def test_methods_that_were_not_treated_alike() -> None:
    runs = [make_run(m, "t", seed, FIVE[seed], goals=[True] * 60) for m in ("a", "b") for seed in range(5)]
    assert "Seeds differ" not in text(runs)
    assert "held-out goals" not in text(runs)
    assert "Seeds differ between methods on t" in text(runs[:-1])
    other = replace(runs[-1], goals={k + 1: {"success": 1.0} for k in range(60)})
    assert "different held-out goals" in text([*runs[:-1], other])
    hashed = [replace(run, summary={**run.summary, "data": {"hash": run.method}}) for run in runs]
    assert "different demonstrations" in text(hashed)
    shared = [replace(run, seed=0, summary={**run.summary, "data": {"hash": f"{run.seed}"}}) for run in runs]
    assert "demonstrations" not in text(shared), "runs of one seed are paired by their data"
    assert "Seeds differ" not in text(shared)
    assert "Seeds differ between methods on t" in text(shared[:-1])
    assert "different study files" not in text(runs)
    strays = [replace(run, study="0a") if run.method == "a" else run for run in runs]
    assert ReportWarning("The runs belong to different study files, or some to none.", severe=True) in told(strays)


def test_seeds_that_share_their_demonstrations_are_said() -> None:
    """They decide more than the seed; intervals looked as if they spoke of others, too."""

    def cloning(*hashes: str) -> list[Run]:
        runs = [make_run(method, "t", seed, 0.1 * seed) for method in "ab" for seed in range(len(hashes))]
        return [replace(run, summary={**run.summary, "data": {"hash": hashes[run.seed]}}) for run in runs]

    assert "All seeds of a method clone the same demonstrations: t." in text(cloning("x", "x", "x"))
    assert "clone the same" not in text(cloning("x", "y", "x"))
    assert "clone the same" not in text(cloning("", "", "")), "there are none"


def test_settings_beside_the_adapter_are_named_on_one_line() -> None:
    """A line break in a setting ended the warning, and began a paragraph of its own."""
    settings = ({"a.x": "one\n\n# two", "adapter.rank": 4}, {"a.x": True, "adapter.rank": 8})
    runs = [make_run(m, "t", s, FIVE[s], settings=own) for m, own in zip("ab", settings, strict=True) for s in range(5)]
    found = text(runs)
    assert "Methods differ in more than the adapter (a.x: one # two, true; adapter.rank: 4, 8)." in found
    assert "Ranks differ" not in found, "that is said already"
    named = [make_run(m, "t", s, FIVE[s], settings={"adapter.method": m}) for m in ("a", "b") for s in (0, 1)]
    assert "more than the adapter" not in text(named)
    ranks = [
        make_run(m, "t", s, FIVE[s], settings={"adapter.rank": r}) for m, r in (("a", 4), ("b", 8)) for s in (0, 1)
    ]
    assert "Ranks differ between rows" in text([*ranks, make_run("full", "t", 0, 0.5)])
