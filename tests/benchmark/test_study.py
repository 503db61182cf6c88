"""Studies: what a study file may say, that tuning and test stay apart, and that records alone continue one."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from eva_rl.agents.policy_folder import save_policy
from eva_rl.benchmark import command as benchmark
from eva_rl.benchmark.grid import Place, comparison_cells, tuning_cells
from eva_rl.benchmark.records import write_record
from eva_rl.benchmark.study import names_of, read_study
from eva_rl.benchmark.tuning import choose
from eva_rl.cli.parsing import parse
from eva_rl.errors import UserError
from eva_rl.files import write_json
from eva_rl.finetune import command as finetune
from eva_rl.report.reading import find_runs
from eva_rl.report.runs import read_runs
from eva_rl.report.tuning import setting_of
from eva_rl.training.failures import NOT_FINITE_FILE
from tests.conftest import make_policy
from tests.report.making_runs import make_run

TINY = {
    "data.episodes": 1, "data.workers": 1, "data.only_successes": False, "algo.batch_size": 4, "eval.episodes": 4,
    "eval.every": 0, "env.horizon": 30, "tracker": [],
}  # fmt: skip
STUDY: dict[str, Any] = {
    "tasks": ["reach-v3", "push-v3"],
    "methods": {"lora": {}, "small": {"adapter": "eva", "adapter.rank": 2}, "head": {}},
    "seeds": [0, 1],
    "settings": TINY,
    "budgets": [1, 2, 4],
    "endpoint": "area",
    "margin": 0.1,
    "tune": {"algo.learning_rate": [0.001, 0.01]},
    "tuning_tasks": ["drawer-open-v3"],
    "tuning_seeds": [7],
}


def write(path: Path, **changes: Any) -> Path:
    study = {key: value for key, value in {**STUDY, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "out", tmp_path / "records", 1)


def test_what_a_study_file_decides(tmp_path: Path) -> None:
    study = read_study(write(tmp_path / "study.yaml"))
    tuned, tested = (
        tuning_cells(study, place(tmp_path)),
        comparison_cells(study, place(tmp_path), {m: {} for m in study.methods}),
    )
    assert (len(tuned), len(tested)) == (1 * 3 * 2 * 1, 2 * 3 * 2)
    cell = next(cell for cell in tested if cell.method == "small")
    config = cell.finetune
    assert (config.adapter.method, config.adapter.rank, config.algo.final_step, config.eval.at) == (
        "eva",
        2,
        4,
        [1, 2, 4],
    )
    assert config.study == study.digest
    assert tuned[1].name == "tuning/drawer-open-v3/lora/learning_rate=0.01/seed_7"
    assert tuned[1].finetune.algo.learning_rate == 0.01  # type: ignore[attr-defined]
    assert read_study(write(tmp_path / "other.yaml", margin=0.2)).digest != study.digest


def test_episodes_end_at_success_unless_the_study_says_otherwise(tmp_path: Path) -> None:
    def cells(**settings: Any) -> list[bool | None]:
        study = read_study(write(tmp_path / "study.yaml", settings={**TINY, **settings}))
        first = {method: study.candidates(method)[0] for method in study.methods}
        return [cell.finetune.eval.stop_at_success for cell in comparison_cells(study, place(tmp_path), first)[:1]]

    assert cells() == [True]
    assert cells(**{"eval.stop_at_success": False}) == [False]


def test_a_method_has_a_grid_of_its_own(tmp_path: Path) -> None:
    methods = {"full": {"tune": {"algo.learning_rate": [1e-4]}}, "lora": {}, "head": {"algo.learning_rate": 0.1}}
    study = read_study(write(tmp_path / "study.yaml", methods=methods))
    assert study.candidates("full") == [{"algo.learning_rate": 1e-4}]
    assert [one["algo.learning_rate"] for one in study.candidates("lora")] == [0.001, 0.01]
    assert study.candidates("head") == [{}]
    assert {cell.method for cell in tuning_cells(study, place(tmp_path))} == {"lora"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning_tasks": ["push-v3"]}, "tuning_tasks and tasks share metaworld/push-v3"),
        ({"tuning_seeds": [1, 2]}, "tuning_seeds and seeds share 1"),
        ({"tuning_seeds": None}, "needs tuning_tasks and tuning_seeds"),
        ({"methods": None}, "has no methods"),
        ({"methods": {"lroa": {}}}, "Did you mean 'lora'"),
        ({"methods": {"a/b": {"adapter": "lora"}}}, "names folders"),
        ({"methods": {"lora": {"algo": {"learning_rate": 1}}}}, "algo.learning_rate: VALUE"),
        ({"settings": {**TINY, "adapter": "dora"}}, "settings: adapter: methods: decides on that"),
        ({"settings": {**TINY, "adapter.method": "dora"}}, "settings: adapter.method: methods: decides on that"),
        ({"tune": {"adapter": ["lora", "dora"]}}, "tune: adapter: methods: decides on that"),
        ({"endpoint": "aera"}, "Did you mean 'area'"),
        ({"endpoint": ["area"]}, "endpoint: ['area']: expected one of final, area"),
        ({"endpoint": {"area": 1}}, "expected one of final, area"),
        ({"budgets": [4, 2]}, "increasing"),
        ({"budgets": None}, "needs budgets"),
        ({"margin": -1}, "above 0"),
        ({"reference": "lorra"}, "Unknown reference 'lorra'"),
        ({"tune": {"algo.learning_rate": 0.1}}, "a list of values"),
        ({"sedes": 3}, "Did you mean 'seeds'"),
        ({"settings": {"algo.updates": 9}}, "Leave algo.updates out"),
    ],
)
def test_mistakes_in_a_study_file(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read_study(write(tmp_path / "study.yaml", **changes))


def test_numbers_may_have_exponents(tmp_path: Path) -> None:
    """YAML 1.1 reads a number without a point, ``5e-2``, as text."""
    path = write(tmp_path / "study.yaml", margin=None, tune=None)
    path.write_text(path.read_text() + "margin: 5e-2\ntune: {algo.learning_rate: [1e-3, 2E-3]}\n")
    study = read_study(path)
    assert study.margin == 0.05
    assert study.candidates("lora") == [{"algo.learning_rate": 0.001}, {"algo.learning_rate": 0.002}]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"settings": {**TINY, "algo.updates": 9}}, "settings says algo.updates"),
        ({"methods": {"lora": {}, "long": {"adapter": "eva", "algo.updates": 9}}}, "methods: long says algo.updates"),
        ({"tune": {"algo.updates": [3, 9]}}, "tune of lora says algo.updates"),
    ],
)
def test_budgets_alone_say_how_long_runs_are(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    """A method with more gradient steps had its area over more steps than the others, and a verdict."""
    with pytest.raises(UserError, match=rf"budgets end at \d+, and {told}\. Leave algo\.updates out"):
        read_study(write(tmp_path / "study.yaml", **changes))


def finish(cell: Any, solved: float) -> None:
    """Leave the record of a run that solved this share of its goals."""
    folder = cell.place.out / "made" / cell.name
    goals = [k < round(10 * solved) for k in range(10)]
    make_run(
        folder, cell.task, goals, *[word for word in cell.overrides if not word.startswith(("run_dir", "eval.epi"))]
    )
    write_record(
        cell.record, folder, cell.name, {"method": cell.method, "tuning": dict(cell.chosen) if cell.tuning else None}
    )


def test_a_study_is_reported_from_its_run_directories_too(tmp_path: Path) -> None:
    """They were read as runs of their adapters, and those of the tuning phase as runs of the test."""
    study = read_study(
        write(
            tmp_path / "study.yaml",
            endpoint="final",
            tasks=["reach-v3"],
            methods={"small": {"adapter": "eva", "adapter.rank": 2}},
        )
    )
    tuned = tuning_cells(study, place(tmp_path))
    cells = [*tuned, *comparison_cells(study, place(tmp_path), {"small": {}})]
    for cell in cells:
        words = [word for word in cell.overrides if not word.startswith(("run_dir", "eval.epi"))]
        make_run(cell.run_dir, cell.task, [True, False, cell.seed > 0, cell.tuning], *words)
        assert cell.keep()
    both, records, folders = (read_runs(find_runs([str(tmp_path / where)])) for where in ("", "records", "out"))
    for runs, problems in (both, records, folders):
        found = sorted((run.method, run.seed, "" if run.tuning is None else str(*run.tuning.values())) for run in runs)
        assert found == [("small", 0, ""), ("small", 1, ""), ("small", 7, "0.001"), ("small", 7, "0.01")]
        assert problems == []


def test_the_best_mean_is_chosen_and_divergence_never(tmp_path: Path) -> None:
    changes = {"endpoint": "final", "tuning_seeds": [7, 8]}
    study = read_study(write(tmp_path / "study.yaml", **changes))
    cells = tuning_cells(study, place(tmp_path))
    for cell in cells:
        high = cell.chosen["algo.learning_rate"] == 0.01
        if cell.method == "head" and high and cell.seed == 8:
            write_json(cell.record.with_suffix(".diverged"), {"reason": "the loss is nan"})
            continue
        finish(cell, {"lora": 0.8 if high else 0.5, "small": 0.5, "head": 1.0 if high else 0.3}[cell.method])
    chosen = choose(study, cells)
    assert {name: own["algo.learning_rate"] for name, own in chosen.items()} == {
        "lora": 0.01,
        "small": 0.001,
        "head": 0.001,
    }


def test_a_run_diverged_if_it_left_the_mark_of_it(tmp_path: Path) -> None:
    """Whatever its last line says: "the data are not finite" once ruled its setting out for good."""
    study = read_study(write(tmp_path / "study.yaml", endpoint="final"))
    cell, other, *_ = tuning_cells(study, place(tmp_path))
    for one in (cell, other):
        one.log.parent.mkdir(parents=True, exist_ok=True)
        one.log.write_text("Error: the data are not finite: the loss is nan\n")
    assert not cell.keep()
    write_json(cell.run_dir / NOT_FINITE_FILE, {"reason": "the loss is not finite"})
    assert cell.keep()
    assert cell.result() is None
    write_json(other.divergence, {"name": other.name, "reason": "of an earlier version"})
    _, (_, early) = read_runs(find_runs([str(tmp_path)]))
    assert "Type the study's command once more" in early.reason
    assert other.keep()
    runs, problems = read_runs(find_runs([str(tmp_path)]))
    assert [(p.kind, p.reason) for p in problems] == [
        ("diverged", "the loss is not finite"), ("diverged", "of an earlier version"),
    ]  # fmt: skip
    assert [setting_of(p.run) for p in problems if p.run] == ["learning_rate=0.001", "learning_rate=0.01"]
    assert {(p.run.method, p.run.task, p.run.seed) for p in problems if p.run} == {(cell.method, cell.task, cell.seed)}
    assert runs == []
    tested = comparison_cells(study, place(tmp_path), {method: {} for method in study.methods})[0]
    write_json(tested.run_dir / NOT_FINITE_FILE, {"reason": "the loss is not finite"})
    assert not tested.keep(), "a run of the test has to be looked at"


@pytest.mark.parametrize("budgets", [[1, 2], None], ids=["while training", "in the evaluation after it"])
def test_a_run_that_diverges_leaves_the_mark(
    budgets: list[int] | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_policy(tmp_path / "base", make_policy())
    settings = {**TINY, "policy": str(tmp_path / "base"), "eval.episodes": 1}
    settings |= {} if budgets else {"algo.updates": 1}
    changes = {"methods": {"lora": {}}, "budgets": budgets, "endpoint": "final", "settings": settings}
    path = write(tmp_path / "study.yaml", **changes, tune={"algo.learning_rate": [1e35, 0.01]})
    cell, other = tuning_cells(read_study(path), place(tmp_path))
    assert finetune.main(cell.overrides) == 2
    assert "the policy's action is not finite" in " ".join(capfd.readouterr().err.split())
    assert cell.keep()
    _, (problem,) = read_runs([cell.divergence])
    assert problem.kind == "diverged"
    assert "the policy's action is not finite" in problem.reason
    assert not other.keep()


def test_the_report_of_a_study_counts_what_diverged(tmp_path: Path) -> None:
    """A setting with one diverged run showed the mean of its others; one that always diverged was not there."""
    changes = {"tasks": ["reach-v3"], "methods": {"lora": {}}, "tuning_seeds": [7, 8], "endpoint": "final"}
    rates = {"algo.learning_rate": [0.001, 0.01, 0.1]}
    path = write(tmp_path / "study.yaml", **changes, tune=rates, settings={**TINY, "eval.episodes": 10})
    study, where = read_study(path), place(tmp_path)
    tuned = tuning_cells(study, where)
    for cell in tuned:
        rate = cell.chosen["algo.learning_rate"]
        if rate == 0.1 or (rate == 0.001 and cell.seed == 8):
            write_json(cell.run_dir / NOT_FINITE_FILE, {"reason": "the loss is not finite"})
        else:
            finish(cell, 0.5)
        assert cell.keep()
    for cell in comparison_cells(study, where, choose(study, tuned)):
        finish(cell, 0.5)
    shutil.rmtree(where.out)
    assert benchmark.main([f"study={path}", f"out={where.out}", f"records={where.records}"]) == 0
    text = (where.out / "report" / "report.md").read_text().replace("\\", "")
    shown = [[cell.strip() for cell in row.split("|")[2:-1]] for row in text.splitlines() if "learning_rate=0" in row]
    assert [row for row in shown if len(row) == 5] == [
        ["learning_rate=0.001", "0.500", "1", "1", ""],
        ["learning_rate=0.01", "0.500", "2", "0", "yes"],
        ["learning_rate=0.1", "-", "0", "2", ""],
    ]
    assert "At an end of the grid" not in text, "0.1 was tried"
    assert text.count("| diverged | the loss is not finite") == 3


def test_an_endpoint_that_no_run_has_chooses_nothing(tmp_path: Path) -> None:
    """It was said to come of high learning rates."""
    study = read_study(write(tmp_path / "study.yaml", endpoint="cloning_loss", methods={"lora": {}}))
    cells = tuning_cells(study, place(tmp_path))
    for cell in cells:
        finish(cell, 0.5)
    with pytest.raises(UserError, match=r"No setting of lora .* cloning_loss eval\.demonstrations"):
        choose(study, cells)


def test_a_study_of_a_loss_that_no_run_measures_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It was run to its end, and compared nothing."""
    path = write(tmp_path / "study.yaml", endpoint="cloning_loss", methods={"lora": {}}, tune={})
    assert benchmark.main([f"study={path}", f"out={tmp_path / 'out'}"]) == 2
    assert "lora has none. Write eval.demonstrations: 10 under settings" in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def finish_by_return(cell: Any, total: float) -> None:
    """Leave the record of a run on a task without success that reached this mean return."""
    folder = cell.place.out / "made" / cell.name
    make_run(folder, cell.task, [False], *[word for word in cell.overrides if not word.startswith("run_dir")])
    summary = {"env": cell.task, "method": "eva", "seed": cell.seed, "eval/mean_reward": total}
    (folder / "summary.json").write_text(json.dumps(summary))
    write_record(cell.record, folder, cell.name, cell.about)


