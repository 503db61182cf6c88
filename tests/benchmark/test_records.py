"""Records of runs: what is kept of a long learning curve."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from eva_rl.benchmark.records import MOST_POINTS, thinned
from eva_rl.report.curves import points_of
from eva_rl.report.reading import Row
from tests.report.making_groups import make_run


def online_rows(iterations: int, every: int, kind: str = "validation") -> Iterator[Row]:
    """As an online run writes them: counters of each iteration, then its evaluation."""
    for k in range(iterations + 1):
        place = {"step": 10.0 * k, "wall_time": 100.0 + k}
        if k:
            yield {**place, "time/gradient_steps": 4.0 * k, "train/loss": 0.1}
        if k % every == 0:
            yield {**place, f"{kind}/success_rate": k / iterations}


@pytest.mark.parametrize("kind", ["validation", "eval", "bc/validation"])
def test_a_long_run_keeps_its_evaluations(kind: str) -> None:
    """Of 20 among 5,000 iterations one was left, because every second row went, whatever it was."""
    rows = list(online_rows(5_000, 250, kind))
    kept = thinned(rows)
    assert MOST_POINTS / 2 <= len(kept) <= MOST_POINTS
    scores = [row[f"{kind}/success_rate"] for row in kept if f"{kind}/success_rate" in row]
    assert scores == [k / 20 for k in range(21)]
    assert [kept[0]["step"], kept[-1]["step"]] == [0.0, 50_000.0]
    assert [row["step"] for row in kept] == sorted(row["step"] for row in kept)


def test_evaluations_stay_at_their_gradient_steps() -> None:
    """The rows that counted them may be gone."""
    rows = list(online_rows(5_000, 250))
    settings = {"algo.env_steps": 50_000}
    whole, short = (
        points_of(make_run("a", "t", 0, 1.0, settings=settings, rows=own), "success_rate")
        for own in (rows, thinned(rows))
    )
    np.testing.assert_array_equal(short.values, whole.values)
    for axis, places in whole.places.items():
        np.testing.assert_array_equal(short.places[axis], places)


def test_too_many_evaluations_are_thinned_those_on_held_out_episodes_last() -> None:
    rows = sorted([*online_rows(3_000, 1), *online_rows(3_000, 100, "eval")], key=lambda row: row["step"])
    kept = thinned(rows)
    assert len(kept) <= MOST_POINTS
    assert sum("eval/success_rate" in row for row in kept) == 31
    validated = [row["step"] for row in kept if "validation/success_rate" in row]
    assert len(validated) > 50
    assert np.diff(validated).max() <= 4 * np.median(np.diff(validated))


def test_a_short_curve_is_kept_as_it_is() -> None:
    rows = [row for row in online_rows(64, 4) if "train/loss" not in row]
    assert thinned(rows) == rows
    counted = list(online_rows(64, 4))
    assert [row["step"] for row in thinned(counted)] == [row["step"] for row in counted]
