"""Endpoints and verdicts: their values, their words, and how often they are wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy

from eva_rl.report.comparison import Resampling, analyse
from eva_rl.report.methods import Method, TaskGroup
from eva_rl.report.runs import Run
from eva_rl.report.settings import Decision
from eva_rl.report.verdicts import area, endpoint_means, held_out, updates_to_90, verdicts
from eva_rl.report.warnings import warnings_of
from tests.report.making_groups import analysis_of, make_group

KEY = "success_rate"


def run(method: str, task: str, seed: int, scores: dict[int, float]) -> Run:
    rows = [{"step": float(step), "wall_time": 0.0, f"eval/{KEY}": score} for step, score in scores.items()]
    summary: dict[str, Any] = {"env": task, "method": method, "seed": seed, f"eval/{KEY}": list(scores.values())[-1]}
    return Run(Path(f"{method}/{task}/{seed}"), task, method, seed, (), summary, {}, rows, evaluates=True)


def group(scores: dict[str, np.ndarray]) -> TaskGroup:  # type: ignore[type-arg]
    """Methods with final scores (tasks, seeds)."""
    methods = [
        Method(
            m,
            m,
            {},
            {f"t{t}": [run(m, f"t{t}", s, {100: float(x)}) for s, x in enumerate(row)] for t, row in enumerate(own)},
        )
        for m, own in scores.items()
    ]
    tasks = [f"t{t}" for t in range(len(next(iter(scores.values()))))]
    return TaskGroup("success rate", KEY, tasks, [], methods)


def test_endpoints_of_a_curve() -> None:
    one = run("eva", "t", 0, {0: 0.0, 10: 0.4, 20: 1.0, 40: 0.8})
    assert held_out(one, KEY).tolist() == [[0, 0], [10, 0.4], [20, 1], [40, 0.8]]
    assert area(one, KEY) == pytest.approx((10 * 0.2 + 10 * 0.7 + 20 * 0.9) / 40)
    assert updates_to_90(one, KEY) == pytest.approx(10 + 10 * 0.5 / 0.6)
    assert updates_to_90(run("eva", "t", 0, {0: 0.0, 10: 0.4, 20: 0.8}), KEY) == 20  # never: the last update
    assert updates_to_90(run("eva", "t", 0, {0: 0.95, 10: 0.4, 20: 0.8}), KEY) == 0
    before_and_after = run("eva", "t", 0, {0: 0.0, 40: 0.8})
    assert np.isnan(area(replace(before_and_after, evaluates=False), KEY))
    assert area(before_and_after, KEY) == pytest.approx(0.4), "its first iteration was its last"
    assert np.isnan(updates_to_90(one, "mean_reward"))


def test_endpoints_are_over_the_env_steps_of_training() -> None:
    """Validation, and the rollouts that EVA's directions come from, moved all points of a run to the right."""
    plain = run("lora", "t", 0, {0: 0.0, 500: 0.6, 1000: 0.95})
    moved = run("eva", "t", 0, {0: 0.0, 2500: 0.6, 3700: 0.95})
    cloned = {"step": 400.0, "wall_time": 0.0, f"eval/{KEY}": 0.0}  # in place of the one before
    first, last = ({"step": 2000.0 + n, "wall_time": 0.0, "time/env_steps": float(n)} for n in (500, 1000))
    validated = {"step": 3700.0, "wall_time": 0.0, "validation/mean_reward": 1.0}
    before, early, end = moved.rows
    moved.rows[:] = [before, cloned, first, early, last, validated, end]
    assert held_out(moved, KEY).tolist() == held_out(plain, KEY).tolist()
    assert area(moved, KEY) == area(plain, KEY)
    assert updates_to_90(moved, KEY) == updates_to_90(plain, KEY)