RETURNS = {
    "metaworld/drawer-open-v3": {0.001: 1.0, 0.003: 2.0, 0.01: 3.0},
    "metaworld/reach-wall-v3": {0.001: 900.0, 0.003: 800.0, 0.01: 100.0},
    "metaworld/hammer-v3": {0.001: -5.0, 0.003: -1.0, 0.01: -2.0},
}
"""Mean ranks 7 / 3, 5 / 3 and 2; the mean is the best at 0.001 because one task counts in hundreds."""


@pytest.mark.parametrize(
    ("diverged", "expected"), [(None, 0.003), (0.003, 0.01), (0.01, 0.003)], ids=["none", "the best", "another"]
)
def test_returns_of_different_tasks_are_ranked_not_averaged(
    diverged: float | None, expected: float, tmp_path: Path
) -> None:
    changes = {"endpoint": "final", "budgets": None, "methods": {"eva": {}}, "tuning_tasks": list(RETURNS)}
    rates = {"algo.learning_rate": [0.001, 0.003, 0.01]}
    study = read_study(write(tmp_path / "study.yaml", **changes, tune=rates, tuning_seeds=[7, 8]))
    cells = tuning_cells(study, place(tmp_path))
    for cell in cells:
        rate = cell.chosen["algo.learning_rate"]
        if rate == diverged and cell.seed == 8 and cell.task == "metaworld/hammer-v3":
            write_json(cell.record.with_suffix(".diverged"), {"reason": "the loss is nan"})
        else:
            finish_by_return(cell, RETURNS[cell.task][rate] + cell.seed)
    assert choose(study, cells) == {"eva": {"algo.learning_rate": expected}}
    one_task = [cell for cell in cells if cell.task == "metaworld/reach-wall-v3"]
    assert choose(study, one_task) == {"eva": {"algo.learning_rate": 0.001}}


