"""What a fine-tuned policy forgets: which policies are played, and the table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparisons import forgetting

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("off", "expected"), [(False, ["eva-5", "full-5"]), (True, ["eva-5"])])
def test_policies_of_the_asked_runs_are_played_and_only_adapters_turned_off(
    off: bool, expected: list[str], tmp_path: Path
) -> None:
    for run in ("push-v3/eva-5/seed_0", "push-v3/eva-25/seed_0", "push-v3/full-5/seed_0", "push-v3/eva-5/seed_1"):
        (tmp_path / run / "policy").mkdir(parents=True)
        if "eva" in run:
            (tmp_path / run / "policy" / "adapter").mkdir()
    asked = argparse.Namespace(folder=tmp_path, demonstrations=[5], tasks=[], seeds=[0], off=off)
    assert not list(forgetting.policies(argparse.Namespace(**vars(asked) | {"tasks": ["reach-v3"]})))
    found = list(forgetting.policies(asked))
    assert [record["method"] for record, _ in found] == expected
    assert {(record["task"], record["seed"], record.get("adapter")) for record, _ in found} == {
        ("push-v3", 0, "off" if off else None)
    }
    assert [Path(path).parts[-4:] for _, path in found] == [("push-v3", m, "seed_0", "policy") for m in expected]


def test_the_table_counts_success_and_what_the_base_plays_again() -> None:
    def record(method: str, *first_success: int, **others: Any) -> dict[str, Any]:
        return {
            "method": method,
            "first_success": {"a": list(first_success[:2]), "b": list(first_success[2:])},
            **others,
        }

    text = forgetting.text([
        record("mt40", 3, 4, 5, -1),
        record("eva-5", 3, -1, -1, -1), record("eva-5", 3, 0, 7, -1), record("full-25", -1, -1, -1, -1),
        record("eva-5", 3, 4, 5, -1, adapter="off"), record("eva-5", 3, 4, 6, -1, adapter="off"),
    ])  # fmt: skip
    assert "2 episodes a task: 0.75." in text
    assert "| `eva` | 5 | 2 | 0.50 | 0.25 |\n| `full` | 25 | 1 | 0.00 | 0.00 |" in text
    assert "With the adapter off, 1 of 2 policies play exactly" in text


def test_the_page_has_the_records_numbers() -> None:
    records = json.loads((ROOT / "docs" / "results" / "forgetting.json").read_text())
    page = (ROOT / "docs" / "verdict.md").read_text()
    shown = page.partition(forgetting.BEGIN)[2].partition(forgetting.END)[0].strip()
    assert shown == forgetting.text(records), (
        "run: python -m benchmarks.comparisons.forgetting table docs/results/forgetting.json ..."
    )
    off = [record for record in records if record.get("adapter") == "off"]
    base = next(record for record in records if record["method"] == "mt40")
    assert off
    assert all(record["first_success"] == base["first_success"] for record in off)
