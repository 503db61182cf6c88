"""The report: what is read, grouped, computed, warned of and written."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rliable import metrics as rliable

from eva_rl.cli.parsing import parse
from eva_rl.errors import UserError
from eva_rl.report import command as report
from eva_rl.report import stats
from eva_rl.report.comparison import Resampling, analyse
from eva_rl.report.curves import points_of
from eva_rl.report.figures import aggregate_figure, task_figure
from eva_rl.report.methods import group_tasks
from eva_rl.report.reading import find_runs
from eva_rl.report.runs import Run, read_runs
from eva_rl.report.warnings import warnings_of
from eva_rl.tracking import Resume, Tracker
from eva_rl.tracking.tracker import METRICS_FILE
from tests.conftest import unseal
from tests.report.making_runs import make_run, make_study

QUICK = Resampling(200)
RATES = {"eva": 0.7, "lora": 0.4, "full": 0.7}


def rate(method: str, task: int, seed: int) -> float:
    """eva is better than lora at every seed; full is sometimes better and sometimes worse than eva."""
    return RATES[method] - 0.2 * task + 0.04 * seed + (0.06 * (-1) ** seed if method == "full" else 0)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("study"), list(RATES), rate)


@pytest.fixture(scope="module")
def written(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "out"
    assert report.main([str(study), f"out={out}", "replicates=200"]) == 0
    return out


def rows(path: Path, **where: str) -> list[dict[str, str]]:
    with path.open() as file:
        return [row for row in csv.DictReader(file) if all(row[key] == value for key, value in where.items())]


def read(*places: Path) -> list[Run]:
    return read_runs(find_runs([str(place) for place in places]))[0]


def texts(runs: list[Run]) -> str:
    (group,) = group_tasks(runs)
    return " ".join(warning.text for warning in warnings_of(analyse(group, QUICK), []))


def test_the_numbers_are_those_of_the_runs(written: Path) -> None:
    matrix = {m: np.array([[round(rate(m, t, s) * 50) / 50 for t in (0, 1)] for s in range(5)]) for m in RATES}
    for method, scores in matrix.items():
        found = {row["statistic"]: row for row in rows(written / "report.csv", table="aggregate", method=method)}
        assert float(found["IQM"]["value"]) == pytest.approx(rliable.aggregate_iqm(scores))
        assert float(found["mean"]["value"]) == pytest.approx(rliable.aggregate_mean(scores))
        assert float(found["IQM"]["low"]) < float(found["IQM"]["value"]) < float(found["IQM"]["high"])
        assert found["IQM"]["runs"] == "10"
    (better,) = rows(written / "report.csv", method="eva", versus="lora", statistic="probability of improvement")
    assert float(better["value"]) == pytest.approx(rliable.probability_of_improvement(matrix["eva"], matrix["lora"]))
    (p,) = rows(written / "report.csv", method="eva", versus="lora", statistic="p over runs")
    assert float(p["value"]) == 2 / 2**10  # eva is better in all ten pairs
    (p,) = rows(written / "report.csv", versus="lora", method="eva", statistic="p over goals")
    assert float(p["value"]) == stats.sign_flip_test([k for k in goal_means(matrix, "eva", "lora") if k])


def goal_means(matrix: dict[str, np.ndarray], first: str, second: str) -> list[float]:  # type: ignore[type-arg]
    solved = {m: np.arange(50) < np.round(50 * scores.T[..., None]) for m, scores in matrix.items()}  # task, seed, goal
    found = (solved[first].astype(float) - solved[second]).mean(axis=1).ravel()
    return [float(d) for d in found]


def test_pairs_without_a_significant_difference_are_named(written: Path) -> None:
    told = {
        (row["method"], row["versus"]): float(row["value"])
        for row in rows(written / "report.csv", statistic="p over runs, corrected")
    }
    assert told["eva", "lora"] < 0.05 < next(p for pair, p in told.items() if set(pair) == {"eva", "full"})
    text = (written / "report.md").read_text()
    assert re.search(r"\*\*Warning\*\*: No significant difference between: (eva and full|full and eva)\.", text)
    assert "significant" in text
    assert "lora" not in re.findall(r"difference between: (.*)", text)[0]


def test_verdicts_have_intervals_of_the_confidence_that_was_asked_for(
    written: Path, study: Path, tmp_path: Path
) -> None:
    """Theirs were those of 95 % whatever was asked for."""
    other = tmp_path / "half"
    assert report.main([str(study), f"out={other}", "replicates=200", "confidence=0.5"]) == 0
    where = {"table": "verdict by final", "statistic": "difference"}
    wide, narrow = (rows(out / "report.csv", **where) for out in (written, other))
    assert len(wide) == len(narrow) == 3
    for whole, half in zip(wide, narrow, strict=True):
        assert float(whole["low"]) < float(half["low"]) < float(half["high"]) < float(whole["high"])
        shown = f"{float(half['value']):.3f} [{float(half['low']):.3f}, {float(half['high']):.3f}]"
        assert shown in (other / "report.md").read_text()
        assert shown not in (written / "report.md").read_text()


@pytest.mark.slow
def test_the_same_runs_give_the_same_report(written: Path, study: Path, tmp_path: Path) -> None:
    assert report.main([f"{study}/*", f"out={tmp_path / 'again'}", "replicates=200"]) == 0
    for name in ("report.csv", "runs.csv", "curves.csv", "report.md"):
        assert (tmp_path / "again" / name).read_text() == (written / name).read_text()


def test_everything_is_in_one_page(written: Path) -> None:
    html = (written / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', html.replace('xlink:href="#', '"'))
    outside = set(re.findall(r'https?://[^"\s<)]+', html))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names of XML vocabularies
    assert html.count("<svg") == 5
    names = re.findall(r'\bid="([^"]+)"', html)
    assert "currentColor" in html
    assert all(reference in names for reference in re.findall(r"url\(#([^)]+)\)", html))
    for path in (written / "figures").glob("*.svg"):
        ElementTree.parse(path)
    assert len(list((written / "figures").glob("*.png"))) == 5


def test_curves(written: Path) -> None:
    found = rows(written / "curves.csv", axis="gradient steps", method="eva")
    assert [float(row["place"]) for row in found] == [50, 100]
    assert float(found[0]["value"]) == pytest.approx(float(found[1]["value"]) / 2)
    assert {row["axis"] for row in rows(written / "curves.csv")} == {"gradient steps", "seconds"}


def test_curves_of_online_runs(tmp_path: Path) -> None:
    """Cloning takes gradient steps alone; acting counts env steps, and gradient steps go on."""
    folder = make_run(tmp_path / "run", "reach-v3", [True] * 4, "algo=bc_then_odt", "algo.env_steps=2000")
    points = [
        (20, 0, {"bc/validation/success_rate": 0.1}),
        (1000, 2, {"time/env_steps": 1000, "time/gradient_steps": 7}),
        (1000, 3, {"validation/success_rate": 0.5}),
        (2000, 4, {"time/env_steps": 2000, "time/gradient_steps": 14}),
        (2000, 5, {"validation/success_rate": 0.6}),
    ]
    lines = [json.dumps({"step": step, "wall_time": 100.0 + second, **more}) for step, second, more in points]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = points_of(read(folder)[0], "success_rate")
    assert found.values.tolist() == [0.1, 0.5, 0.6]
    assert found.places["gradient_steps"].tolist() == [20, 27, 34]
    assert found.places["env_steps"].tolist() == [0, 1000, 2000]
    assert found.places["seconds"].tolist() == [0, 3, 5]


def test_the_curve_of_an_online_run_s_record_has_its_cloning(tmp_path: Path) -> None:
    """Records keep evaluations alone; that after cloning was drawn where cloning began."""
    folder = make_run(
        tmp_path / "run", "reach-v3", [True] * 4, "algo=bc_then_odt", "algo.env_steps=2000", "eval.at=[1000]"
    )
    points = [
        (0, {"eval/success_rate": 0.1, "eval_before/success_rate": 0.1}),
        (0, {"eval/success_rate": 0.3, "eval_cloned/success_rate": 0.3}),
        (1000, {"eval/success_rate": 0.4, "time/gradient_steps": 7}),
        (2000, {"eval/success_rate": 0.5, "time/gradient_steps": 14}),
    ]
    lines = [json.dumps({"step": step, "wall_time": 100.0, **more}) for step, more in points]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run = read(folder)[0]
    found = points_of(replace(run, summary={**run.summary, "bc/updates": 20}), "success_rate")
    assert found.values.tolist() == [0.1, 0.3, 0.4, 0.5]
    assert found.places["gradient_steps"].tolist() == [0, 20, 27, 34]
    assert found.places["env_steps"].tolist() == [0, 0, 1000, 2000]


def test_seconds_of_a_resumed_run_leave_out_its_pause(tmp_path: Path) -> None:
    """A run that lay over night took a night on the axis of its curve."""
    folder, night = make_run(tmp_path / "run", "reach-v3", [True] * 4), 40_000.0
    earlier = [{"step": step, "wall_time": time.time() - night, "validation/success_rate": 0.5} for step in (0, 10)]
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in earlier))
    with Tracker(folder, resume=Resume(10), trackers=()) as tracker:
        for step in (20, 30):
            tracker.log({"validation/success_rate": 0.5}, step)
    seconds = points_of(read(folder)[0], "success_rate").places["seconds"]
    assert len(seconds) == 4
    assert 0 <= seconds[0] <= seconds[-1] < night / 2


def test_ranks_and_settings_are_rows_of_their_own(tmp_path: Path) -> None:
    for rank, solved in ((4, 1), (8, 3)):
        for seed in range(2):
            outcome = [k < solved for k in range(4)]
            make_run(
                tmp_path / f"{rank}-{seed}",
                "reach-v3",
                outcome,
                f"adapter.rank={rank}",
                f"seed={seed}",
                f"data.seed={seed}",
            )
    make_run(tmp_path / "full", "reach-v3", [True] * 4, "adapter=full", "adapter.rank=2", "algo.learning_rate=0.01")
    (group,) = group_tasks(read(tmp_path))
    assert {method.label: method.rank for method in group.methods} == {
        "eva (rank=4)": "4",
        "eva (rank=8)": "8",
        "full": "-",
    }
    found = analyse(group, QUICK)
    assert float(found.aggregates["eva (rank=4)"]["mean"].value) == 0.25  # not the best of both
    text = texts(read(tmp_path))
    assert "algo.learning_rate: 0.005, 0.01" in text
    assert "Ranks differ" in text


def test_warnings_of_weak_data(tmp_path: Path) -> None:
    for method in ("eva", "lora"):
        for seed in range(2):
            make_run(tmp_path / method / str(seed), "reach-v3", [True] * 5, f"adapter={method}", f"seed={seed}")
    text = texts(read(tmp_path))
    assert "No two methods differ significantly" in text
    assert "Few seeds: 2" in text
    assert "Few episodes: 5" in text
    assert "Almost always solved" in text
    alone = texts(read(tmp_path / "eva" / "0"))
    assert "one seed" in alone
    assert "only one method" in alone


@pytest.mark.slow
def test_the_red_line_gives_its_reason(tmp_path: Path) -> None:
    """Scores far apart, and still nothing significant: two seeds cannot be."""
    for method, solved in (("eva", 40), ("lora", 10)):
        for seed in range(2):
            goals = [k < solved for k in range(50)]
            make_run(tmp_path / method / str(seed), "reach-v3", goals, f"adapter={method}", f"seed={seed}")
    runs = read(tmp_path)
    assert "with 2 pairs of runs a permutation test cannot give a corrected p value below 0.5" in texts(runs)
    (group,) = group_tasks(runs)
    found = analyse(group, QUICK)
    assert np.isnan(found.aggregates["eva"]["IQM"].low)  # two seeds with equal scores are no interval [0.8, 0.8]
    assert report.main([str(tmp_path), f"out={tmp_path / 'report'}", "replicates=50"]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "[0.8" not in text
    assert "Updates: " not in text  # these runs do not say


def test_the_first_lines_name_the_conditions(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "reach-v3", [True, False])
    path = tmp_path / "a" / "summary.json"
    unseal(path)
    known = {"updates": 200, "data": {"episodes": 25, "source": "expert"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | known))
    (tmp_path / "a" / "versions.json").write_text(json.dumps({"torch": "2.13.0", "machine": "x86_64, 2 CPUs"}))
    (tmp_path / "a" / "metrics.jsonl").unlink()
    assert report.main([str(tmp_path / "a"), f"out={tmp_path / 'report'}", "replicates=50"]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    for shown in ("1 finished run, 1 task, 1 seed", "Updates: 200", "Demonstrations: 25", "torch: 2.13.0", "2 CPUs"):
        assert shown in text
    assert "No learning curve of eva" in text


def test_rates_are_drawn_from_0_to_1(study: Path) -> None:
    (group,) = group_tasks(read(study))
    for figure in (aggregate_figure(analyse(group, QUICK)), task_figure(analyse(group, QUICK))):
        assert {axes.get_xlim() for axes in figure.axes} == {(-0.02, 1.02)}


def test_tasks_that_a_method_lacks_are_not_averaged(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "reach-v3", [True, False], "adapter=eva")
    make_run(tmp_path / "b", "push-v3", [True, True], "adapter=eva")
    make_run(tmp_path / "c", "reach-v3", [False, False], "adapter=lora")
    (group,) = group_tasks(read(tmp_path))
    assert (list(group.tasks), list(group.partial)) == (["metaworld/reach-v3"], ["metaworld/push-v3"])
    assert float(analyse(group, QUICK).aggregates["eva"]["mean"].value) == 0.5
    assert "some method lacks them: metaworld/push-v3" in texts(read(tmp_path))


@pytest.mark.slow
def test_tasks_without_success_are_judged_by_score(tmp_path: Path) -> None:
    make_run(tmp_path / "hopper", "mujoco/hopper", [True, False])
    make_run(tmp_path / "pendulum", "Pendulum-v1", [True, False])
    make_run(tmp_path / "reach", "reach-v3", [True, False])
    groups = {group.title: group for group in group_tasks(read(tmp_path))}
    assert set(groups) == {"success rate", "normalised score", "return on Pendulum-v1"}
    hopper = groups["normalised score"]
    scores = hopper.methods[0].scores(hopper.tasks[0], hopper.key)
    assert scores[0] == pytest.approx(100 * (505.0 + 20.272305) / (3234.3 + 20.272305))
    assert report.main([str(tmp_path), f"out={tmp_path / 'report'}", "replicates=50"]) == 0


@pytest.mark.slow
def test_nothing_is_dropped_in_silence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for seed in range(6):
        make_run(tmp_path / f"r{seed}", "reach-v3", [True, False], f"seed={seed}", finished=seed != 1)
    (tmp_path / "r2" / "summary.json").write_text('{"env": "met')
    (tmp_path / "r3" / "evaluation.json").write_text("[]")
    with (tmp_path / "r4" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12')
    (tmp_path / "r5" / "config.yaml").write_text("a: [")
    shutil.copytree(tmp_path / "r0", tmp_path / "r0-copy")
    runs, problems = read_runs(find_runs([str(tmp_path)]))
    assert {run.folder.name for run in runs} == {"r0", "r3", "r4"}
    kinds = {problem.folder.name: problem.kind for problem in problems}
    assert kinds == {
        "r1": "unfinished",
        "r2": "damaged",
        "r3": "in part",
        "r4": "in part",
        "r5": "damaged",
        "r0-copy": "left out",
    }
    assert report.main([str(tmp_path), f"out={tmp_path / 'report'}", "replicates=50"]) == 0
    shown = capfd.readouterr().err
    page = (tmp_path / "report" / "report.html").read_text()
    for name in kinds:
        assert f"{tmp_path / name}" in shown
        assert f"{tmp_path / name}" in page


def test_mistakes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="No folder"):
        find_runs([str(tmp_path / "none*")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"a run directory holds a config\.yaml"):
        find_runs([str(tmp_path / "empty")])
    make_run(tmp_path / "unfinished", "reach-v3", [True], finished=False)
    assert report.main([str(tmp_path / "unfinished")]) == 2
    assert "unfinished" in capfd.readouterr().err
    make_run(tmp_path / "run", "reach-v3", [True])
    assert report.main([str(tmp_path / "run"), f"out={tmp_path}"]) == 2
    assert "something other than a report" in capfd.readouterr().err
    assert report.main([]) == 2
    assert report.main(["runs", "replicate=3"]) == 2
    assert "replicate" in capfd.readouterr().err


def test_tuning_runs_alone_are_named_as_such(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    records = Path(__file__).parents[2] / "docs/results/cw10_a/tuning"
    assert report.main([str(records), f"out={tmp_path / 'report'}"]) == 2
    assert "holds tuning runs only" in " ".join(capfd.readouterr().err.split())


def test_folders_are_named_without_a_key() -> None:
    assert parse("report", ["runs/a", "runs/b=c", "out=d", "seed=2"]).runs == ["runs/a", "runs/b=c"]
    assert parse("report", ["it's", "*"]).runs == ["it's", "*"]
    assert parse("report", ["runs=[a,b]"]).runs == ["a", "b"]


def browse(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A page's document and the browser's log, after its scripts have run."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", *options]
    command += [f"--user-data-dir={folder}", "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)


def chromium(page: Path, folder: Path) -> str:
    """What the browser's console says of a page."""
    found = browse(page, folder)
    assert "</main>" in found.stdout
    return "\n".join(line for line in found.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="Debian's chromium is not installed")
