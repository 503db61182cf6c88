"""EVA on models of other people: captured variance against a float64 SVD, PEFT's own loading, and docs/anywhere.md."""

from __future__ import annotations

import re
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, EvaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import eva_rl
from eva_rl import eva
from eva_rl.adapters import attach_eva, load_policy
from eva_rl.adapters.anywhere import targeted_layers
from eva_rl.agents import save_policy
from eva_rl.data import Trajectories
from eva_rl.errors import UserError
from eva_rl.eva.targets import find_layers
from tests.adapters.making import batches
from tests.conftest import make_policy
from tests.eva.reference import all_rows, exact

DOCS = Path(__file__).parents[2] / "docs" / "anywhere.md"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
Batch = dict[str, Tensor]


def gpt2() -> nn.Module:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=12, n_embd=32, n_layer=2, n_head=2, **ends))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, num_key_value_heads=1, **SIZES))


def vit() -> nn.Module:
    return ViTModel(ViTConfig(image_size=16, patch_size=4, **SIZES))


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=60, decoder_start_token_id=0, **sizes))


def text() -> Batch:
    mask = (torch.arange(12) < torch.randint(3, 13, (16, 1))).long()
    return {"input_ids": torch.randint(0, 60, (16, 12)), "attention_mask": mask}


def images() -> Batch:
    return {"pixel_values": torch.randn(16, 3, 16, 16)}


def pairs() -> Batch:
    kept = torch.arange(9) < torch.randint(2, 10, (16, 1))
    return text() | {"labels": torch.where(kept, torch.randint(1, 60, (16, 9)), -100)}


def everything(batch: Batch, x: Tensor) -> Tensor:
    return x.flatten(0, -2)


def unpadded(batch: Batch, x: Tensor) -> Tensor:
    """Lengths differ in T5's two halves, so that they tell which mask is meant."""
    mask = batch["attention_mask"] if x.shape[1] == batch["attention_mask"].shape[1] else batch["labels"] != -100
    return x[mask.bool()]


MODELS: list[Any] = [
    (gpt2, text, unpadded, ["c_attn", "c_proj", "c_fc"]),
    pytest.param(llama, text, unpadded, "all-linear", marks=pytest.mark.slow),
    (vit, images, everything, ["q_proj", "v_proj", "fc1", "fc2"]),
    (t5, pairs, unpadded, ["q", "k", "v", "o", "wi", "wo"]),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "batch", "keep", "targets"), MODELS, ids=lambda value: getattr(value, "__name__", ""))
def test_the_directions_capture_what_a_float64_svd_would(
    make: Any, batch: Any, keep: Any, targets: Any, tmp_path: Path
) -> None:
    extra = {gpt2: {"use_dora": True}, llama: {"use_rslora": True}}.get(make, {})
    torch.manual_seed(0)
    model, batches = make().eval(), [batch() for _ in range(4)]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = model(**batches[0])[0]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights="eva", **extra)
    config.eva_config = EvaConfig(rho=1.5, tau=1.0)
    adapted = attach_eva(model, config, iter(batches))
    with torch.no_grad():
        torch.testing.assert_close(adapted(**batches[0])[0], before, atol=1e-5, rtol=1e-5)
    directions = {name: m.lora_A["default"].weight for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert len({len(a) for a in directions.values()}) > 1, "ranks were redistributed"
    rows = all_rows(model, directions, batches, lambda b: model(**b), keep)
    for name, a in directions.items():
        best = exact(rows[name], False).sigma[: len(a)].square().sum()
        assert (rows[name].double() @ a.double().T).square().sum() > 0.99 * best, name
        scale = 2.0 if not extra.get("use_rslora") else 4.0
        assert model.get_submodule(name).scaling["default"] == pytest.approx(scale)
    check_loading(adapted, make, weights, batches[0], tmp_path)


def check_loading(adapted: PeftModel, make: Any, weights: Any, batch: Batch, folder: Path) -> None:
    """After training, plain PEFT builds the same ranks on a fresh model and computes the same."""
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        trained = adapted(**batch)[0]
    adapted.save_pretrained(str(folder))
    fresh = make()
    fresh.load_state_dict(weights)
    again = PeftModel.from_pretrained(fresh, str(folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch)[0], trained, atol=1e-5, rtol=1e-5)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.block = nn.Linear(6, 6), nn.ModuleDict({"proj": nn.Linear(6, 6)})
        self.table, self.tanh = nn.Embedding(5, 6), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.tanh(self.block["proj"](self.proj(x * torch.logspace(0, -2, 6)))) + self.table.weight[0]


def data() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(30, 6) for _ in range(3)]


