"""The documentation: its code runs, its keys and metrics are complete, the site builds."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest

from eva_rl.finetune import command as finetune
from eva_rl.tracking.tracker import read_metrics

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def test_every_key_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_config", DOCS / "make_config.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "config.md").read_text() == module.page(), "run: python docs/make_config.py"


def explained(section: str) -> re.Pattern[str]:
    """What the tables of a section of metrics.md name: `key`, or `group/...` and `group/NAME` for all of a group."""
    text = (DOCS / "metrics.md").read_text().split(section)[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    keys = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    patterns = [re.sub(r"\\\.\\\.\\\.|LAYER", ".+", re.escape(key)) for key in keys]
    return re.compile("|".join(patterns))


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


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = blocks("tutorial.md")
    assert len(found) == 5
    try:
        for block in found:
            exec(compile(block, "tutorial.md", "exec"), names)
    finally:
        gym.registry.pop("PointGoal-v0", None)
    assert (tmp_path / "runs" / "eva" / "policy" / "policy.json").exists()


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs pip install 'eva-rl[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    pages = {path.stem for path in tmp_path.glob("*.html")}
    assert pages >= {path.stem for path in DOCS.glob("*.md")}
    for path in tmp_path.glob("*.html"):
        outside = re.findall(r'<(?:link|script|img)[^>]+(?:href|src)="(https?://[^"]+)"', path.read_text())
        assert outside == [], f"{path.name} loads from elsewhere"
