"""The documentation: its code runs, its keys and metrics are complete, the site builds."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from PIL import Image

from benchmarks.online import cw10, mujoco
from eva_rl.__main__ import COMMANDS, command_module, main
from eva_rl.cli.parsing import parse
from eva_rl.finetune import command as finetune
from eva_rl.report.page import markdown_table
from eva_rl.tracking.tracker import read_metrics
from tests.conftest import script

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def test_every_key_is_up_to_date() -> None:
    assert (DOCS / "config.md").read_text() == script(DOCS / "make_config.py").page(), "run: python docs/make_config.py"


@pytest.mark.parametrize(
    ("part", "records", "seeds"),
    [
        ("CW10", "online-cw10.json", []),
        ("all algorithms", "online-cw10-others.json", [1, 2, 3]),
        ("sparse", "online-sparse.json", []),
    ],
)
def test_the_tables_of_cw10_come_from_their_records(part: str, records: str, seeds: list[int]) -> None:
    path = DOCS / "results" / records
    begin, end = cw10.around(part)
    found = (DOCS / "online_results.md").read_text().partition(begin)[2].partition(end)[0].strip()
    again = f"run: python -m benchmarks.online.cw10 table {path} --page docs/online_results.md --part '{part}'"
    assert found == markdown_table(cw10.success_table(json.loads(path.read_text()), seeds)), f"{again} --seeds {seeds}"


def test_a_column_of_cw10_has_the_mean_of_the_tasks_that_it_has() -> None:
    own = [
        {"task": task, "algo": "self_imitation", "seed": seed, "before": 0.0, "cloned": 0.5, "after": after}
        for task, ends in (("push-v3", (0.8, 1.0)), ("hammer-v3", (0.7, 0.7)))
        for seed, after in enumerate(ends)
    ]
    sac = [{"task": "push-v3", "algo": "sac", "seed": 0, "after": 0.1}]
    table = cw10.success_table([*own, *sac])
    assert table.columns == ("task", "before", "after cloning", "self_imitation, 2 seeds", "sac, 1 seed")
    assert table.rows == [
        ("hammer-v3", "0.00", "0.50", "0.70", "-"),
        ("push-v3", "0.00", "0.50", "0.90 (0.80 to 1.00)", "0.10"),
        ("mean of 2", "0.00", "0.50", "0.80", "-"),
        ("mean of the 1 without a dash", "0.00", "0.50", "0.90", "0.10"),
    ]


def test_the_curve_of_cw10_comes_from_its_record() -> None:
    path = DOCS / "results/online-cw10-two-cores.json"
    begin, end = cw10.around("CW10 while learning", "curve")
    found = (DOCS / "online_results.md").read_text().partition(begin)[2].partition(end)[0].strip()
    again = f"run: python -m benchmarks.online.cw10 curve {path} --page docs/online_results.md"
    assert found == markdown_table(cw10.curve_table(json.loads(path.read_text()))), again


def test_a_curve_of_cw10_says_how_far_the_last_lies_below_the_best() -> None:
    common = {"task": "hammer-v3", "algo": "self_imitation", "cloned": 0.5}
    falls = common | {"at": {"5100": 0.6, "10007": 0.9, "15004": 0.7, "20002": 0.8}, "after": 0.8}
    rises = common | {"at": {"5000": 0.6, "10200": 0.7, "15300": 0.9, "20002": 1.0}, "after": 1.0}
    table = cw10.curve_table([falls, rises, common | {"at": {}, "after": 0.0}])
    assert table.columns[1:-1] == ("after cloning", "5,000", "10,000", "15,000", "at the end")
    assert table.rows[0] == ("hammer-v3", "0.50", "0.60", "0.80", "0.80", "0.90", "0.10")
    assert table.rows[1] == ("mean of 1", "0.50", "0.60", "0.80", "0.80", "0.90", "0.10")


def test_the_table_of_mujoco_comes_from_its_records() -> None:
    path = DOCS / "results/online-mujoco.json"
    begin, end = mujoco.MARKS
    found = (DOCS / "online_results.md").read_text().partition(begin)[2].partition(end)[0].strip()
    again = f"run: python -m benchmarks.online.mujoco table {path} --page docs/online_results.md"
    assert found == markdown_table(mujoco.score_table(json.loads(path.read_text()))), again


def test_the_shipped_policies_commands_are_those_of_the_scripts() -> None:
    expected = []
    for name in ("mt40", "mt40_small"):
        lines = (ROOT / f"benchmarks/policies/{name}.sh").read_text().replace("\\\n", "").splitlines()
        command = next(line for line in lines if line.startswith("python -m eva_rl.pretrain"))
        expected.append(shlex.split(command.replace("$runs", f"runs/{name.replace('_', '-')}")))
    shown = re.findall(r"^python -m eva_rl\.pretrain.*", (DOCS / "mt40.md").read_text(), re.MULTILINE)
    assert [shlex.split(line) for line in shown] == expected


def by_method_and_task(study: str, key: str) -> dict[str, list[list[float]]]:
    """A number of the summaries of a study's records: by method, for each task, for each seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for path in sorted((DOCS / "results" / study).rglob("*.json")):
        record = json.loads(path.read_text())
        method = found.setdefault(record["about"]["method"], {})
        method.setdefault(record["config"]["env"]["id"], []).append(record["summary"][key])
    return {name: list(tasks.values()) for name, tasks in found.items()}


