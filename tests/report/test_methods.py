"""Rows of the tables: which runs make one, and what it is called."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eva_rl.report.comparison import analyse, goal_differences, run_differences
from eva_rl.report.methods import group_tasks, make_methods, paired_runs, plain_setting
from eva_rl.report.runs import Run, select
from eva_rl.report.verdicts import endpoint_values, paired_differences
from tests.report.making_groups import QUICK, make_group, make_run


def labels(*settings: dict[str, Any], name: str = "eva") -> list[str]:
    return [m.label for m in make_methods([make_run(name, "t", 0, 0.5, settings=own) for own in settings])]


def test_a_row_shows_the_settings_in_which_it_differs() -> None:
    assert labels({"adapter.rank": 4, "algo.updates": 9}) == ["eva"]
    assert labels({"adapter.rank": 4, "a": 1}, {"adapter.rank": 8, "a": 1}) == ["eva (rank=4)", "eva (rank=8)"]
    assert labels({"adapter.rank": 4}, {}) == ["eva", "eva (rank=4)"]
    targets = {"adapter.targets": ["q", "v"], "adapter.center": True, "eval.limit": None}
    assert labels(targets, {"adapter.targets": "all", "adapter.center": False, "eval.limit": 3}) == [
        "eva (center=false, targets=all, limit=3)",
        "eva (center=true, targets=q+v, limit=null)",
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (({"a.x": 1}, {"b.x": 1}), ["eva (a.x=1)", "eva (b.x=1)"]),
        (({"a.x": 1, "b.x": 2}, {"a.x": 2, "b.x": 1}), ["eva (a.x=1, b.x=2)", "eva (a.x=2, b.x=1)"]),
        (({"x": "1"}, {"x": 1}), ["eva (x=1)", "eva (x=1) #2"]),
        (({"x": ["a", "b"]}, {"x": "a+b"}), ["eva (x=a+b)", "eva (x=a+b) #2"]),
        (({"x": "y" * 300}, {"x": "y" * 301}), [f"eva (x={'y' * 58}...{'y' * 58})", None]),
    ],
)
def test_no_two_rows_have_one_name(settings: Any, expected: list[str | None]) -> None:
    """All tables go by the label: of two rows of one label both once showed the numbers of the second."""
    found = labels(*settings)
    assert len(set(found)) == 2
    assert [a if b is None else b for a, b in zip(found, expected, strict=True)] == found
    (group,) = group_tasks(
        [make_run("eva", "t", 0, score, settings=own) for own, score in zip(settings, (0.25, 1.0), strict=True)]
    )
    analysis = analyse(group, QUICK)
    assert sorted(float(own["mean"].value) for own in analysis.aggregates.values()) == [0.25, 1.0]


def test_rows_of_two_algorithms_do_not_list_what_only_one_of_them_has() -> None:
    """A folder of runs of five algorithms had labels of thirty-five settings."""
    cloning = {"algo.name": "bc", "algo.updates": 5, "algo.loss": "l2"}
    online = {"algo.name": "odt", "algo.env_steps": 100, "algo.updates": None}
    assert sorted(labels(cloning, online)) == ["eva (algo=bc)", "eva (algo=odt)"]
    assert sorted(labels(cloning, online, {**online, "algo.env_steps": 200})) == [
        "eva (algo=bc)",
        "eva (env_steps=100, algo=odt)",
        "eva (env_steps=200, algo=odt)",
    ]


def test_a_name_may_look_like_a_label() -> None:
    """A study may call a method of its own so."""
    runs = [make_run("eva", "t", 0, 0.5, settings={"x": x}) for x in (1, 2)] + [make_run("eva (x=1)", "t", 0, 0.5)]
    assert [m.label for m in make_methods(runs)] == ["eva (x=1)", "eva (x=2)", "eva (x=1) #2"]
    assert [m.name for m in make_methods(runs)] == ["eva", "eva", "eva (x=1)"]


def test_plain_settings() -> None:
    values = {"true": "true", "null": "null", "0.5": "0.5", '"a b"': "a b", '["q", "v"]': "q+v", "[]": "",
              r'"a\nb"': "a b", '{"k": 1}': '{"k": 1}'}  # fmt: skip
    assert {value: plain_setting(value) for value in values} == values


def test_tasks_are_grouped_by_score_and_returns_stand_alone() -> None:
    runs = [make_run("eva", task, 0, 0.5) for task in ("b", "a")]
    runs += [make_run("eva", task, 0, -3.0, key="mean_reward") for task in ("y", "x")]
    runs += [make_run("eva", "n", 0, 50.0, key="normalized_score")]
    groups = {group.title: (list(group.tasks), group.bounded) for group in group_tasks(runs)}
    assert groups == {
        "success rate": (["a", "b"], True),
        "return on x": (["x"], False),
        "return on y": (["y"], False),
        "normalised score": (["n"], False),
    }


def test_a_task_of_one_method_alone_is_no_common_one() -> None:
    group = make_group({"a": {"t": [0.5], "u": [0.25]}, "b": {"t": [1.0]}})
    assert (list(group.tasks), list(group.partial)) == (["t"], ["u"])
    apart = make_group({"a": {"t": [0.5]}, "b": {"u": [1.0]}})
    assert (list(apart.tasks), list(apart.partial)) == ([], ["t", "u"])
    found = analyse(apart, QUICK)
    assert (found.aggregates, list(found.comparisons), found.profiles) == ({}, [], {})
    assert {task: list(means) for task, means in found.tasks.items()} == {"t": ["a"], "u": ["b"]}
    assert np.isnan(found.before["t"])


def drawn(method: str, score: float, data: str, seed: int = 0) -> Run:
    """A run on these demonstrations."""
    return make_run(method, "t", seed, score, goals=[score > 0.5], summary={"data": {"hash": data}})


def test_runs_that_share_a_seed_are_paired_by_their_data() -> None:
    """seed=0 data.seed=0..2: all but the first were dropped as copies, and a seed stood for one of its runs."""
    scores = {"x": (0.9, 0.6), "y": (0.2, 0.4), "z": (0.5, 0.5)}
    runs = [drawn(m, own[k], data) for data, own in scores.items() for k, m in enumerate("ab")][::-1]
    kept, problems = select([*runs, drawn("a", 0.0, "w"), drawn("a", 0.3, "p", 1), drawn("b", 0.1, "q", 1)], [])
    assert problems == []
    (group,) = group_tasks(kept)
    a, b = group.methods
    pairs = paired_runs(a, b, "t")
    assert [(one.seed, one.data_hash, other.data_hash) for one, other in pairs] == [
        (0, "x", "x"), (0, "y", "y"), (0, "z", "z"), (1, "p", "q"),
    ]  # fmt: skip
    expected = [0.3, -0.2, 0.0, 0.2]
    np.testing.assert_allclose(run_differences(group.key, "t", a, b), expected)
    np.testing.assert_allclose(paired_differences(group, "final", a, b), [expected])
    assert len(endpoint_values(a, "t", "final", group.key)) == 5
    assert [list(goal) for goal in goal_differences(group, a, b)] == [[0.0, 0.0, 0.0, 0.0]]