def test_a_browser_shows_the_page_without_errors_or_requests(written: Path, tmp_path: Path) -> None:
    """The page's own policy makes the browser report, and refuse, whatever would be loaded."""
    assert chromium(written / "report.html", tmp_path / "profile") == ""
    changed = tmp_path / "changed.html"
    text = (written / "report.html").read_text()
    changed.write_text(text.replace("<main>", '<main><img src="http://127.0.0.1:9/x.png">', 1))
    assert "Content Security Policy" in chromium(changed, tmp_path / "profile2")


PHONE = """<iframe id="phone" src="{name}" width="400" height="800" style="border: 0"></iframe>
<script>onload = () => {{
  const inside = document.getElementById("phone").contentDocument
  const width = element => element.getBoundingClientRect().right
  const figures = [...inside.querySelectorAll("svg")]
  document.title = JSON.stringify([inside.documentElement.scrollWidth, ...figures.map(width)])
}}</script>"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="Debian's chromium is not installed")
def test_the_page_fits_a_phone(written: Path, tmp_path: Path) -> None:
    """400 pixels: the page does not scroll sideways, and figures are seen whole."""
    page = written / "long.html"
    text = (written / "report.html").read_text()
    page.write_text(text.replace('<p class="lead">', f'<p class="lead">Study file: SHA-256 {"0" * 64}. ', 1))
    harness = written / "phone.html"
    harness.write_text(PHONE.format(name=page.name))
    found = browse(harness, tmp_path / "profile", "--allow-file-access-from-files")
    harness.unlink()
    page.unlink()
    (title,) = re.findall(r"<title>(.*?)</title>", found.stdout)
    width, *figures = json.loads(title)
    assert width <= 400
    assert len(figures) > 3
    assert max(figures) <= 400
