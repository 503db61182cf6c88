"""Behaviour cloning, killed again and again at random moments, ends with the weights of a run that was left alone."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eva_rl.data import Trajectories, WindowSampler
from eva_rl.training.bc import train_bc
from eva_rl.training.checkpoint import Checkpoints
from eva_rl.training.options import BCOptions
from tests.conftest import make_policy

KILLS = 20


def clone(data: Trajectories, folder: Path | None, out: Path) -> None:
    """Train, from the last checkpoint where there is one, and write the weights at the end."""
    torch.set_num_threads(1)
    policy = make_policy()
    policy.network.dropout.p = 0.1  # every draw of its masks has to come back, too
    sampler = WindowSampler(data, 6, policy.scaling, seed=1)
    options = BCOptions(updates=400, batch_size=8)
    checkpoints = Checkpoints(folder, 7) if folder else None
    train_bc(policy, sampler, options, log=lambda *_: None, checkpoints=checkpoints)
    save_file(policy.network.state_dict(), out)


@pytest.mark.slow
def test_killed_at_random_moments(reach_demonstrations: Trajectories, tmp_path: Path) -> None:
    context, moments = multiprocessing.get_context("fork"), random.Random(0)
    expected, found, folder = tmp_path / "expected", tmp_path / "found", tmp_path / "checkpoint"
    began = time.perf_counter()
    clone(reach_demonstrations, None, expected)
    alone = time.perf_counter() - began
    killed = 0
    while killed < KILLS and not found.exists():
        process = context.Process(target=clone, args=(reach_demonstrations, folder, found))
        process.start()
        process.join(moments.uniform(0, alone / 8))
        killed += process.is_alive()
        process.kill()
        process.join()
    clone(reach_demonstrations, folder, found)
    assert killed > KILLS / 2
    one, other = load_file(expected), load_file(found)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