def test_a_report_from_records_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every run has its record: nothing is run, and the report says what was tuned, tested and decided."""
    changes = {"tasks": ["reach-v3"], "settings": {**TINY, "eval.episodes": 10}}
    path = write(tmp_path / "study.yaml", endpoint="final", **changes)
    study, where = read_study(path), place(tmp_path)
    tuned = tuning_cells(study, where)
    for cell in tuned:
        finish(cell, 0.5 if cell.chosen["algo.learning_rate"] == 0.01 else 0.2)
    for cell in comparison_cells(study, where, choose(study, tuned)):
        finish(cell, {"lora": 0.9, "small": 0.5, "head": 0.1}[cell.method] + 0.05 * cell.seed)
    shutil.rmtree(where.out)
    argv = [f"study={path}", f"out={where.out}", f"records={where.records}"]
    assert benchmark.main(argv) == 0
    text = (where.out / "report" / "report.md").read_text()
    assert study.digest in text
    assert "## Verdicts" in text
    assert "learning_rate=0.01" in text
    assert "At an end of the grid" in text
    assert "By score after the last update" in text
    record = next(where.records.rglob("seed_0.json"))
    assert not {"run_dir", "shared"} & set(json.loads(record.read_text())["config"]), "they are this machine's"
    changed = json.loads(record.read_text())
    changed["summary"]["eval/success_rate"] = 1.0
    record.write_text(json.dumps(changed))
    assert benchmark.main(argv) == 2
    assert "was changed" in capfd.readouterr().err
    path.write_text(path.read_text().replace("margin: 0.1", "margin: 0.5"))
    changed["summary"]["eval/success_rate"] = None
    record.unlink()
    assert benchmark.main(argv) == 2
    assert "the study file was another one" in " ".join(capfd.readouterr().err.split())


def test_a_plan_counts_and_says_what_can_be_seen(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "study.yaml")
    assert benchmark.main([f"study={path}", f"out={tmp_path / 'out'}", "plan=true"]) == 0
    shown = " ".join(capfd.readouterr().err.split())
    assert "6 tuning runs" in shown
    assert re.search(r"2 \(this study\) │ +18 ", shown)
    assert "assuming a spread of 0.2" in shown
    assert not (tmp_path / "out").exists()
    for method in ("eva", "lora"):
        for seed in range(3):
            make_run(
                tmp_path / f"{method}{seed}",
                "reach-v3",
                [k <= seed for k in range(4)],
                f"adapter={method}",
                f"seed={seed}",
            )
    assert benchmark.main([f"study={path}", "plan=true", f"pilot={tmp_path}"]) == 2
    assert "endpoint area was measured" in " ".join(capfd.readouterr().err.split())
    write(path, endpoint="final")
    assert benchmark.main([f"study={path}", "plan=true", f"pilot={tmp_path}"]) == 0
    assert "from 6 runs" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["tasks=push-v3"], "comes with tasks=, which the study file decides on. Change it there, or leave tasks= out"),
        (["--seeds", "3", "methods=lora"], "comes with methods=, seeds=, which"),
        (["finetune.policy=hopper"], "finetune.policy: the study file decides on that (settings)"),
        (["finetune.policy.path=hopper"], "finetune.policy.path: the study file decides on that (settings)"),
        (["set=[data.episodes=2]"], "(settings). Change it there, or leave finetune.data.episodes out."),
        (["finetune.adapter.rank=4"], "(methods: small)"),
        (["finetune.algo.learning_rate=1"], "(tune)"),
        (["finetune.algo.updates=3"], "(budgets, which count its steps)"),
        (["finetune.algo=odt"], "finetune.algo: the study file decides on that (budgets, which count its steps)"),
    ],
)
def test_what_a_study_decides_is_not_typed_beside_it(
    typed: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It was ignored without a word."""
    path = write(tmp_path / "study.yaml", settings={**TINY, "policy": "mt40"})
    command = [f"study={path}", f"out={tmp_path / 'out'}", "plan=true"]
    assert benchmark.main([*command, *typed]) == 2
    assert message in " ".join(capfd.readouterr().err.split())


