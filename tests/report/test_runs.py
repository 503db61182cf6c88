"""Which runs are found, which count, and records of runs that were changed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from eva_rl.benchmark.records import write_record
from eva_rl.configs.finetune import FinetuneConfig
from eva_rl.errors import UserError
from eva_rl.report.comparison import Resampling, analyse
from eva_rl.report.methods import group_tasks, make_methods
from eva_rl.report.reading import episodes_by_seed, find_runs, is_record
from eva_rl.report.runs import (
    DIGEST,
    SCORES,
    UnfinishedError,
    digest,
    read_record,
    read_run,
    read_runs,
    score_keys,
    select,
)
from eva_rl.report.settings import settings_of
from eva_rl.report.warnings import warnings_of
from eva_rl.rollouts.episodes import EpisodeRecord
from eva_rl.rollouts.evaluation import EvaluationResult
from tests.report.making_groups import make_run

SUMMARY = {"env": "t", "method": "eva", "seed": 3, "eval/success_rate": 0.5}
CONFIG = "env:\n  id: t\nadapter:\n  rank: 8\n"


def run_folder(folder: Path, summary: dict[str, Any] | None = SUMMARY, stopped: bool = False) -> Path:
    """A run directory as an earlier version left it, without digests."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    episodes = (
        EpisodeRecord("t", 7, 1.25, 80, False, False, -1),
        EpisodeRecord("t", 8, 2.5, 40, True, True, 39, stopped=stopped),
    )
    after = EvaluationResult("t", episodes, "", True).record()
    (folder / "evaluation.json").write_text(json.dumps({"after": after}))
    (folder / "metrics.jsonl").write_text('{"step": 5, "wall_time": 1.0, "eval/success_rate": 0.5}\n')
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_runs_are_found_once_however_they_are_named(tmp_path: Path) -> None:
    run_folder(tmp_path / "a" / "inner" / "run")
    run_folder(tmp_path / "b")
    run_folder(tmp_path / "b" / "nested")  # of the run above, not a run of its own
    run_folder(tmp_path / ".hidden")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    places = [str(tmp_path), str(tmp_path / "b"), f"{tmp_path}/*", str(tmp_path / "a" / "inner" / ".." / "inner")]
    assert sorted(path.resolve() for path in find_runs(places)) == sorted(
        [tmp_path / "a" / "inner" / "run", tmp_path / "b"]
    )


@pytest.mark.parametrize("place", ["none", "no*", "~nobody-of-that-name/runs", "x" * 300, "a\0b"])
def test_a_place_that_is_none(place: str) -> None:
    """A user that does not exist and a name that is too long once ended in a traceback."""
    with pytest.raises(UserError, match=r"No folder .*\. Name run directories"):
        find_runs([place])


def test_a_file_that_cannot_be_read_is_listed(tmp_path: Path) -> None:
    """It ended the report with a traceback."""
    run_folder(tmp_path / "run")
    (tmp_path / "locked.json").symlink_to("/proc/self/mem")  # which root may not read, either
    runs, (problem,) = read_runs(find_runs([str(tmp_path)]))
    assert [run.folder for run in runs] == [tmp_path / "run"]
    assert (problem.folder, problem.kind) == (tmp_path / "locked.json", "damaged")
    assert "cannot be read" in problem.reason


def test_a_run_that_is_not_finished_says_how_far_it_came(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", None)
    with pytest.raises(UnfinishedError, match=r"no summary\.json; 1 point recorded, the last at step 5"):
        read_run(folder)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UnfinishedError, match="0 points recorded, the last at step 0"):
        read_run(folder)


def test_a_pretraining_run_is_not_damaged(tmp_path: Path) -> None:
    """It was called so, and counted among the unfinished and damaged ones."""
    folder = run_folder(tmp_path / "run")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["adapter"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"size": {"hidden_size": 32}}))
    runs, (problem,) = read_runs([folder])
    assert (runs, problem.kind) == ([], "left out")
    assert "a pretraining run" in problem.reason