def test_targets_follow_pefts_rules_and_names_match_one_layer() -> None:
    adapted = attach_eva(Named(), LoraConfig(r=2, target_modules="proj"), data())
    assert [n for n, m in adapted.get_base_model().named_modules() if hasattr(m, "lora_A")] == ["proj"]
    config = LoraConfig(r=2, target_modules=["proj"], exclude_modules=r"block\..*")
    adapted = attach_eva(Named(), config, data())
    assert [n for n, m in adapted.get_base_model().named_modules() if hasattr(m, "lora_A")] == ["proj"]
    with pytest.warns(UserWarning, match=r"table \(1 in all\) are no Linear or Conv1D layers"):
        both = attach_eva(Named(), LoraConfig(r=2, target_modules=["table", "proj"]), data())
    assert "table" in [n for n, m in both.get_base_model().named_modules() if hasattr(m, "lora_A")]


def test_a_result_found_before_can_be_given() -> None:
    model = Named()
    result = eva.compute(model, data(), targets="all-linear", rank=3, tau=1.0)
    adapted = attach_eva(model, LoraConfig(r=3, target_modules="all-linear"), result)
    for name, layer in result.layers.items():
        assert torch.equal(adapted.get_base_model().get_submodule(name).lora_A["default"].weight, layer.components)
    with pytest.raises(UserError, match=r"no layer 'proj'"):
        attach_eva(Named(), LoraConfig(r=3, target_modules="all-linear"), _without(result, "proj"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"r": 8}, r"r=8, and the EvaResult was computed with rank=3\. Set r=3"),
        ({"r": 3, "lora_alpha": 16}, r"lora_alpha=16, and the EvaResult was computed with alpha=6\. Set lora_alpha=6"),
    ],
)
def test_a_result_of_another_size_is_refused(given: dict[str, Any], message: str) -> None:
    """Its own ranks were taken without a word, whatever the config said."""
    result = eva.compute(Named(), data(), targets="all-linear", rank=3, alpha=6)
    with pytest.raises(UserError, match=message):
        attach_eva(Named(), LoraConfig(target_modules="all-linear", **given), result)


def _without(result: eva.EvaResult, name: str) -> eva.EvaResult:
    from dataclasses import replace

    return replace(result, layers={n: layer for n, layer in result.layers.items() if n != name})


def test_what_cannot_be_done_is_said_and_leaves_the_model_as_it_was() -> None:
    model = Named()
    model.proj.weight.requires_grad_(False)
    for config, message in [
        (LoraConfig(target_modules=["nothing"]), "PEFT cannot adapt target_modules=.*nothing"),
        (LoraConfig(target_modules=["proj", "tanh"]), r"PEFT cannot adapt.*Tanh\(\) is not supported"),
        (LoraConfig(target_modules=["table"]), "EVA needs Linear or Conv1D layers; target_modules names table alone"),
        (LoraConfig(target_modules=["proj"], rank_pattern={"proj": 3}), "leave rank_pattern and alpha_pattern out"),
        (LoraConfig(target_modules=["proj"], init_lora_weights="pissa"), "init_lora_weights='pissa', and attach_eva"),
        (AdaLoraConfig(target_modules=["proj"], total_step=10, init_r=2, target_r=1), "expected peft.LoraConfig"),
    ]:
        with pytest.raises(UserError, match=message):
            attach_eva(model, config, data())
    with pytest.raises(UserError, match="No target layer was called: no batch came"):
        attach_eva(model, LoraConfig(target_modules=["proj"]), [])
    assert [name for name, _ in model.named_modules()] == [name for name, _ in Named().named_modules()]
    assert not hasattr(model, "peft_config")
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * 4]
    wider = nn.ModuleDict({"proj": nn.Linear(10, 4)})
    of_another = eva.compute(wider, [torch.randn(20, 10)], rank=2, forward=lambda _, x: wider["proj"](x))
    with pytest.raises(UserError, match=r"directions of proj have 10 features, and its input has 6"):
        attach_eva(model, LoraConfig(r=2, target_modules="proj"), of_another)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in Named().named_modules()]
    adapted = attach_eva(model, LoraConfig(r=2, target_modules=["proj"]), data())
    with pytest.raises(UserError, match="has an adapter already"):
        attach_eva(adapted, LoraConfig(target_modules=["proj"]), data())


def test_a_policy_is_named_by_its_network() -> None:
    policy: Any = make_policy()
    with pytest.raises(UserError, match=r"model is a \w+Policy, expected a torch\.nn\.Module.*policy\.network"):
        attach_eva(policy, LoraConfig(target_modules=["q_proj"]), data())


