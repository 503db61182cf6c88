"""docs/verdict.md says what the committed records say."""

from __future__ import annotations

from pathlib import Path

from benchmarks.comparisons import verdict

ROOT = Path(__file__).parents[1]


def test_every_number_of_the_page_comes_from_the_records() -> None:
    page = verdict.PAGE.read_text()
    written = {verdict.SUMMARY: verdict.summary()} | {study: verdict.numbers(study) for study in verdict.STUDIES}
    for name, text in written.items():
        begin, end = verdict.around(name)
        _, _, rest = page.partition(begin)
        found, _, _ = rest.partition(end)
        assert found.strip() == text, "run: python -m benchmarks.comparisons.verdict --write"
    assert all(verdict.figure(study).exists() for study in verdict.STUDIES)


def test_records_are_of_the_studies_that_were_decided_on() -> None:
    """A run of another file, of a tuning task in the test, or on a test seed in tuning, is none of the study."""
    read = 0
    for name in (half for halves in verdict.STUDIES.values() for half in halves):
        study, runs = verdict.read_half(name)
        for run in runs:
            read += 1
            assert run.study == study.digest, run.place
            tasks, seeds = (study.tuning_tasks, study.tuning_seeds) if run.tuning else (study.tasks, study.seeds)
            assert run.task in tasks
            assert run.seed in seeds
    assert read > 0
