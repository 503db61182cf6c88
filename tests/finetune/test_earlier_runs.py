"""What commit f38570b made is still read, and acts to the same numbers: a run, its checkpoint, the shipped policies.

``tests/data_files/run_f38570b`` is what it left of ``python -m eva_rl.finetune env=reach-v3 adapter=eva adapter.rank=2
algo.updates=20`` on a policy of width 16, and ``expected_f38570b.json`` what its evaluation said with seed 7.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from eva_rl.adapters import load_policy
from eva_rl.errors import UserError
from eva_rl.report.command import main as report
from eva_rl.rollouts.evaluation import evaluate_policy
from eva_rl.training.checkpoint import load_latest_checkpoint

FILES = Path(__file__).parents[1] / "data_files"
RUN = FILES / "run_f38570b"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FILES / "expected_f38570b.json").read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_it_acts_as_it_did(name: str) -> None:
    expected = EXPECTED[name]
    policy = load_policy(RUN if name == "run" else name)
    assert policy.adapters.names == (("default",) if name == "run" else ())
    found = evaluate_policy(policy, expected["env"], episodes=3, seed=7, horizon=expected["horizon"])
    assert [episode.length for episode in found.episodes] == expected["lengths"]
    assert [episode.episode_return for episode in found.episodes] == pytest.approx(expected["returns"], rel=1e-5)


def test_its_adapter_matters() -> None:
    """The numbers above would show an adapter that is lost."""
    expected = EXPECTED["run"]
    policy = load_policy(RUN)
    with policy.adapters.off():
        found = evaluate_policy(policy, expected["env"], episodes=3, seed=7, horizon=expected["horizon"])
    assert [e.episode_return for e in found.episodes] != pytest.approx(expected["returns"], rel=1e-2)


@pytest.mark.slow
def test_its_report_is_written(tmp_path: Path) -> None:
    """Whatever keys its config.yaml names."""
    assert "warmup:" in (RUN / "config.yaml").read_text(), "a key that has another name today"
    shutil.copytree(RUN, tmp_path / "run")
    assert report([str(tmp_path / "run"), f"out={tmp_path / 'report'}"]) == 0
    assert "reach-v3" in (tmp_path / "report/report.md").read_text()


def test_its_checkpoint_is_read_and_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(RUN / "checkpoint", tmp_path / "checkpoint")
    state = load_latest_checkpoint(tmp_path / "checkpoint")
    assert state is not None
    assert (state.step, state.record["update"]) == (20, 20)
    assert any(torch.is_floating_point(value) for value in state.tensors.values())
    weights = tmp_path / "checkpoint/step_000000020/state.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="All checkpoints"):
        load_latest_checkpoint(tmp_path / "checkpoint")
    assert "checksum" in caplog.text