def test_what_a_study_leaves_open_can_be_typed(tmp_path: Path) -> None:
    path = write(tmp_path / "study.yaml")
    command = [f"study={path}", f"out={tmp_path / 'out'}", "plan=true", "threads=2"]
    assert benchmark.main([*command, "finetune.algo.weight_decay=0.1", "finetune.policy=mt40"]) == 0
    assert benchmark.main(["study=", "tasks=push-v3", "seeds=1", "plan=true"]) == 0


def test_help_begins_with_what_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("\n  tasks=") < shown.index("\n  seeds=") < shown.index("\n  launcher=")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["table"] != "cost"]


@pytest.mark.slow
@pytest.mark.long
def test_killed_anywhere_a_study_continues_from_its_records_alone(tmp_path: Path) -> None:
    """2 tasks, 3 methods, 2 rates, 2 seeds: killed while tuning and while testing, each time on another machine."""
    base = tmp_path / "base"
    save_policy(base, make_policy())
    changes = {"settings": {**TINY, "policy": str(base)}, "tuning_tasks": ["drawer-open-v3", "reach-wall-v3"]}
    path = write(tmp_path / "study.yaml", **changes, tuning_seeds=[7, 8])
    records, whole = tmp_path / "records", tmp_path / "whole"
    jobs = f"jobs={max(2, len(os.sched_getaffinity(0)))}"
    for number, (machine, before) in enumerate({"first": 5, "second": 26}.items()):
        argv = [
            sys.executable,
            "-m",
            "eva_rl.benchmark",
            f"study={path}",
            f"out={tmp_path / machine}",
            f"records={records}",
        ]
        process = subprocess.Popen([*argv, jobs], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(records.rglob("*.json"))) < before:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal((signal.SIGKILL, signal.SIGTERM)[number])
        process.wait()
        time.sleep(20)  # what a kill left running ends, or its folder is of no further use
        shutil.rmtree(tmp_path / machine, ignore_errors=True)
    assert benchmark.main([f"study={path}", f"out={tmp_path / 'third'}", f"records={records}", jobs]) == 0
    assert benchmark.main([f"study={path}", f"out={whole}", jobs]) == 0
    assert len(list(records.rglob("*.json"))) == 24 + 12
    assert rows(tmp_path / "third/report/report.csv") == rows(whole / "report/report.csv")
    keys = {
        json.loads(p.read_text())["summary"]["shared"]["before"] for p in (whole / "records/reach-v3").rglob("*.json")
    }
    assert len(keys) <= 2  # one a data seed, whose demonstrations decide on the target return
    assert len(list((whole / "shared" / "before").iterdir())) < 36
    assert parse("finetune", [f"study={read_study(path).digest}"]).study == read_study(path).digest