def test_a_record_is_its_run(tmp_path: Path) -> None:
    """Goals that were stopped at success, too."""
    for stopped in (False, True):
        folder = run_folder(tmp_path / str(stopped), stopped=stopped)
        path = tmp_path / f"{stopped}.json"
        write_record(path, folder, "name", {"method": "mine", "tuning": {"algo.x": 0.5}})
        run, problems = read_run(folder)
        assert not problems
        back = read_record(path)
        assert (back.goals, back.seed) == (run.goals, 3)
        assert dict(back.settings) == dict(run.settings) | {"adapter.method": '"eva"'}, "the name no longer tells"
        assert (back.goals[8], back.goals[7]["episode_return"]) == (
            {"success": 1.0} | ({} if stopped else {"episode_return": 2.5}),
            1.25,
        )
        assert (back.method, back.tuning, back.rows) == ("mine", {"algo.x": "0.5"}, run.rows)
        assert episodes_by_seed(json.loads((folder / "evaluation.json").read_text()), "t") == back.goals


@pytest.mark.parametrize("tuning", [None, {"algo.x": 0.5}])
def test_a_run_and_its_record_count_once(tuning: dict[str, Any] | None, tmp_path: Path) -> None:
    """Under its adapter's name the run directory was one more run, and that of a tuning run was tested."""
    folder = run_folder(tmp_path / "out" / "t" / "seed_3")
    record = tmp_path / "out" / "records" / "seed_3.json"
    write_record(record, folder, "name", {"method": "mine", "tuning": tuning})
    (folder / "metrics.jsonl").unlink()  # the record has what it held
    again = run_folder(tmp_path / "again", SUMMARY | {"updates": 9})
    for places in ([folder, record, again], [again, record, folder]):
        runs, problems = read_runs(places)
        found = {run.folder: (run.method, run.tuning) for run in runs}
        assert found == {record: ("mine", {"algo.x": "0.5"} if tuning else None), again: ("eva", None)}
        assert problems == []


def test_one_name_in_two_studies_may_be_two_methods(tmp_path: Path) -> None:
    """The second passed for a copy of the first."""
    places = []
    for adapter in ("lora", "dora"):
        places.append(run_folder(tmp_path / adapter, SUMMARY | {"method": adapter}))
        (places[-1] / "study.json").write_text('{"method": "mine", "tuning": null}')
    runs, problems = read_runs(places)
    assert [method.label for method in make_methods(runs)] == ["mine (method=dora)", "mine (method=lora)"]
    assert problems == []


def test_a_run_directory_says_what_it_is_in_its_study(tmp_path: Path) -> None:
    """Where its record lies elsewhere."""
    folder = run_folder(tmp_path / "run")
    (folder / "study.json").write_text('{"method": "mine", "tuning": {"algo.x": true}}')
    ((run,), _) = read_runs([folder])
    assert (run.method, run.tuning) == ("mine", {"algo.x": "true"})
    for damaged in ("{}", '{"method": "mine", "tuning": 3}'):
        (folder / "study.json").write_text(damaged)
        runs, (problem,) = read_runs([folder])
        assert (runs, problem.kind) == ([], "damaged")
        assert "study.json names no method of a study" in problem.reason


def test_a_run_of_a_study_that_does_not_say_what_it_is_does_not_count(tmp_path: Path) -> None:
    """Its benchmark was killed: a tuning run was compared as one of the test phase."""
    folder = run_folder(tmp_path / "run")
    (folder / "config.yaml").write_text(CONFIG + f"study: {'a' * 64}\n")
    runs, (problem,) = read_runs([folder])
    assert (runs, problem.kind) == ([], "unfinished")
    assert problem.reason == "of a study, without study.json; type the study's command once more"
    (folder / "study.json").write_text('{"method": "mine", "tuning": {"algo.x": true}}')
    assert len(read_runs([folder])[0]) == 1


