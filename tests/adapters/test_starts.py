"""Starts that PEFT lacks, and LoRA+'s two learning rates, each against a computation of its own."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor

from eva_rl.adapters import AttachedAdapter
from eva_rl.adapters.extensions import LORA_PLUS_RATIO
from eva_rl.adapters.starts import STABLE_GAMMA
from eva_rl.data import Trajectories
from eva_rl.training.optimizer import make_optimizer, set_learning_rate
from eva_rl.training.options import BCOptions
from tests.adapters.making import attached, backward, train
from tests.conftest import make_policy

NAME = "blocks.0.mlp.up_proj"


def update(model: torch.nn.Module) -> Tensor:
    """s B A of the layer, (out, in)."""
    layer = model.get_submodule(NAME)
    return layer.scaling["default"] * layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()


@pytest.mark.parametrize("alpha", [None, 12.0])
def test_milora_takes_the_minor_triplets_out(alpha: float | None, reach_demonstrations: Trajectories) -> None:
    weight = make_policy().network.get_parameter(f"{NAME}.weight").detach()
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    policy, _ = attached("milora", reach_demonstrations, alpha=alpha)
    wanted = (U[:, -4:] * S[-4:]) @ Vh[-4:]
    torch.testing.assert_close(update(policy.network).double(), wanted, atol=1e-5, rtol=1e-4)
    rest = policy.network.get_submodule(NAME).base_layer.weight.detach().double()
    torch.testing.assert_close(rest, weight.double() - wanted, atol=1e-5, rtol=0)
    leading = (U[:, :4] * S[:4]) @ Vh[:4]
    assert (wanted - leading).abs().max() > 1e-3, "the major ones are PiSSA's"


@pytest.mark.parametrize("alpha", [None, 12.0])
def test_lora_one_steps_against_the_gradient(alpha: float | None, reach_demonstrations: Trajectories) -> None:
    policy = make_policy()
    before = policy.network.get_parameter(f"{NAME}.weight").detach().clone()
    policy.network.requires_grad_(True)
    backward(policy, reach_demonstrations)()
    gradient = policy.network.get_parameter(f"{NAME}.weight").grad
    assert gradient is not None
    U, S, Vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    policy, _ = attached("lora_one", reach_demonstrations, alpha=alpha)
    scale = policy.network.get_submodule(NAME).scaling["default"]
    wanted = -scale / (STABLE_GAMMA * S[0]) * (U[:, :4] * S[:4]) @ Vh[:4]
    torch.testing.assert_close(update(policy.network).double(), wanted, atol=1e-7, rtol=1e-3)
    assert torch.equal(policy.network.get_submodule(NAME).base_layer.weight, before), "the base stays"
    assert not any("loraga" in key for m in policy.network.modules() for key in vars(m)), "no gradient stays behind"


def rates(optimizer: torch.optim.Optimizer, model: PeftModel) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def adapter_with_lora_plus(data: Trajectories) -> tuple[PeftModel, AttachedAdapter]:
    _, adapter = attached("lora_plus", data)
    assert adapter.model is not None
    return adapter.model, adapter


def test_lora_plus_has_the_learning_rates_of_pefts_optimizer(reach_demonstrations: Trajectories) -> None:
    model, adapter = adapter_with_lora_plus(reach_demonstrations)
    assert adapter.extension is not None
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours = make_optimizer(parameters, BCOptions(), adapter.extension.learning_rate_factor)
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=3e-4, loraplus_lr_ratio=LORA_PLUS_RATIO)
    set_learning_rate(ours, 3e-4)
    assert rates(ours, model) == pytest.approx(rates(theirs, model))
    assert len(set(rates(ours, model).values())) == 2
    plain = make_optimizer(parameters, BCOptions())
    set_learning_rate(plain, 3e-4)
    assert rates(plain, model) != pytest.approx(rates(theirs, model))


def test_lora_plus_moves_b_further(reach_demonstrations: Trajectories) -> None:
    """Adam's first step is as long as the learning rate."""
    moved = {}
    for method in ("lora", "lora_plus"):
        torch.manual_seed(0)
        policy, adapter = attached(method, reach_demonstrations)
        train(policy, reach_demonstrations, adapter, updates=1)
        moved[method] = policy.network.get_submodule(NAME).lora_B["default"].weight.abs().max().item()
    assert moved["lora_plus"] == pytest.approx(LORA_PLUS_RATIO * moved["lora"], rel=0.01)
