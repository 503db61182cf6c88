"""Shared by all tests: two threads at most, no network, and a small policy that really acts."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from eva_rl.agents import Conditioning, DecisionTransformer, DecisionTransformerConfig, DecisionTransformerPolicy
from eva_rl.agents.policy_folder import save_policy
from eva_rl.batch import InputScaling
from eva_rl.data import Trajectories
from eva_rl.rollouts.experts import collect_expert

torch.set_num_threads(1)


def make_policy(
    observation_dim: int = 39, action_dim: int = 4, seed: int = 0, **shape: int
) -> DecisionTransformerPolicy:
    """A small policy with random weights large enough that its actions vary."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "context_length": 6,
        "max_timestep": 210,
    } | shape
    network = DecisionTransformer(
        DecisionTransformerConfig(observation_dim=observation_dim, action_dim=action_dim, **sizes)
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    scaling = InputScaling.create(
        [0.0] * observation_dim, [1.0] * observation_dim, 200.0, [-1.0] * action_dim, [1.0] * action_dim
    )
    return DecisionTransformerPolicy(network, scaling, Conditioning(1000.0), env_id="metaworld/reach-v3")


def unseal(record_file: Path) -> None:
    """Take the digests out of a folder's record, as if it had been written before there were any."""
    record = json.loads(record_file.read_text())
    record_file.write_text(json.dumps({k: v for k, v in record.items() if k not in {"files", "sha256"}}))


@pytest.fixture
def policy() -> DecisionTransformerPolicy:
    return make_policy()


@pytest.fixture(scope="session")
def reach_demonstrations() -> Trajectories:
    return collect_expert("reach-v3", 4, seed=3)


@pytest.fixture
def policy_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    save_policy(folder, make_policy())
    return folder


def script(path: Path) -> ModuleType:
    """A script outside the package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
