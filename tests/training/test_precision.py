"""``algo.precision=auto``: what it comes to, and that it stays so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.batch import WindowBatch
from eva_rl.data import Trajectories
from eva_rl.training import precision
from eva_rl.training.bc import BCOptions, train_bc
from eva_rl.training.checkpoint import Checkpoints
from tests.adapters.making import batches, sampler


def never() -> WindowBatch:
    raise AssertionError("no windows are needed")


def quiet(metrics: object, step: int) -> None:
    del metrics, step


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_what_is_asked_for_is_taken(asked: str, policy: DecisionTransformerPolicy) -> None:
    assert precision.choose_precision(asked, policy.network, never) == asked


def test_emulated_bfloat16_is_out_of_the_question(
    policy: DecisionTransformerPolicy, reach_demonstrations: Trajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    draw = batches(policy, reach_demonstrations)
    assert precision.choose_precision("auto", policy.network, lambda: next(draw)) == "float32"


def test_timing_leaves_no_trace(
    policy: DecisionTransformerPolicy, reach_demonstrations: Trajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    draw = batches(policy, reach_demonstrations)
    before, weights = torch.get_rng_state(), [p.clone() for p in policy.network.parameters()]
    assert precision.choose_precision("auto", policy.network, lambda: next(draw)) in {"float32", "bfloat16"}
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None and torch.equal(p, w) for p, w in zip(policy.network.parameters(), weights, strict=True))


@pytest.mark.parametrize("faster", ["float32", "bfloat16"])
def test_the_faster_one_is_taken_and_kept_by_the_checkpoint(
    faster: str,
    policy: DecisionTransformerPolicy,
    reach_demonstrations: Trajectories,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that goes on elsewhere goes on as it began, or its losses would not be those of an uninterrupted one."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(precision, "_pass_seconds", lambda network, batch, name: 1.0 if name == faster else 2.0)
    draw = sampler(policy, reach_demonstrations)
    checkpoints = Checkpoints(tmp_path, 2)
    options = BCOptions(updates=2, batch_size=8, precision="auto")
    assert train_bc(policy, draw, options, log=quiet, checkpoints=checkpoints).precision == faster
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    more = BCOptions(updates=4, batch_size=8, precision="auto")
    assert train_bc(policy, draw, more, log=quiet, checkpoints=checkpoints).precision == faster