def test_the_call_has_three_addresses() -> None:
    assert eva_rl.attach_eva is attach_eva
    assert eva.attach is attach_eva


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_code_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) == 8
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), names)
    assert isinstance(names["again"], PeftModel)
    assert (tmp_path / "trained" / "adapter" / "adapter_model.safetensors").is_file()
    assert any(p.abs().max() > 0 for n, p in names["agent"].policy.named_parameters() if "lora_B" in n), "PPO trains B"


def test_the_package_loads_what_it_attached(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    """Layers are named one by one, which any loader takes, where no name is the ending of another."""
    save_policy(tmp_path / "base", make_policy())
    policy = make_policy()
    data = [next(batches(policy, reach_demonstrations)) for _ in range(2)]
    adapted = attach_eva(policy.network, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), data)
    adapted.save_pretrained(str(tmp_path / "eva"))
    loaded = load_policy(tmp_path / "base", adapters={"eva": tmp_path / "eva"})
    found = loaded.network.blocks[0].attention.q_proj.lora_A["eva"].weight
    assert torch.equal(found, policy.network.blocks[0].attention.q_proj.lora_A["default"].weight)


def test_options_that_would_have_no_effect_are_refused() -> None:
    model = Named()
    result = eva.compute(model, [torch.randn(8, 6) for _ in range(2)], rank=2)
    config = LoraConfig(r=2, target_modules=["proj"])
    with pytest.raises(UserError, match="options of its own: center, rho would have no effect"):
        attach_eva(model, config, result, rho=2.0, center=True)
    attach_eva(model, config, result)


def test_a_wrapped_model_is_refused_by_what_wraps_it() -> None:
    compiled: Any = torch.compile(Named())
    with pytest.raises(UserError, match="wrapped in OptimizedModule"):
        attach_eva(compiled, LoraConfig(r=2, target_modules=["proj"]), [])


def test_looking_for_layers_leaves_the_model_as_it_was() -> None:
    """Also where PEFT adds a copy of a head that its task type trains."""
    model = nn.Sequential(OrderedDict(proj=nn.Linear(4, 4), score=nn.Linear(4, 2)))
    model.prepare_inputs_for_generation = None  # type: ignore[assignment]  # PEFT asks for it
    before = list(model.state_dict())
    assert targeted_layers(model, LoraConfig(target_modules=["proj"], task_type="SEQ_CLS")) == ["proj"]
    assert list(model.state_dict()) == before


def test_modules_that_are_saved_whole_are_no_targets() -> None:
    """They took a share of the ranks."""
    model = nn.Sequential(OrderedDict(proj=nn.Linear(4, 4), score=nn.Linear(4, 2)))
    config = LoraConfig(target_modules=["proj", "score"], modules_to_save=["score"])
    expected = get_peft_model(deepcopy(model), config).base_model.targeted_module_names
    assert targeted_layers(model, config) == expected == ["proj"]


@pytest.mark.parametrize("kind", [np.asarray, Tensor.tolist])
def test_a_mask_may_be_an_array_or_a_list(kind: Any) -> None:
    data = [torch.randn(3, 5, 6) for _ in range(2)]
    kept = torch.arange(5).expand(3, 5) < 2
    found = eva.compute(Named(), data, rank=2, mask=lambda _: kind(kept))
    cut = eva.compute(Named(), [x[:, :2] for x in data], rank=2)
    assert found.layers["proj"].rows == cut.layers["proj"].rows == 12


@pytest.mark.parametrize("name", ["action_head", "lm_head", "value_head", "heads", "head_0"])
def test_heads_are_left_out(name: str) -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 2), "multi_head_attention": nn.Linear(4, 4)})
    assert [layer.name for layer in find_layers(model)] == ["multi_head_attention"]


def test_layers_that_eva_cannot_initialise_start_as_loras_do() -> None:
    """A convolution beside a linear layer has no directions."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), flat=nn.Flatten(), out=nn.Linear(4 * 36, 5)))
    images = [torch.randn(6, 3, 8, 8) for _ in range(4)]
    before = model(images[0]).detach()
    with pytest.warns(UserWarning, match="start as LoRA does"):
        adapted = attach_eva(model, LoraConfig(r=2, target_modules=["conv", "out"]), images)
    torch.testing.assert_close(adapted(images[0]), before)
    layers = adapted.get_base_model()
    rows = layers.out.lora_A["default"].weight
    torch.testing.assert_close(rows @ rows.T, torch.eye(2), atol=1e-4, rtol=0)
    assert layers.conv.lora_A["default"].weight.abs().sum() > 0