def documented() -> str:
    text = (Path(__file__).parents[2] / "docs" / "comparing.md").read_text()
    return re.findall(r"```yaml\n# study.yaml\n(.*?)```", text, re.S)[0]


def test_the_documented_study_can_be_planned(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(documented())
    study = read_study(path)
    assert [len(study.candidates(method)) for method in study.methods] == [3, 3, 3, 3]
    assert benchmark.main([f"study={path}", "plan=true", f"out={tmp_path / 'out'}"]) == 0
    assert "48 tuning runs" in " ".join(capfd.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.long
def test_the_documented_study_runs(tmp_path: Path) -> None:
    """Made tiny: the same keys with fewer methods, seeds and updates."""
    base, path = tmp_path / "base", tmp_path / "study.yaml"
    save_policy(base, make_policy())
    study = yaml.safe_load(documented())
    study["settings"] |= {**TINY, "policy": str(base), "eval.demonstrations": 1}
    study |= {"seeds": [0, 1], "tuning_seeds": [100], "tuning_tasks": ["drawer-open-v3"], "budgets": [1, 2, 4]}
    study |= {"tasks": ["reach-v3"], "methods": {name: study["methods"][name] for name in ("lora", "full")}}
    path.write_text(yaml.safe_dump(study))
    assert benchmark.main([f"study={path}", f"out={tmp_path / 'out'}", f"records={tmp_path / 'records'}"]) == 0
    text = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "## Tuning" in text
    assert "By cloning loss on held-out demonstrations" in text


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("algo.updates=3", "there is no such key. Type finetune.algo.updates=3."),
        ("policy=mt40-small", "Type finetune.policy=mt40-small."),
        ("adapter=lora", "A benchmark sets that through methods=."),
        ("endpoint=area", "Write endpoint: area in a study file, and type study=FILE."),
        ("job=2", "Did you mean jobs=2"),
    ],
)
def test_a_key_of_somewhere_else_is_named_with_its_place(
    typed: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(["tasks=push-v3", "plan=true", typed]) == 2
    assert message in " ".join(capfd.readouterr().err.split())


def test_names_may_be_joined_by_commas(capfd: pytest.CaptureFixture[str]) -> None:
    assert names_of("push-v3,reach-v3") == names_of("push-v3+reach-v3") == ["push-v3", "reach-v3"]
    assert names_of("push-v3?goal=0,1,2") == ["push-v3?goal=0,1,2"]
    assert finetune.main(["env=push-v3", "adapter=lora,eva"]) == 2
    assert "names several, and a run has one. To run each: --multirun adapter=lora,eva" in " ".join(
        capfd.readouterr().err.split()
    )
