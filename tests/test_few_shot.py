"""The table of few demonstrations: whole seeds alone, and means over tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.comparisons import few_shot

ROOT = Path(__file__).parents[1]


def test_the_study_has_every_method_at_every_number_of_demonstrations() -> None:
    study, _ = few_shot.read_half(few_shot.STUDY)
    assert len(study.tasks) == 10
    names = {few_shot.parts(method)[0] for method in study.methods}
    assert {few_shot.parts(method) for method in study.methods} == {(n, k) for n in names for k in (1, 2, 5, 10, 25)}
    for method, settings in study.methods.items():
        assert settings["data.episodes"] == few_shot.parts(method)[1]


def test_a_mean_is_over_tasks_and_has_an_interval_from_two_seeds_on() -> None:
    study, _ = few_shot.read_half(few_shot.STUDY)

    def found(seeds: int) -> dict[str, dict[str, dict[int, float]]]:
        high = dict.fromkeys(study.tasks[:5], 0.8)
        return {
            m: {t: {s: high.get(t, 0.4) + 0.01 * s for s in range(seeds)} for t in study.tasks} for m in study.methods
        }

    assert few_shot.tables(study, found(0)) == "No seed is complete yet."
    one, two = few_shot.tables(study, found(1)), few_shot.tables(study, found(2))
    assert "| 5 | 0.60 | 0.60 | 0.60 |" in one
    assert "| 25 | 0.61 [" in two
    assert one.count("`hammer-v3`") == 1


def test_the_page_has_the_records_numbers() -> None:
    study, runs = few_shot.read_half(few_shot.STUDY)
    found = few_shot.scores(study, runs)
    shown = few_shot.PAGE.read_text().partition(few_shot.BEGIN)[2].partition(few_shot.END)[0].strip()
    assert shown == few_shot.tables(study, found), "run: python -m benchmarks.comparisons.few_shot --write"
    assert "all 15 pairs: 0.52" in shown, "the page says that no difference is significant"
    for number, low, high in ((5, "0.89", "0.92"), (10, "0.91", "0.93"), (25, "0.90", "0.92")):
        means = [
            f"{np.mean([np.mean(list(seeds.values())) for seeds in by_task.values()]):.2f}"
            for method, by_task in found.items()
            if few_shot.parts(method)[1] == number
        ]
        assert (min(means), max(means)) == (low, high), "README.md and the page say so"
