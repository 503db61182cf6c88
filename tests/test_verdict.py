"""docs/verdict.md says what the committed records say."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import script

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def verdict() -> ModuleType:
    return script(ROOT / "benchmarks" / "verdict.py")


def test_every_number_of_the_page_comes_from_the_records(verdict: ModuleType) -> None:
    page = verdict.PAGE.read_text()
    _, _, rest = page.partition(verdict.BEGIN)
    found, _, _ = rest.partition(verdict.END)
    assert found.strip() == verdict.numbers(), "run: python benchmarks/verdict.py --write"
    assert verdict.FIGURE.exists()


def test_records_are_of_the_studies_that_were_decided_on(verdict: ModuleType) -> None:
    """A run of another file, of a tuning task in the test, or on a test seed in tuning, is none of the study."""
    read = 0
    for name in verdict.HALVES:
        study, runs = verdict.read_half(name)
        for run in runs:
            read += 1
            assert run.study == study.digest, run.place
            tasks, seeds = (study.tuning_tasks, study.tuning_seeds) if run.tuning else (study.tasks, study.seeds)
            assert run.task in tasks
            assert run.seed in seeds
    assert read > 0
