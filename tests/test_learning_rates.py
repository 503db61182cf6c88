"""The report of a sweep of learning rates."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.comparisons import learning_rates as sweep
from benchmarks.comparisons import learning_rates_report as report
from eva_rl.adapters import METHODS


def records(success: dict[str, dict[float, float]]) -> list[dict[str, Any]]:
    about = {"seed": 0, "setting": "25:100", "method": "lora"}
    return [
        {"run": about | {"task": task, "learning_rate": rate}, "success": value}
        for task, curve in success.items()
        for rate, value in curve.items()
    ]


def test_a_rate_that_is_best_in_one_place_only_is_not_chosen_for_it() -> None:
    """Each place has a lucky rate of its own; elsewhere it is worse than the one of ``auto``."""
    auto = METHODS["lora"].learning_rate
    lucky = {"a": {1e-3: 0.9, auto: 0.8, 1e-2: 0.2}, "b": {1e-3: 0.2, auto: 0.8, 1e-2: 0.9}}
    found = report.chosen_elsewhere(records(lucky), "success", "lora")
    assert found == (pytest.approx(0.8), pytest.approx(0.2))
    assert "4.00 |" in report.table(records(lucky), "success")


def test_one_place_has_no_other_to_choose_a_rate_on() -> None:
    one = records({"a": {1e-3: 0.9, 1e-2: 0.2}})
    assert report.chosen_elsewhere(one, "success", "lora") is None
    assert "elsewhere" not in report.table(one, "success")


def test_a_sweep_that_is_not_complete_has_a_place_for_every_method() -> None:
    curve = {1e-3: 0.9, 1e-2: 0.2}
    begun = records({"a": curve})
    for record in begun:
        record["run"] = record["run"] | {"method": "eva"}
    lines = report.table(records({"a": curve, "b": curve}) + begun, "success").splitlines()
    assert {line.count("|") for line in lines} == {8}
    assert lines[-1].endswith("| - |")


def test_a_run_that_diverged_has_no_success() -> None:
    found = records({"a": {1e-3: 0.9, 1e-2: 1.0}, "b": {1e-3: 0.7}})
    found.append({"run": found[0]["run"] | {"task": "b", "learning_rate": 1e-2}, "diverged": True})
    assert report.curves(found, "success") == {"lora": {1e-3: pytest.approx(0.8), 1e-2: pytest.approx(0.5)}}


def test_rates_that_failed_are_left_out() -> None:
    found = records({"a": {1e-4: 0.3, 1e-3: 0.9, 1e-2: 0.5}, "b": {1e-4: 0.3, 1e-3: 0.7}})
    found.append({"run": found[0]["run"] | {"task": "b", "learning_rate": 1e-2}, "diverged": True})
    assert sweep.failed(found, 0.5) == {("lora", 1e-4), ("lora", 1e-2)}
    assert sweep.failed(found, 0.0) == set()


def test_the_page_says_what_the_records_say() -> None:
    _, _, rest = report.PAGE.read_text().partition(report.BEGIN)
    found, _, _ = rest.partition(report.END)
    expected = report.numbers(list(report.read_records(report.SWEEP)))
    assert found.strip() == expected, "run: python -m benchmarks.comparisons.learning_rates_report --write"
    assert report.FIGURE.exists()


def test_methods_that_were_not_run_everywhere_are_left_out() -> None:
    curve = {1e-3: 0.9, 1e-2: 0.2}
    begun = [r | {"run": r["run"] | {"method": "eva"}} for r in records({"a": curve})]
    assert report.whole(records({"a": curve, "b": curve}) + begun) == records({"a": curve, "b": curve})