def test_the_table_of_lengths_comes_from_its_records() -> None:
    found, page = by_method_and_task("updates", "eval/success_rate"), (DOCS / "learning_rates.md").read_text()
    for name, rates in found.items():
        cells = [", ".join(f"{rate:.2f}" for rate in seeds) for seeds in rates]
        _, updates, _, windows = name.split("_")
        assert f"| {updates} x {windows} | {' | '.join(cells)} | {np.mean(rates):.2f} |" in page
    assert len(found) == 3


def test_the_table_of_returns_to_go_comes_from_its_records() -> None:
    found, page = by_method_and_task("returns_to_go", "eval/success_rate"), (DOCS / "data.md").read_text()
    for name, by_task in found.items():
        rates = [by_task[index] for index in (4, 2, 0, 1, 3)]  # by name: hammer, peg, push-back, shelf, stick-pull
        cells = [", ".join(f"{rate:.2f}" for rate in seeds) for seeds in rates]
        shown, number = name.split("-")
        assert f"| `{shown}` | {number} | {' | '.join(cells)} | {np.mean(rates):.2f} |" in page
    for number, (gain, error) in {25: (0.027, 0.022), 5: (0.056, 0.022)}.items():
        gains = np.subtract(found[f"asked-{number}"], found[f"obtained-{number}"])
        assert np.mean(gains) == pytest.approx(gain, abs=5e-4)
        assert np.std(gains) / np.sqrt(gains.size) == pytest.approx(error, abs=5e-4)


def test_the_table_of_precisions_comes_from_its_records() -> None:
    found, page = by_method_and_task("precision", "eval/success_rate"), (DOCS / "scaling.md").read_text()
    losses, seconds = by_method_and_task("precision", "eval/cloning_loss"), by_method_and_task("precision", "seconds")
    for name, rates in found.items():
        cells = " | ".join(f"{np.mean(seeds):.2f}" for seeds in rates)
        took = np.median([one["train"] for seeds in seconds[name] for one in seeds])  # type: ignore[index]
        row = f"| {name} | {cells} | {np.mean(rates):.2f} | {1000 * np.mean(losses[name]):.1f} | {took:.0f} |"
        assert row in page, row
    assert sorted(found) == ["bfloat16", "float32"]
    change = np.subtract(found["bfloat16"], found["float32"]).mean()
    assert f"The difference is {change:.3f} [" in page


