"""Small random Hugging Face models, and PEFT adapters initialised from what was found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from torch import nn
from transformers import (
    DecisionTransformerConfig,
    DecisionTransformerModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

from eva_rl import eva
from tests.eva.reference import all_rows, assert_matches, exact, flat

Batch = dict[str, Any]


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def vit() -> nn.Module:
    return ViTModel(
        ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
        )
    )


def decision_transformer() -> nn.Module:
    return DecisionTransformerModel(
        DecisionTransformerConfig(
            state_dim=11, act_dim=3, hidden_size=16, n_layer=2, n_head=2, max_ep_len=20, bos_token_id=0, eos_token_id=0
        )
    )


def text() -> Batch:
    mask = (torch.arange(6) < torch.randint(3, 7, (8, 1))).long()
    return {"input_ids": torch.randint(0, 50, (8, 6)), "attention_mask": mask}


def images() -> Batch:
    return {"pixel_values": torch.randn(8, 3, 8, 8)}


def windows() -> Batch:
    return {
        "states": torch.randn(8, 5, 11),
        "actions": torch.randn(8, 5, 3),
        "rewards": torch.randn(8, 5, 1),
        "returns_to_go": torch.randn(8, 5, 1),
        "timesteps": torch.arange(5).expand(8, 5),
        "attention_mask": (torch.arange(5) >= torch.randint(0, 4, (8, 1))).long(),
    }


def kept(batch: Batch, x: torch.Tensor) -> torch.Tensor:
    if "attention_mask" not in batch:
        return flat(batch, x)
    mask = batch["attention_mask"].bool()
    return x[mask.repeat_interleave(x.shape[1] // mask.shape[1], dim=1)]


MODELS: list[tuple[Callable[[], nn.Module], Callable[[], Batch], list[str], int]] = [
    (gpt2, text, ["c_attn", "c_proj", "c_fc"], 8),
    (llama, text, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 14),
    (vit, images, "", 12),
    (decision_transformer, windows, ["c_attn", "c_proj", "c_fc", "embed_state"], 9),
]


@pytest.mark.parametrize(
    ("make", "batch", "targets", "count"), MODELS, ids=lambda value: getattr(value, "__name__", "")
)
def test_models_of_language_vision_and_control(
    make: Callable[[], nn.Module], batch: Callable[[], Batch], targets: list[str], count: int
) -> None:
    torch.manual_seed(0)
    model = make()
    batches = [batch() for _ in range(3)]
    result = eva.compute(model, batches, targets=targets or None, rank=4, tau=1.0)
    assert len(result.layers) == count
    rows = all_rows(model, result.layers, batches, lambda b: model(**b), kept)
    for name, layer in result.layers.items():
        assert layer.rows == len(rows[name])
        assert_matches(layer, exact(rows[name], False))
    shared = [name for name in result.layers if name.endswith(("q_proj", "k_proj", "v_proj"))]
    assert len({result.layers[name].input_group for name in shared}) == len(shared) // 3


def outputs(model: nn.Module, batch: Batch) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch)["action_preds"]


@pytest.fixture
def found() -> tuple[nn.Module, Batch, eva.EvaResult]:
    torch.manual_seed(0)
    model = decision_transformer()
    batches = [windows() for _ in range(3)]
    return (
        model,
        batches[0],
        eva.compute(model, batches, targets=["c_attn", "c_proj", "c_fc"], rank=4, rho=2.0, alpha=2.0),
    )


def test_pefts_own_initialisation_takes_the_result(found: tuple[nn.Module, Batch, eva.EvaResult]) -> None:
    model, batch, result = found
    before = outputs(model, batch)
    config = LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=list(result.layers),
        init_lora_weights="eva",
        fan_in_fan_out=True,
    )
    peft = get_peft_model(model, config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(peft, eva_state_dict=result.state_dict("base_model.model."))
    torch.testing.assert_close(outputs(peft, batch), before, atol=0, rtol=0)
    assert len(set(result.ranks.values())) > 1
    for name, layer in result.layers.items():
        module = peft.base_model.model.get_submodule(name)
        if not layer.rank:
            assert not hasattr(module, "lora_A")
            continue
        assert torch.equal(module.lora_A["default"].weight, layer.components)
        assert module.scaling["default"] == pytest.approx(layer.lora_alpha / layer.rank)
        assert not module.lora_B["default"].weight.any()
    assert sum(p.numel() for p in peft.parameters() if p.requires_grad) == result.trainable_parameters


@pytest.mark.parametrize("extra", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_patterns_and_a_copy_initialise_every_lora(
    found: tuple[nn.Module, Batch, eva.EvaResult], extra: dict[str, bool]
) -> None:
    model, batch, result = found
    before = outputs(model, batch)
    config = LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=result.target_modules,
        rank_pattern=result.rank_pattern,
        alpha_pattern=result.alpha_pattern,
        fan_in_fan_out=True,
        **extra,
    )
    peft = get_peft_model(model, config)
    for name, rank in result.ranks.items():
        weight = peft.base_model.model.get_submodule(name).lora_A["default"].weight
        assert weight.shape[0] == rank
        weight.data.copy_(result.layers[name].components)
    torch.testing.assert_close(outputs(peft, batch), before, atol=1e-5, rtol=1e-5)


def test_adalora_takes_the_directions_and_starts_unchanged(found: tuple[nn.Module, Batch, eva.EvaResult]) -> None:
    model, batch, result = found
    before = outputs(model, batch)
    names = list(result.ranks)
    config = AdaLoraConfig(
        init_r=8,
        target_r=4,
        lora_alpha=2,
        target_modules=names,
        rank_pattern=None,
        total_step=100,
        tinit=10,
        tfinal=50,
        fan_in_fan_out=True,
    )
    peft = get_peft_model(model, config)
    for name in names:
        module, rank = peft.base_model.model.get_submodule(name), result.layers[name].rank
        module.lora_A["default"].data[:rank] = result.layers[name].components
        assert not module.lora_E["default"].any()
    torch.testing.assert_close(outputs(peft, batch), before, atol=1e-6, rtol=0)
