"""Plans: what can be detected is only said where the spread is known in the endpoint's unit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eva_rl.benchmark.plan import plan_table, read_pilot
from eva_rl.benchmark.study import Study, read_study
from tests.report.making_runs import make_run

ROOT = Path(__file__).parent.parent.parent
METHODS = {"lora": {"adapter": "lora"}, "eva": {"adapter": "eva"}}


def smallest(study: Study, pilot: str = "") -> tuple[list[str], str]:
    """The last column, and the note below."""
    table = plan_table(study, read_pilot(pilot, study), 0, 10, 1)
    return [row[-1] for row in table.rows], table.note


def test_one_method_is_compared_with_none() -> None:
    """It was said how small a difference a test corrected for 0 pairs of methods would find."""
    one = {"eva": METHODS["eva"]}
    shown, note = smallest(Study(["metaworld/push-v3"], one, [0, 1], margin=0.03))
    assert set(shown) == {"-"}
    assert note == "There is one method, and nothing to compare it with."


@pytest.mark.parametrize(
    ("endpoint", "tasks", "assumed"),
    [
        ("final", ["metaworld/push-v3"], True),
        ("area", ["metaworld/push-v3", "metaworld/reach-v3"], True),
        ("updates_to_90", ["metaworld/push-v3"], False),
        ("cloning_loss", ["metaworld/push-v3"], False),
        ("final", ["mujoco/hopper"], False),
        ("final", ["metaworld/push-v3", "mujoco/hopper"], False),
    ],
)
def test_a_spread_is_assumed_of_success_rates_alone(endpoint: str, tasks: list[str], assumed: bool) -> None:
    """0.2 of a success rate was taken for 0.2 updates, or for 0.2 of a return."""
    shown, note = smallest(Study(tasks, METHODS, [0, 1], budgets=[1, 2], endpoint=endpoint))
    assert (set(shown) != {"-"}) is assumed
    assert ("The smallest difference is not known" in note) is not assumed
    assert "pilot=FOLDER" in note


def test_a_pilot_has_a_spread_where_its_tasks_share_a_unit(tmp_path: Path) -> None:
    for method, low in (("eva", 0), ("lora", 1)):
        for seed in range(3):
            solved = [k < low + seed * (1 + low) for k in range(10)]
            make_run(tmp_path / "one" / f"{method}{seed}", "push-v3", solved, f"adapter={method}", f"seed={seed}")
    study = Study(["metaworld/push-v3"], METHODS, [0, 1])
    assert read_pilot(str(tmp_path), study).spread == pytest.approx(np.std([0.1, 0.2, 0.3], ddof=1))
    shown, _ = smallest(study, str(tmp_path))
    assert "-" not in shown[3:]
    for method in METHODS:
        for seed in range(3):
            make_run(
                tmp_path / "two" / f"{method}{seed}",
                "mujoco/hopper",
                [True, False],
                f"adapter={method}",
                f"seed={seed}",
            )
    shown, note = smallest(study, str(tmp_path))
    assert set(shown) == {"-"}
    assert "judged by different scores" in note


def test_the_tuning_runs_of_a_pilot_are_not_compared() -> None:
    """They lie on other tasks, which were taken for tasks that no two methods share."""
    study = read_study(ROOT / "benchmarks" / "studies" / "cw10_a.yaml")
    pilot = read_pilot(str(ROOT / "docs" / "results" / "cw10_a"), study)
    assert np.isfinite([pilot.spread, pilot.seconds]).all()
    assert pilot.source.startswith("from 160 runs in ")


def test_a_reference_leaves_fewer_pairs_to_correct_for() -> None:
    methods = {name: {"adapter": name} for name in ("lora", "eva", "dora", "pissa")}
    study = Study(["metaworld/push-v3"] * 4, methods, list(range(5)))
    every, alone = (plan_table(one, read_pilot("", one), 0, 20, 1) for one in (study, replace(study, reference="eva")))
    assert "corrected for 6 pairs" in every.note
    assert "corrected for 3 pairs" in alone.note
    assert float(alone.rows[-1][3]) < float(every.rows[-1][3])


def test_a_margin_adds_how_likely_equivalence_is_found() -> None:
    study = Study(["metaworld/push-v3"] * 4, METHODS, list(range(40)), endpoint="final", margin=0.15)
    table = plan_table(study, read_pilot("", study), 0, 10, 1)
    shown = [float(row[-1]) for row in table.rows]
    assert table.columns[-1] == "equivalent"
    assert shown == sorted(shown)
    assert shown[0] == 0
    assert shown[-1] > 0.99
    assert "within 0.15" in table.note
