"""Rows of the tables: which runs make one, and what it is called."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eva_rl.report.comparison import analyse, goal_differences, run_differences
from eva_rl.report.methods import group_tasks, make_methods, paired_runs, plain_setting
from eva_rl.report.runs import Run, select
from eva_rl.report.settings import Decision
from eva_rl.report.verdicts import endpoint_values, paired_differences
from eva_rl.report.warnings import warnings_of
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


def test_settings_that_others_lack_are_shown_only_where_nothing_else_differs() -> None:
    """LoRA at EVA's scale was listed with all settings of EVA's pass, which cut its name off in every figure."""
    own, eva = (
        {"adapter.gain": "own"},
        {"adapter.gain": "eva", "adapter.eva.batch_size": 64, "adapter.eva.source": "auto"},
    )
    assert labels(own, eva, name="lora") == ["lora (gain=eva)", "lora (gain=own)"]
    several = ({"x": 1}, {"x": 1, "y": 2}, {"x": 2, "y": 3}, {"x": 2, "y": 4})
    assert labels(*several) == ["eva (x=1)", "eva (x=1, y=2)", "eva (x=2, y=3)", "eva (x=2, y=4)"]


def test_data_that_go_with_the_task_tell_no_methods_apart() -> None:
    """Each method was one row a task, and nothing was compared."""
    data = {"t0": {"data.source": "minari:hopper/medium-v0"}, "t1": {"data.source": "minari:walker2d/medium-v0"}}
    runs = [
        make_run(m, task, s, 0.5, settings=own) for m in ("eva", "lora") for task, own in data.items() for s in (0, 1)
    ]
    (group,) = group_tasks(runs)
    assert [method.label for method in group.methods] == ["eva", "lora"]
    assert (group.tasks, group.partial) == (["t0", "t1"], [])
    other = make_run("eva", "t0", 0, 0.5, settings={"data.source": "minari:hopper/expert-v0"})
    (group,) = group_tasks([*runs, other])
    assert len(group.methods) == 5, "two data sets of one task are two methods"
    rates = [
        make_run("eva", task, 0, 0.5, settings={"algo.learning_rate": rate}) for task, rate in (("a", 1), ("b", 2))
    ]
    assert len(make_methods(rates)) == 2, "what is not of the task tells methods apart"


def test_a_reference_that_is_several_rows_compares_each_pair() -> None:
    """It compared none, and said that no run told of the endpoint."""
    runs = [make_run("eva", "t", seed, 0.5) for seed in (0, 1)]
    runs += [make_run("lora", "t", seed, 0.4, settings={"n": n}) for seed in (0, 1) for n in (32, 64)]
    (group,) = group_tasks(runs)
    assert len(group.compared("lora")) == 3
    assert [a.label for a, _ in group.compared("lora (n=64)")] == ["eva", "lora (n=32)"]
    found = [w.text for w in warnings_of(analyse(group, QUICK, "lora"), [], Decision("final", None, "lora"))]
    assert any("reference, lora, has several rows here: lora (n=32), lora (n=64). Each pair" in text for text in found)
    assert not any("No two runs" in text for text in found)
    absent = [w.text for w in warnings_of(analyse(group, QUICK, "dora"), [], Decision("final", None, "dora"))]
    assert "The study's reference, dora, has no run here: nothing is compared." in absent


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