def explained(section: str) -> re.Pattern[str]:
    """What the tables of a section of metrics.md name: `key`, or `group/...` and `group/NAME` for all of a group."""
    text = (DOCS / "metrics.md").read_text().split(section)[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    keys = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    patterns = [re.sub(r"\\\.\\\.\\\.|LAYER", ".+", re.escape(key)) for key in keys]
    return re.compile("|".join(patterns))


@pytest.mark.slow
def test_every_metric_of_a_run_is_explained(policy_folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    small = ["env=reach-v3", "env.horizon=20", "data.episodes=2", "data.workers=1", "data.only_successes=false"]
    small += ["algo.updates=4", "algo.batch_size=4", "eval.episodes=2", "eval.every=2", "threads=1"]
    assert finetune.main([f"policy={policy_folder}", f"run_dir={run_dir}", *small]) == 0
    recorded = {key for row in read_metrics(run_dir) for key in row} - {"step", "wall_time"}
    assert {"train/loss", "eva/explained_variance", "eval_before/success_rate"} <= recorded
    known = explained("## While it runs")
    assert [key for key in sorted(recorded) if not known.fullmatch(key)] == []
    assert not known.fullmatch("time/unheard_of")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [key for key in summary if not explained("## summary.json").fullmatch(key)] == []


def test_every_metric_in_the_code_is_explained() -> None:
    """Those of algorithms that no quick run meets; pictures are named elsewhere on the page."""
    page = (DOCS / "metrics.md").read_text()
    for path in (ROOT / "eva_rl").rglob("*.py"):
        for key in re.findall(r'"((?:train|rollout|time|eval|validation|eva)/[a-z_]+)"', path.read_text()):
            group = key.partition("/")[0]
            assert f"`{key}`" in page or (group == "validation" and "`validation/...`" in page), f"{path.name}: {key}"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = blocks("tutorial.md")
    assert len(found) == 6
    try:
        for block in found:
            exec(compile(block, "tutorial.md", "exec"), names)
    finally:
        for env_id in ("PointGoal-v0", "TurnedGoal-v0"):
            gym.registry.pop(env_id, None)
    summary = json.loads((tmp_path / "runs/eva/summary.json").read_text())
    still = summary["eval_before/mean_reward"]
    assert summary["eval/mean_reward"] > 0.6 * still, "it shows a gain: returns are negative distances"


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    for package in ("material", "mkdocstrings"):
        pytest.importorskip(package, reason="needs pip install 'eva-rl[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "load_policy" in (tmp_path / "api" / "policies.html").read_text()
    pages = {path.stem for path in tmp_path.glob("*.html")}
    assert pages >= {path.stem for path in DOCS.glob("*.md")}
    for path in tmp_path.glob("*.html"):
        outside = re.findall(r'<(?:link|script|img)[^>]+(?:href|src)="(https?://[^"]+)"', path.read_text())
        assert outside == [], f"{path.name} loads from elsewhere"


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_figures_are_there(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)", page.read_text()):
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target
        if linked.suffix in {".png", ".gif"}:
            assert linked.stat().st_size > 1000, target


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"([\w/]+\.md)", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_pictures_are_small() -> None:
    pictures = [path for path in DOCS.rglob("*") if path.suffix in {".png", ".gif"}]
    assert sum(path.stat().st_size for path in pictures) < 2 * 2**20


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.png")), ids=lambda path: path.name)
def test_a_figure_reads_on_light_and_dark_pages(path: Path) -> None:
    """No background, and in what is opaque neither white nor black."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGBA"))
    assert pixels[0, 0, 3] == 0, "python docs/make_pictures.py figures"
    opaque = pixels[pixels[..., 3] > 250][:, :3]
    assert len(opaque) > 100
    assert np.mean(opaque.max(axis=1) < 70) < 0.01, "black letters"
    assert np.mean(opaque.min(axis=1) > 240) < 0.01, "white boxes"


ELSEWHERE = (
    "d4rl:",
    "minari:",
    "trajectories:",
    "csv:",
    "push=",
    "launcher=",
    "study=",
    "FILE",
    "--multirun",
    "--help",
)
"""What a command needs that is not on every machine or takes days: other people's data, the hub, a cluster, a study."""
SMALL = {
    "finetune": "env.horizon=24 data.episodes=2 data.workers=1 data.only_successes=false eval.episodes=1 eval.every=0 "
    "threads=1",
    "evaluate": "env.horizon=24 eval.episodes=1 threads=1",
    "collect": "episodes=2 env.horizon=24 only_successes=false workers=1",
    "pretrain": "env=reach-v3 env.horizon=24 data.episodes=2 data.workers=1 data.only_successes=false size.name=custom "
    "size.hidden_size=32 size.num_layers=1 size.num_heads=2 algo.updates=2 eval.every=0 threads=1",
    "doctor": "seconds=0.05",
    "datasets": "",
    "export": "",
    "report": "",
    "benchmark": "methods=[lora] seeds=1 jobs=1 threads=1 "
    "set=[env.horizon=24,data.episodes=2,data.workers=1,data.only_successes=false,eval.episodes=1,eval.every=0,"
    "algo.updates=2,algo.batch_size=4]",
}
CLONING, ONLINE = "algo.updates=2 algo.batch_size=4", "algo.env_steps=96 algo.num_envs=2 algo.batch_size=4"


def small_training(words: list[str]) -> list[str]:
    """What makes a fine-tuning short, by its algorithm."""
    algo = dict(word.partition("=")[::2] for word in words).get("algo", "bc")
    if algo == "bc":
        return CLONING.split()
    small = ONLINE.split()
    if algo.startswith("bc_then_"):
        small += ["algo.bc.updates=2", "algo.bc.batch_size=4"]
    learner = algo.removeprefix("bc_then_")
    if learner not in {"ppo", "sac", "td3"}:
        small += ["algo.updates_per_iteration=2"]
    if learner == "ppo":
        small += ["algo.rollout_steps=48"]
    if learner in {"odt_td3", "residual"}:
        small += ["algo.critic_warmup=2"]
    return small


def documented_commands() -> list[str]:
    """Each command of README and the guides, without `eva-rl` or `python -m eva_rl.` in front."""
    found = []
    for page in PAGES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            lines = block.replace("\\\n", " ").splitlines() if language in {"", "bash"} else []
            found += [match[1].split("  #")[0].strip() for line in lines if (match := COMMAND.search(line))]
    return list(dict.fromkeys(found))


COMMAND = re.compile(r"(?:^|&& |-m )(?:eva-rl |python -m eva_rl\.|eva_rl\.)((?:" + "|".join(COMMANDS) + r")\b.*)$")


@pytest.mark.slow
def test_each_documented_key_is_one_of_its_command() -> None:
    commands = documented_commands()
    assert len(commands) > 60
    for command in commands:
        name, *words = shlex.split(command)
        if "--help" in words or "--multirun" in words:
            continue
        command_module(name)  # registers its keys
        study = ROOT / "benchmarks/studies/cw10_a.yaml"
        parse(name, [f"study={study}" if word.startswith("study=") else word for word in words])


def runnable_commands() -> list[str]:
    """Those that run on any machine."""
    return [command for command in documented_commands() if not any(word in command for word in ELSEWHERE)]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("made") / "run"
    words = f"env=push-v3 {CLONING} {SMALL['finetune']} run_dir={run_dir}"
    assert finetune.main(words.split()) == 0
    return run_dir


@pytest.mark.slow
@pytest.mark.long  # about fifty commands of 10 to 20 s each
@pytest.mark.parametrize("command", runnable_commands())
def test_documented_commands_run(
    command: str, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *words = shlex.split(command)
    for earlier in set(re.findall(r"(?:policy=|:)(runs/\w+)", command)):
        shutil.copytree(finished_run, tmp_path / earlier)
    if name == "report":
        shutil.copytree(finished_run, tmp_path / "runs/study/push-v3/eva/seed_0")
    if "data=demos.h5" in words:
        shutil.copy(next((finished_run / "data").glob("*.h5")), "demos.h5")
        words = [word.replace("env=stick-pull-v3", "env=push-v3") for word in words]
    if name == "finetune":
        words += small_training(words)
        words = [word for word in words if word != "video=true"]
    words = [re.sub(r"^(env|tasks)=(mt40|cw10|mt50)$", r"\1=reach-v3", word) for word in words]
    assert main([name, *words, *SMALL[name].split()]) == 0


CARDS = sorted((ROOT / "agents/pretrained").glob("*/README.md"))


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.parent.name)
def test_the_card_of_a_shipped_policy_runs(card: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [block] = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    exec(compile(block.replace("episodes=5", "episodes=1"), str(card), "exec"), {})
    assert capsys.readouterr().out.strip()
