"""Fused low-rank layers against PEFT's own: outputs, gradients, training, acting."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.miss.layer import MissLinear
from torch import Tensor, nn

from eva_rl.adapters import METHODS
from eva_rl.adapters.fused import FusedAttention, FusedLoraLinear, LowRank, fuse, fused_linears, unfuse
from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.batch import WindowBatch
from eva_rl.data import Trajectories
from eva_rl.training.losses import clone_loss
from eva_rl.training.optimizer import make_optimizer, trainable_parameters
from eva_rl.training.options import BCOptions
from tests.adapters.making import attached, batches, usual_first
from tests.conftest import make_policy

ADAPTERS = [name for name, method in METHODS.items() if method.adapter and not method.miss]
SHAPE = {"hidden_size": 16, "num_heads": 2}


@pytest.fixture(scope="module")
def batch(reach_demonstrations: Trajectories) -> WindowBatch:
    return next(batches(make_policy(**SHAPE), reach_demonstrations))


def trained_a_little(method: str, data: Trajectories) -> DecisionTransformerPolicy:
    """With an adapter whose every parameter differs from its start."""
    policy, _ = attached(method, data, policy=make_policy(**SHAPE))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


def gradients(policy: DecisionTransformerPolicy, batch: WindowBatch) -> tuple[float, dict[str, Tensor]]:
    network = policy.network.train()
    network.zero_grad()
    loss = clone_loss(network, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ADAPTERS)
def test_outputs_and_gradients_are_pefts(method: str, reach_demonstrations: Trajectories, batch: WindowBatch) -> None:
    policy = trained_a_little(method, reach_demonstrations)
    loss, found = gradients(policy, batch)
    assert unfuse(policy.network) == 12, "every projection of both blocks was fused"
    expected_loss, expected = gradients(policy, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert found.keys() == expected.keys()
    assert len(expected) >= 12
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_miss_keeps_pefts_passes(reach_demonstrations: Trajectories) -> None:
    """Its layers are none of LoRA's: nothing is fused, and the attention around them calls them."""
    policy = trained_a_little("miss", reach_demonstrations)
    assert unfuse(policy.network) == 0
    assert {type(m) for m in policy.network.modules() if hasattr(m, "miss_block")} == {MissLinear}


