"""What has to hold on an NVIDIA GPU as it does on a CPU; run with ``pytest -m gpu`` on a machine with one."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from eva_rl.adapters import METHODS, load_policy
from eva_rl.adapters.fused import fuse, unfuse
from eva_rl.agents.policy_folder import save_policy
from eva_rl.batch import WindowBatch
from eva_rl.data import Trajectories
from eva_rl.finetune.command import main as finetune
from eva_rl.rollouts.evaluation import evaluate_policy
from eva_rl.training.losses import clone_loss
from tests.adapters.making import attached, batches, measure
from tests.conftest import make_policy

pytestmark = pytest.mark.gpu
ADAPTERS = [name for name, method in METHODS.items() if method.adapter]
SHAPE = {"hidden_size": 64, "num_heads": 4}


@pytest.fixture(autouse=True)
def full_precision() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def on_gpu(data: Trajectories, size: int = 32) -> WindowBatch:
    policy = make_policy(**SHAPE).to("cuda")
    return next(batches(policy, data, size))


def gradients(
    network: torch.nn.Module, batch: WindowBatch, precision: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    network.zero_grad()
    with torch.autocast("cuda", precision or torch.bfloat16, enabled=precision is not None):
        loss = clone_loss(network.train(), batch)  # type: ignore[arg-type]
    loss.backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("method", ADAPTERS)
def test_fused_layers_are_pefts(method: str, reach_demonstrations: Trajectories) -> None:
    policy, _ = attached(method, reach_demonstrations, policy=make_policy(**SHAPE).to("cuda"))
    with torch.no_grad():
        for parameter in policy.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    batch = on_gpu(reach_demonstrations)
    plain = copy.deepcopy(policy.network)
    unfuse(plain)
    assert fuse(policy.network) > 0 or method == "miss"
    for precision, tolerance in ((None, 1e-4), (torch.bfloat16, 0.1)):
        found, expected = gradients(policy.network, batch, precision), gradients(plain, batch, precision)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            worst = float((found[name] - value).norm() / value.norm().clamp(min=1e-12))
            assert worst < tolerance, f"{name} at {precision}: {worst}"


@pytest.mark.parametrize("method", ["moments", "svd", "sketch"])
def test_directions_are_those_of_a_cpu(method: str, reach_demonstrations: Trajectories) -> None:
    policy = make_policy(**SHAPE)
    there = measure(copy.deepcopy(policy).to("cuda"), reach_demonstrations, method=method)
    here = measure(policy, reach_demonstrations, method=method)
    for name, layer in here.layers.items():
        found = there.layers[name]
        torch.testing.assert_close(
            found.explained_variance_ratio.cpu(), layer.explained_variance_ratio, rtol=1e-3, atol=1e-5
        )
        first, second = layer.components[:4].double(), found.components[:4].double().cpu()
        assert float((first @ second.T).square().sum()) / 4 > 0.999, name


def test_a_policy_acts_as_on_a_cpu() -> None:
    policy = make_policy(**SHAPE)
    here = evaluate_policy(policy, "reach-v3", episodes=3, seed=1)
    there = evaluate_policy(copy.deepcopy(policy).to("cuda"), "reach-v3", episodes=3, seed=1)
    assert [e.episode_return for e in there.episodes] == pytest.approx(
        [e.episode_return for e in here.episodes], rel=0.02
    )


@pytest.mark.parametrize("method", ["eva", "full", "dora"])
def test_fine_tuned_on_a_gpu_and_used_on_a_cpu(method: str, tmp_path: Path) -> None:
    save_policy(tmp_path / "base", make_policy(**SHAPE))
    overrides = [
        "env=reach-v3",
        f"policy={tmp_path / 'base'}",
        f"adapter={method}",
        "data.episodes=2",
        "algo.updates=12",
    ]
    overrides += ["algo.batch_size=8", "eval.episodes=2", "threads=1", "device=cuda", f"run_dir={tmp_path / 'run'}"]
    assert finetune(overrides) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert np.isfinite(summary["eval/mean_reward"])
    returns = []
    for device in ("cuda", "cpu"):
        policy = load_policy(tmp_path / "run" / "policy", device)
        assert policy.device.type == device
        returns.append([e.episode_return for e in evaluate_policy(policy, "reach-v3", episodes=2, seed=3).episodes])
    assert returns[0] == pytest.approx(returns[1], rel=0.02)