def test_a_run_that_diverged_is_named(tmp_path: Path) -> None:
    """It was "unfinished", and its method was judged by the seeds that survived."""
    folder = run_folder(tmp_path / "run", None)
    (folder / "config.yaml").write_text(CONFIG + "  method: eva\nseed: 3\n")
    (folder / "not_finite.json").write_text('{"reason": "The loss is not finite at step 3."}')
    runs, (problem,) = read_runs([folder])
    assert (runs, problem.kind, problem.reason) == ([], "diverged", "The loss is not finite at step 3.")
    assert problem.run is not None
    assert (problem.run.task, problem.run.method, problem.run.tuning) == ("t", "eva", None)
    (group,) = group_tasks([make_run("eva", "t", seed, 0.5) for seed in (1, 2)])
    told = [warning for warning in warnings_of(analyse(group, Resampling(20)), [problem]) if warning.severe]
    seed = problem.run.seed
    assert f"Diverged, and left out of what is said of the method: eva on t, seed {seed}." in {w.text for w in told}
    (group,) = group_tasks([make_run("eva", "metaworld/t", seed, 0.5) for seed in (1, 2)])
    told = [warning for warning in warnings_of(analyse(group, Resampling(20)), [problem]) if warning.severe]
    assert any("Diverged" in warning.text for warning in told), "a config has the task as it was typed"


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    """Runs on another disk were left out without a word."""
    run_folder(tmp_path / "scratch" / "far" / "run")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "linked").symlink_to(tmp_path / "scratch" / "far")
    (tmp_path / "scratch" / "far" / "loop").symlink_to(tmp_path / "scratch")
    (tmp_path / "runs" / "broken").symlink_to(tmp_path / "gone")
    assert [path.resolve() for path in find_runs([str(tmp_path / "runs")])] == [tmp_path / "scratch" / "far" / "run"]