def losses(policy: DecisionTransformerPolicy, batch: WindowBatch, updates: int) -> list[float]:
    parameters = [p for p in policy.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    found = []
    for _ in range(updates):
        found.append(gradients(policy, batch)[0])
        optimizer.step()
    return found


@pytest.mark.parametrize("method", usual_first(ADAPTERS, ("eva",)))
def test_training_follows_pefts(method: str, reach_demonstrations: Trajectories, batch: WindowBatch) -> None:
    policy = trained_a_little(method, reach_demonstrations)
    plain = copy.deepcopy(policy)
    unfuse(plain.network)
    found, expected = losses(policy, batch, 60), losses(plain, batch, 60)
    assert expected[-1] < 0.9 * expected[0], "it learned"
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_wide_and_narrow_layers_against_autograd() -> None:
    """Both orders of the products, shared inputs, frozen parts, and DoRA's norm as a constant."""
    torch.manual_seed(0)
    for inputs, outputs in ((6, 20), (20, 6), (7, 7)):
        x = torch.randn(3, 5, inputs, dtype=torch.float64, requires_grad=True)
        layers = [random_layer(inputs, outputs, rank, dora) for rank, dora in ((2, False), (3, True), (4, False))]
        for chosen in (layers, layers[:1], layers[1:2]):
            leaves = [
                x,
                *(t for layer in chosen for t in (layer.bias, layer.a, layer.b, layer.magnitude) if t is not None),
            ]
            weights = [torch.randn(3, 5, outputs, dtype=torch.float64) for _ in chosen]
            fused = sum((y * w).sum() for y, w in zip(fused_linears(x, chosen), weights, strict=True))
            plain = sum((reference(x, layer) * w).sum() for layer, w in zip(chosen, weights, strict=True))
            torch.testing.assert_close(fused, plain)
            found = torch.autograd.grad(fused, leaves)
            expected = torch.autograd.grad(plain, leaves)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(
                torch.autograd.grad(fused_linears(x.detach(), chosen)[-1].sum(), chosen[-1].a)[0],
                torch.autograd.grad(reference(x.detach(), chosen[-1]).sum(), chosen[-1].a)[0],
            )


def random_layer(inputs: int, outputs: int, rank: int, dora: bool) -> LowRank:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    weight = torch.randn(outputs, inputs, dtype=torch.float64)
    return LowRank(weight, leaf(outputs), leaf(rank, inputs), leaf(outputs, rank), 0.7, leaf(outputs) if dora else None)


def reference(x: Tensor, layer: LowRank) -> Tensor:
    update = x @ layer.weight.T + layer.scale * (x @ layer.a.T) @ layer.b.T
    if layer.magnitude is not None:
        norm = (layer.weight + layer.scale * layer.b @ layer.a).norm(dim=1).detach()
        update = update * (layer.magnitude / norm)
    return update + layer.bias


@pytest.mark.parametrize("method", ["eva", "dora", "adalora", "pissa"])
def test_acting_composes_once_and_leaves_the_base(
    method: str, reach_demonstrations: Trajectories, batch: WindowBatch
) -> None:
    policy = trained_a_little(method, reach_demonstrations)
    network = policy.network.eval()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    with torch.no_grad():
        acted = network(batch)
        layer = network.blocks[0].mlp.up_proj
        kept = layer._kept[1]
        assert torch.equal(network(batch), acted)
        assert layer._kept[1] is kept, "composed once"
        unfuse(network)
        torch.testing.assert_close(acted, network(batch), atol=1e-5, rtol=0)
        fuse(network)
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    losses(policy, batch, 1)
    with torch.no_grad():
        again = network.eval()(batch)
        unfuse(network)
        torch.testing.assert_close(again, network(batch), atol=1e-5, rtol=0)
    assert not torch.allclose(again, acted, atol=1e-5), "what was learned acts"


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_another_scale_acts_at_once(method: str, reach_demonstrations: Trajectories, batch: WindowBatch) -> None:
    """PEFT's ways to change it, after a call without gradients has kept what the old one gave."""
    policy = trained_a_little(method, reach_demonstrations)
    network = policy.network.eval()

    def scaled(scale: float) -> None:
        for module in network.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("default", scale)

    with torch.no_grad():
        acted = network(batch)
        with rescale_adapter_scale(network, 0.0):
            without = network(batch)
            unfuse(network)
            torch.testing.assert_close(without, network(batch), atol=1e-5, rtol=0)
            fuse(network)
        assert (without - acted).abs().max() > 1e-4
        torch.testing.assert_close(network(batch), acted, atol=1e-6, rtol=0)
        scaled(0.0)
        torch.testing.assert_close(network(batch), without, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["full", "lora", "dora"])
def test_acting_follows_steps_that_pytorch_takes_past_the_version_of_a_parameter(
    method: str, reach_demonstrations: Trajectories, batch: WindowBatch
) -> None:
    """Its fused AdamW, which cloning and online learning have on a GPU, does not count its steps there."""
    policy = make_policy(**SHAPE)
    if method != "full":
        policy, _ = attached(method, reach_demonstrations, policy=policy)
    rng = np.random.default_rng(0)
    observations, rewards = rng.normal(size=(2, 39)).astype(np.float32), np.zeros(2, np.float32)
    policy.reset(["metaworld/reach-v3"] * 2)
    policy.act(observations, rewards, np.ones(2, bool))
    with torch.no_grad():
        policy.network(batch)
    optimizer = make_optimizer(trainable_parameters(policy.network), BCOptions(learning_rate=1e-2))
    for group in optimizer.param_groups:
        group["fused"] = True
    gradients(policy, batch)
    optimizer.step()
    policy.network.eval()
    acted = policy.act(observations, rewards, np.ones(2, bool))
    fresh = copy.deepcopy(policy).with_own_history()
    unfuse(fresh.network)
    fresh.reset(["metaworld/reach-v3"] * 2)
    np.testing.assert_allclose(acted, fresh.act(observations, rewards, np.ones(2, bool)), atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(policy.network(batch), fresh.network(batch), atol=1e-6, rtol=0)


def test_a_bias_of_b_is_kept() -> None:
    network = get_peft_model(make_policy(**SHAPE).network, LoraConfig(target_modules=["q_proj"], lora_bias=True))
    layer = next(module for module in network.modules() if isinstance(module, LoraLinear))
    with torch.no_grad():
        layer.lora_B["default"].bias.fill_(0.3)
    x = torch.randn(4, 16)
    expected = layer(x)
    fuse(network)
    torch.testing.assert_close(layer(x), expected)


def test_merged_off_and_hooked_layers_are_pefts(reach_demonstrations: Trajectories, batch: WindowBatch) -> None:
    policy, adapter = attached("lora", reach_demonstrations, policy=make_policy(**SHAPE))
    assert adapter.model is not None
    with torch.no_grad():
        for name, parameter in policy.network.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    acted = policy.network.eval()(batch).detach()
    with adapter.model.disable_adapter():
        torch.testing.assert_close(policy.network(batch), make_policy(**SHAPE).network(batch))
    adapter.model.merge_adapter()
    torch.testing.assert_close(policy.network(batch), acted, atol=1e-5, rtol=0)
    adapter.model.unmerge_adapter()
    torch.testing.assert_close(policy.network(batch), acted, atol=1e-5, rtol=0)
    attention = policy.network.blocks[0].attention
    assert isinstance(attention, FusedAttention)
    seen: list[Tensor] = []
    handle = attention.k_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    policy.network(batch)
    handle.remove()
    assert len(seen) == 1, "a hook on one of the projections still sees its call"


def test_dropout_falls_back_and_says_so(reach_demonstrations: Trajectories, caplog: pytest.LogCaptureFixture) -> None:
    policy, _ = attached("lora", reach_demonstrations, policy=make_policy(**SHAPE), dropout=0.5)
    assert "adapter.dropout=0.5" in caplog.text
    layer = policy.network.blocks[0].mlp.up_proj
    assert isinstance(layer, FusedLoraLinear)
    assert layer.train().low_rank() is None
    assert layer.eval().low_rank() is not None


def test_a_copy_has_layers_of_its_own(reach_demonstrations: Trajectories, batch: WindowBatch) -> None:
    policy = trained_a_little("lora", reach_demonstrations)
    with torch.no_grad():
        before = policy.network(batch)
        twin = copy.deepcopy(policy.network)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(policy.network(batch), before)
        assert not torch.equal(twin(batch), before)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_mixed_precision(method: str, reach_demonstrations: Trajectories, batch: WindowBatch) -> None:
    policy = trained_a_little(method, reach_demonstrations)
    exact = gradients(policy, batch)[1]
    with torch.autocast("cpu", torch.bfloat16):
        loss, found = gradients(policy, batch)
    assert all(g.dtype is torch.float32 for g in found.values())
    similar = [torch.cosine_similarity(found[n].flatten(), exact[n].flatten(), dim=0) for n in exact]
    assert min(similar) > 0.95
    assert loss == pytest.approx(gradients(policy, batch)[0], rel=0.05)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_a_bfloat16_base_takes_pefts_passes(method: str) -> None:
    """Its factors are float32, as PEFT makes them: to the last bit the outputs and gradients of PEFT's layers."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).bfloat16()
    options: dict[str, Any] = {"target_modules": ["0", "2"], "init_lora_weights": False}
    if method == "adalora":
        config: LoraConfig = AdaLoraConfig(init_r=4, target_r=2, total_step=10, **options)
    else:
        config = LoraConfig(r=4, use_dora=method == "dora", **options)
    model, x = get_peft_model(layers, config), torch.randn(5, 16).bfloat16()

    def passes() -> list[Tensor]:
        model.zero_grad()
        outputs = model(x)
        outputs.float().square().sum().backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            return [outputs.detach(), model(x), *found]

    expected = passes()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert fuse(model) == 2
    for one, other in zip(passes(), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_compiled(reach_demonstrations: Trajectories, batch: WindowBatch) -> None:
    policy = trained_a_little("eva", reach_demonstrations)
    expected = gradients(policy, batch)[1]
    network = policy.network
    network.zero_grad()
    compiled = torch.compile(network, dynamic=False)
    clone_loss(compiled, batch).backward()  # type: ignore[no-untyped-call, arg-type]
    for name, gradient in expected.items():
        found = network.get_parameter(name).grad
        assert found is not None
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_pefts_classes_come_back(reach_demonstrations: Trajectories) -> None:
    policy = trained_a_little("lora", reach_demonstrations)
    unfuse(policy.network)
    assert {type(m) for m in policy.network.modules() if hasattr(m, "lora_A")} == {LoraLinear}
    assert fuse(policy.network) == 12


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_weights_written_past_their_version_are_seen(
    method: str, reach_demonstrations: Trajectories, batch: WindowBatch
) -> None:
    """``.data`` moves no version: an average of weights, or a target network, is often updated so."""
    policy = trained_a_little(method, reach_demonstrations)
    observations, rewards, starts = np.ones((2, 39), np.float32), np.zeros(2, np.float32), np.ones(2, bool)

    def acts() -> np.ndarray:
        policy.reset(["reach"] * 2)
        return policy.act(observations, rewards, starts)

    with torch.no_grad():
        before, acted = policy.network(batch), acts()
        for name, parameter in policy.network.named_parameters():
            if ".lora_B." in name:
                parameter.data.mul_(-1)
        after = policy.network(batch)
        assert (after - before).abs().max() > 1e-3
        assert np.abs(acts() - acted).max() > 1e-3
        unfuse(policy.network)
        torch.testing.assert_close(after, policy.network(batch), rtol=1e-4, atol=1e-5)


def test_a_base_that_is_trained_too_gets_its_gradient(reach_demonstrations: Trajectories, batch: WindowBatch) -> None:
    policy = trained_a_little("lora", reach_demonstrations)
    policy.network.requires_grad_(True)
    _, found = gradients(policy, batch)
    assert unfuse(policy.network) == 12
    _, expected = gradients(policy, batch)
    assert found.keys() == expected.keys() == dict(policy.network.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
