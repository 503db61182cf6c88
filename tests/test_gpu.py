"""What has to hold on an NVIDIA GPU as it does on a CPU; run with ``pytest -m gpu`` on a machine with one."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig

from eva_rl import attach_eva
from eva_rl.adapters import METHODS, load_policy
from eva_rl.adapters.fused import fuse, unfuse
from eva_rl.agents.context import Acting, Window
from eva_rl.agents.policy_folder import save_policy
from eva_rl.batch import WindowBatch
from eva_rl.data import Trajectories, WindowSampler
from eva_rl.eva.gram import Gram
from eva_rl.eva.subspace import leading
from eva_rl.finetune.command import main as finetune
from eva_rl.rollouts.evaluation import evaluate_policy
from eva_rl.training.bc import train_bc
from eva_rl.training.checkpoint import Checkpoints
from eva_rl.training.losses import clone_loss
from eva_rl.training.options import BCOptions
from tests.adapters.making import attached, batches, measure
from tests.conftest import make_policy
from tests.finetune.test_online import SHORT, command
from tests.training import test_online as online

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
    unfuse(policy.network)  # DoRA's are fused as they are attached
    plain = copy.deepcopy(policy.network)
    assert fuse(policy.network) > 0 or method == "miss"
    for precision, tolerance in ((None, 1e-4), (torch.bfloat16, 0.15)):  # 0.12 seen for AdaLoRA's ranknum
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


@pytest.mark.parametrize("width", [96, 512])
def test_batched_directions_are_those_of_a_loop_of_svd(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 2 * width, width, generator=generator).cuda() * torch.logspace(0, -2, width, device="cuda")
    moments = rows.double().mT @ rows.double()
    count = torch.full((3,), rows.shape[1], device="cuda")
    traces = moments.diagonal(dim1=-2, dim2=-1).sum(-1)
    values, vectors = leading(Gram(moments, True, traces, count, torch.zeros_like(traces)), 8)
    for layer, x in enumerate(rows):
        _, sigma, right = torch.linalg.svd(x.double(), full_matrices=False)
        torch.testing.assert_close(values[layer], sigma[:8].square(), rtol=1e-6, atol=0)
        torch.testing.assert_close(vectors[layer].mT @ right[:8].mT @ right[:8] @ vectors[layer],
                                   torch.eye(8, device="cuda", dtype=torch.float64), rtol=0, atol=1e-6)  # fmt: skip


def test_a_torch_model_on_a_gpu_gets_the_directions_of_a_cpu() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.GELU(), torch.nn.Linear(48, 8))
    inputs = [torch.randn(64, 32) * torch.linspace(2, 0.1, 32) for _ in range(4)]
    found = []
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(model).to(device)
        adapted = attach_eva(there, LoraConfig(r=4, target_modules=["0", "2"]), [x.to(device) for x in inputs], rho=1.0)
        assert all(p.device.type == device for p in adapted.parameters())
        found.append({n: p.detach().cpu() for n, p in adapted.named_parameters() if "lora_A" in n})
    assert found[0].keys() == found[1].keys()
    for name, rows in found[0].items():
        there = found[1][name]
        assert there.shape == rows.shape
        torch.testing.assert_close((rows @ there.T).abs(), (rows @ rows.T).abs(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("window", "compile_"),
    [("growing", "none"), ("static", "none"), ("cached", "default"), ("cached", "reduce-overhead")],
)
def test_rollouts_are_those_of_a_cpu(window: Window, compile_: str) -> None:
    policy = make_policy(**SHAPE)
    here = evaluate_policy(policy, "reach-v3", episodes=2, seed=1, horizon=60)
    policy = copy.deepcopy(policy).to("cuda")
    policy.window, policy.acting = window, Acting("float32", compile_)
    there = evaluate_policy(policy, "reach-v3", episodes=2, seed=1, horizon=60)
    assert [e.episode_return for e in there.episodes] == pytest.approx(
        [e.episode_return for e in here.episodes], rel=0.02
    )


def cloned(
    data: Trajectories, folder: Path | None = None, *, dropout: float = 0.0, compile_: str = "none", stop_at: int = 99
) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    policy = make_policy(**SHAPE).to("cuda")
    policy.network.dropout.p = dropout
    sampler = WindowSampler(data, 6, policy.scaling, seed=1)
    options = BCOptions(updates=12, batch_size=8, learning_rate=1e-2, warmup_steps=0, log_every=1, compile=compile_)

    def log(metrics: object, step: int) -> None:
        if step >= stop_at:
            raise KeyboardInterrupt

    train_bc(policy, sampler, options, log=log, checkpoints=Checkpoints(folder, 3) if folder else None)
    return {name: value.clone() for name, value in policy.network.state_dict().items()}


def test_resumed_on_a_gpu_with_the_same_dropout(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    whole = cloned(reach_demonstrations, dropout=0.1)
    with pytest.raises(KeyboardInterrupt):
        cloned(reach_demonstrations, tmp_path / "parts", dropout=0.1, stop_at=7)
    torch.cuda.manual_seed_all(99)  # a new process starts elsewhere
    resumed = cloned(reach_demonstrations, tmp_path / "parts", dropout=0.1)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training_is_the_same(mode: str, reach_demonstrations: Trajectories) -> None:
    plain = cloned(reach_demonstrations, compile_="none")
    found = cloned(reach_demonstrations, compile_=mode)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-3, msg=name)


@pytest.mark.parametrize("algo", SHORT)
def test_online_on_a_gpu(algo: str, policy_folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert finetune(command(policy_folder, run_dir, algo, "device=cuda")) == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["updates"] > 0 or algo == "self_imitation"  # which found no success to imitate
    assert np.isfinite(summary["eval/mean_reward"])
    assert load_policy(run_dir, "cpu").env_id == "metaworld/reach-v3"


@pytest.mark.parametrize("make", [online.td3, online.odt, online.residual])
def test_online_resumed_on_a_gpu(make: online.Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = online._policy
    monkeypatch.setattr(online, "_policy", lambda stochastic: on_cpu(stochastic).to("cuda"))
    _, expected, _ = online.run(make, None)
    assert online.run(make, tmp_path, stop_at=200)[0] is None
    counters, found, _ = online.run(make, tmp_path)
    assert counters is not None
    assert counters.env_steps == 360
    assert expected.keys() == found.keys()
    for name, value in expected.items():  # not to the bit: the gradient of a lookup is summed in any order there
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-3, msg=name)