def set_in(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        place = record
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to

    return change


CHANGES = [
    (set_in("episodes", "seed", to=[7]), "is not the record of a run"),
    (set_in("episodes", "episode_return", to=[float("nan"), 1.0]), "return nan"),
    (set_in("episodes", "success", to=["yes", 1]), "success yes"),
    (set_in("episodes", to=None), "is not the record of a run"),
    (set_in("about", to={}), "KeyError 'tuning'"),
    (set_in("curve", to=[3]), "is not the record of a run"),
    (set_in("summary", "seed", to=None), "seed"),
    (set_in("eva_rl_record", to=2), "eva_rl_record=2, expected 1"),
]


@pytest.mark.parametrize(("change", "told"), CHANGES, ids=[told for _, told in CHANGES])
def test_a_record_that_is_none(change: Callable[[dict[str, Any]], None], told: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_record(path, run_folder(tmp_path / "run"), "name")
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    if "eva_rl_record" not in told:
        with pytest.raises(UserError, match=f"was changed: its {DIGEST} differs"):
            read_record(path)
    body = {key: value for key, value in record.items() if key not in {"eva_rl_record", "name", DIGEST}}
    path.write_text(json.dumps(record | {DIGEST: digest(body)}))
    assert is_record(path)
    runs, (problem,) = read_runs([path])
    assert (runs, problem.kind) == ([], "damaged")
    assert told in problem.reason


def test_settings_tell_methods_apart_and_nothing_else() -> None:
    def settings(config: dict[str, Any], **summary: Any) -> dict[str, str]:
        return dict(settings_of(config, SUMMARY | summary))

    adapter = {"rank": 8, "rho": 2.0, "method": "eva", "eva": {"rows": 9}}
    algo, env = {"updates": 5, "compile": True, "log_every": 3}, {"id": "a", "timeout": 600.0}
    adapter |= {"variant": None, "gain": "own"}
    config = {"seed": 4, "adapter": adapter, "data": {"workers": 2}, "algo": algo, "env": env}
    rest = {"data.source": '"none"', "algo.updates": "5"}
    lora = rest | {"adapter.rank": "8", "adapter.gain": '"own"'}
    assert settings(config, method="lora") == lora
    eva = {"adapter.rho": "2.0", "adapter.eva.rows": "9", "adapter.variant": "null"}
    assert settings(config) == lora | eva
    assert settings(config, method="full") == rest
    one, two = (
        settings({}, env=f"metaworld/{task}", data={"source": f"expert:metaworld/{task}?n=5"}) for task in ("a", "b")
    )
    assert one == two == {"data.source": '"expert:TASK?n=5"'}


def test_a_setting_that_an_earlier_version_did_not_know_tells_no_method_apart() -> None:
    """A study that was continued with a later version had each method twice, and compared neither."""
    later = asdict(FinetuneConfig())
    assert later["data"]["sample"] == 0
    earlier = later | {"data": {key: value for key, value in later["data"].items() if key != "sample"}}
    earlier["algo"] = {key: value for key, value in later["algo"].items() if key != "warmup_steps"} | {"warmup": 20}
    assert settings_of(earlier, SUMMARY) == settings_of(later, SUMMARY)
    other = later | {"data": later["data"] | {"sample": 5}}
    assert settings_of(earlier, SUMMARY) != settings_of(other, SUMMARY)


def test_a_table_with_entries_is_not_the_empty_one_as_well() -> None:
    config = asdict(FinetuneConfig())
    filled = config | {"env": config["env"] | {"kwargs": {"colour": "red"}}}
    own = {key: value for key, value in settings_of(filled, SUMMARY) if key.startswith("env.kwargs")}
    assert own == {"env.kwargs.colour": '"red"'}
    assert dict(settings_of(config, SUMMARY))["env.kwargs"] == "{}"


@pytest.mark.parametrize(
    ("method", "one", "other"),
    [
        ("lora", {"adapter": {"variant": None}}, {"adapter": {"variant": "rotate"}}),
        ("lora", {"adapter": {"gain": "eva", "eva": {"rows": 9}}}, {"adapter": {"gain": "eva", "eva": {"rows": 5}}}),
        ("dora", {"adapter": {"gain": "2.5", "eva": {"rows": 9}}}, {"adapter": {"gain": "2.5", "eva": {"rows": 5}}}),
        ("eva", {"algo": {"keep_best": True, "eval_every": 1}}, {"algo": {"keep_best": True, "eval_every": 2}}),
        ("eva", {"algo": {"keep_best": True}, "eval": {"quick_episodes": 1}}, {"algo": {"keep_best": True}}),
        ("eva", {"algo": {"name": "odt", "eval_every": 200}}, {"algo": {"name": "odt", "eval_every": 400}}),
        ("eva", {"algo": {"name": "residual", "checkpoint_every": 200}}, {"algo": {"name": "residual"}}),
    ],
)
def test_settings_count_where_another_makes_them_matter(
    method: str, one: dict[str, Any], other: dict[str, Any]
) -> None:
    """Of two runs of one seed that differ in these the second was dropped as a copy of the first."""
    summary = SUMMARY | {"method": method}
    assert settings_of(one, summary) != settings_of(other, summary)


def test_where_training_truncates_no_episode_validation_is_no_setting() -> None:
    one, other = ({"algo": {"name": "bc_then_self_imitation", "eval_every": every}} for every in (200, 400))
    assert settings_of(one, SUMMARY) == settings_of(other, SUMMARY)


def test_copies_are_left_out_and_tuning_is_another_phase() -> None:
    run = make_run("eva", "t", 0, 0.5)
    copy, other = replace(run, folder=Path("copy")), replace(run, seed=1)
    tuned = replace(run, folder=Path("tuned"), tuning={"a": "1"})
    drawn = [replace(run, summary={**run.summary, "data": {"hash": name}}) for name in "xy"]  # data.seed=0, 1
    kept, (problem,) = select([run, copy, other, tuned, *drawn], [])
    assert kept == [run, other, tuned, *drawn]
    assert (problem.kind, problem.place, problem.reason) == (
        "left out", "copy", "the same seed, settings and data as eva/t/0",
    )  # fmt: skip


@pytest.mark.parametrize("known", list(itertools.product(["success_rate", "mean_reward", "both"], repeat=3)))
def test_a_task_is_judged_by_a_score_that_half_of_its_runs_have(known: tuple[str, ...]) -> None:
    runs = []
    for seed, name in enumerate(known):
        keys = ["success_rate", "mean_reward"] if name == "both" else [name]
        runs.append(make_run("eva", "t", seed, 0.5, key=keys[0], summary={f"eval/{key}": 0.5 for key in keys}))
    key = score_keys(runs)["t"]
    have = [name in (key, "both") for name in known]
    assert 2 * sum(have) >= 3
    earlier = list(SCORES)[: list(SCORES).index(key)]
    assert all(2 * sum(name in (one, "both") for name in known) < 3 for one in earlier)
    kept, problems = select(runs, [])
    assert [run.seed for run in kept] == [seed for seed, one in enumerate(have) if one]
    assert {problem.reason for problem in problems} <= {f"no eval/{key}, which others have"}