def test_verdicts_are_those_of_a_plain_computation() -> None:
    rng = np.random.default_rng(0)
    scores = {
        "a": rng.uniform(0.5, 0.6, (1, 12)),
        "b": rng.uniform(0.1, 0.2, (1, 12)),
        "c": rng.uniform(0.5, 0.6, (1, 12)),
    }
    found = {(v.first, v.second): v for v in verdicts(group(scores), Decision("final", 0.1))}
    for (first, second), v in found.items():
        d = (scores[first] - scores[second])[0]
        exact = scipy.permutation_test((d,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
        assert v.p_difference == pytest.approx(exact)
        sides = [scipy.ttest_1samp(d, -0.1, alternative="greater"), scipy.ttest_1samp(d, 0.1, alternative="less")]
        assert v.p_equivalence == pytest.approx(max(side.pvalue for side in sides))
    assert [found[pair].text for pair in (("a", "b"), ("b", "c"), ("a", "c"))] == ["a better", "c better", "equivalent"]
    assert {v.text for v in verdicts(group(scores))} == {"a better", "c better", "undecided"}


def test_with_a_reference_the_others_are_compared_with_it_alone() -> None:
    """And corrected for these pairs: of three methods two, of which one difference is as large as with all three."""
    scores = {
        "a": [0.5, 0.6, 0.7, 0.55, 0.65, 0.6],
        "b": [0.3, 0.42, 0.5, 0.37, 0.43, 0.39],
        "c": [0.5, 0.61, 0.69, 0.55, 0.66, 0.6],
    }
    own = make_group({name: {"t": values} for name, values in scores.items()})
    found = verdicts(own, Decision("final", None, "b"))
    assert [(v.first, v.second) for v in found] == [("a", "b"), ("c", "b")]
    assert [v.corrected[0] for v in found] == [2 * 2 / 2**6] * 2
    assert [v.corrected[0] for v in verdicts(own) if "b" in {v.first, v.second}] == [3 * 2 / 2**6] * 2
    compared = analyse(own, Resampling(replicates=20), "b").comparisons
    assert {(c.first, c.second) for c in compared} == {("a", "b"), ("c", "b")}
    assert [c.p_corrected for c in compared] == [2 * 2 / 2**6] * 2
    assert verdicts(own, Decision("final", None, "d")) == []


def test_each_method_has_its_mean_by_an_endpoint_the_best_first() -> None:
    """Endpoints other than the final score were shown as differences of pairs alone."""
    curves = {"slow": (0.0, 0.2, 0.9), "fast": (0.0, 0.8, 0.9)}
    methods = [
        Method(m, m, {}, {"t": [run(m, "t", s, {0: a, 10: b + s / 10, 20: c}) for s in range(3)]})
        for m, (a, b, c) in curves.items()
    ]
    methods.append(Method("once", "once", {}, {"t": [run("once", "t", 0, {0: 0.0, 10: 0.5, 20: 0.9})]}))
    own = TaskGroup("success rate", KEY, ["t"], [], methods)
    fast, once, slow = endpoint_means(own, "area")
    areas = [(0.8 + s / 10) / 2 + 0.9 / 4 for s in range(3)]
    expected = scipy.ttest_1samp(areas, 0).confidence_interval()
    assert (fast.label, once.label, slow.label) == ("fast", "once", "slow")
    assert fast.value == pytest.approx(np.mean(areas))
    assert fast.spread is not None
    assert fast.spread.interval() == pytest.approx((expected.low, expected.high))
    assert once.spread is None
    assert next(m.label for m in endpoint_means(own, "updates_to_90")) == "fast", "less is better"
    assert endpoint_means(own, "cloning_loss") == []


def test_the_winner_is_the_one_that_the_test_found() -> None:
    """Twelve seeds for a by 0.1, one seed of another task for b by 0.15: once significant by the pooled sum of pairs,
    and "b better" by the mean over tasks.
    """
    more, less = [0.5 + 0.1] * 12, [0.5] * 12
    runs = {"a": {"t0": more, "t1": [0.5]}, "b": {"t0": less, "t1": [0.65]}}
    (found,) = verdicts(make_group(runs))
    assert (found.pairs, found.text) == (13, "undecided")
    (comparison,) = analysis_of(runs).comparisons
    assert comparison.p_runs == found.p_difference > 0.05
    (turned,) = verdicts(make_group({"a": {"t0": more, "t1": [0.65]}, "b": {"t0": less, "t1": [0.5]}}))
    assert turned.text == "a better"
    assert turned.p_difference == 2 / 2**13


def test_less_is_better_where_it_is() -> None:
    curves = {"slow": {0: 0.0, 10: 0.1, 80: 1.0}, "fast": {0: 0.0, 10: 0.95, 80: 1.0}}
    methods = [Method(m, m, {}, {"t": [run(m, "t", s, curve) for s in range(8)]}) for m, curve in curves.items()]
    (found,) = verdicts(TaskGroup("success rate", KEY, ["t"], [], methods), Decision("updates_to_90"))
    assert found.text == "fast better"
    assert not verdicts(TaskGroup("success rate", KEY, ["t"], [], methods), Decision("cloning_loss"))


def curves_of_two(final: dict[str, float], early: dict[str, float]) -> TaskGroup:
    """Eight seeds: success after 10 updates and after 80."""
    rng, methods = np.random.default_rng(0), []
    for m, end in final.items():
        scores = [(early[m] + n, end + n) for n in rng.uniform(0, 0.01, 8)]
        runs = [run(m, "t", seed, {0: 0.0, 10: first, 80: last}) for seed, (first, last) in enumerate(scores)]
        methods.append(Method(m, m, {}, {"t": runs}))
    return TaskGroup("success rate", KEY, ["t"], [], methods)


def told(group: TaskGroup, endpoint: str, margin: float | None = None) -> str:
    analysis = analyse(group, Resampling(replicates=20))
    return " ".join(w.text for w in warnings_of(analysis, [], Decision(endpoint, margin)))


def test_the_red_line_is_about_the_endpoint() -> None:
    """Equal at the end, and apart on the way: the line once spoke of the end whatever was asked."""
    faster = curves_of_two({"a": 0.8, "b": 0.8}, {"a": 0.7, "b": 0.2})
    assert "No two methods differ significantly." in told(faster, "final")
    assert "differ significantly" not in told(faster, "area")
    better = curves_of_two({"a": 0.8, "b": 0.5}, {"a": 0.2, "b": 0.5})
    assert "differ significantly" not in told(better, "final")
    assert "tell of the cloning loss" in told(better, "cloning_loss")


def test_equivalent_methods_are_no_undecided_ones() -> None:
    same = curves_of_two({"a": 0.8, "b": 0.8}, {"a": 0.2, "b": 0.2})
    assert "No two methods differ significantly" in told(same, "area")
    found = told(same, "area", margin=0.1)
    assert "Equivalent by area under the learning curve, within the margin: a and b." in found
    assert "differ significantly" not in found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("means", "false"),
    [
        ((0.5, 0.5, 0.5), {"a better", "b better", "c better"}),  # no difference
        ((0.5, 0.65, 0.5), {"equivalent"}),  # exactly the margin, and one true equivalence
    ],
)
def test_a_verdict_of_a_study_is_false_in_five_of_a_hundred_at_most(means: tuple[float, ...], false: set[str]) -> None:
    """Success of 50 goals with a spread between seeds: three methods, two tasks, six seeds."""
    rng, wrong, studies = np.random.default_rng(1), 0, 400
    for _ in range(studies):
        rates = {m: np.clip(rng.normal(mean, 0.08, (2, 6)), 0, 1) for m, mean in zip("abc", means, strict=True)}
        scores = {m: rng.binomial(50, own) / 50 for m, own in rates.items()}
        found = verdicts(group(scores), Decision("final", 0.15))
        if len(false) > 1:
            wrong += any("better" in v.text for v in found)
        else:
            wrong += any(v.text == "equivalent" and "b" in {v.first, v.second} for v in found)
    assert wrong / studies <= 0.05 + 0.02  # two standard errors
