"""Hugging Face's Decision Transformers in and out, against transformers itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DecisionTransformerConfig as TheirConfig
from transformers import DecisionTransformerModel

from eva_rl.agents import (
    DecisionTransformer,
    DecisionTransformerPolicy,
    ImportOptions,
    export_huggingface,
    load_base_policy,
)
from eva_rl.agents.decision_transformer import TOKEN_ORDERS
from eva_rl.agents.huggingface.gym_cards import STATISTICS, card_of
from eva_rl.batch import WindowBatch
from eva_rl.cli.loading import open_policy
from eva_rl.configs.groups import PolicyOptions
from eva_rl.errors import UnknownNameError, UserError
from tests.conftest import make_policy

OBS, ACT = 11, 3
OPTIONS = ImportOptions(observation_mean=[0.0] * OBS, observation_std=[1.0] * OBS, target_return=3600.0)
CONFIGS: dict[str, dict[str, Any]] = {
    "gym checkpoints": {"n_head": 1, "activation_function": "relu"},
    "gelu_new, heads, n_inner": {"n_head": 4, "activation_function": "gelu_new", "n_inner": 48},
    "no tanh": {"n_head": 2, "activation_function": "gelu", "action_tanh": False},
    "attention scales": {"n_head": 2, "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
}


def their_model(folder: Path, **config: Any) -> DecisionTransformerModel:
    """A random model of transformers, weights large enough to tell layouts apart, saved to a folder."""
    torch.manual_seed(1)
    shape = {"state_dim": OBS, "act_dim": ACT, "hidden_size": 32, "n_layer": 2, "max_ep_len": 100, "n_positions": 64}
    model = DecisionTransformerModel(TheirConfig(**shape, **config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


def test_other_names_of_heads_and_blocks_are_read(tmp_path: Path) -> None:
    """They were passed over: a network of four heads acted with one, as nothing else of it depends on them."""
    model = their_model(tmp_path, n_head=4)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_attention_heads"], config["num_hidden_layers"] = config.pop("n_head"), config.pop("n_layer")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert DecisionTransformerModel.from_pretrained(tmp_path).config.n_head == 4
    assert difference(load_base_policy(tmp_path, options=OPTIONS).network, model) < 1e-5


def test_another_architecture_than_the_configs_is_refused(tmp_path: Path) -> None:
    """What was given of it was passed over."""
    their_model(tmp_path, n_head=4)
    assert load_base_policy(tmp_path, options=replace(OPTIONS, num_heads=4, activation="relu")).observation_dim == OBS
    with pytest.raises(UserError, match=r"num_heads=2: .*config\.json says n_head=4"):
        load_base_policy(tmp_path, options=replace(OPTIONS, num_heads=2))
    with pytest.raises(UserError, match=r"activation=gelu: .*config\.json says activation_function=relu"):
        load_base_policy(tmp_path, options=replace(OPTIONS, activation="gelu"))


def masked_batch(B: int = 6, T: int = 9) -> WindowBatch:
    """Windows of which all but the first are padded on the left, with rubbish in the padding."""
    torch.manual_seed(2)
    lengths = torch.tensor([T, 1, 2, 5, 8, T])[:B]
    mask = torch.arange(T) >= T - lengths[:, None]
    return WindowBatch(
        torch.randn(B, T, OBS), torch.randn(B, T, ACT), torch.randn(B, T, 1), torch.randint(0, 100, (B, T)), mask
    )


@torch.no_grad()
def their_actions(model: DecisionTransformerModel, batch: WindowBatch) -> torch.Tensor:
    assert batch.attention_mask is not None
    out = model(
        states=batch.observations,
        actions=batch.actions,
        rewards=None,
        returns_to_go=batch.returns_to_go,
        timesteps=batch.timesteps,
        attention_mask=batch.attention_mask.long(),
    )
    actions: torch.Tensor = out.action_preds
    return actions


@torch.no_grad()
def difference(ours: DecisionTransformer, theirs: DecisionTransformerModel) -> float:
    batch = masked_batch()
    assert batch.attention_mask is not None
    return float((ours(batch) - their_actions(theirs, batch))[batch.attention_mask].abs().max())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_forward_equals_transformers(tmp_path: Path, config: Mapping[str, Any]) -> None:
    model = their_model(tmp_path, **config)
    policy = load_base_policy(tmp_path, options=OPTIONS)
    assert difference(policy.network, model) < 1e-5
    with torch.no_grad():  # the position embedding and the order of q, k, v matter at this precision
        without = DecisionTransformer.with_weights(policy.network.config, policy.network.state_dict())
        without.embed_norm.bias -= model.encoder.wpe.weight[0]
        assert difference(without, model) > 1e-3
        attention = policy.network.blocks[0].attention
        attention.q_proj, attention.k_proj = attention.k_proj, attention.q_proj
        attention.v_proj, attention.q_proj = attention.q_proj, attention.v_proj
        assert difference(policy.network, model) > 1e-3


@torch.no_grad()
def test_without_tanh_actions_are_in_the_units_of_their_bounds(tmp_path: Path) -> None:
    """They were taken for parts of the bounds: with bounds of -2 and 2 the policy did twice what the model says."""
    model = their_model(tmp_path, action_tanh=False, n_head=2)
    options = replace(OPTIONS, action_low=[-20.0, 0.0, -10.0], action_high=[20.0, 30.0, 5.0])
    policy, batch = load_base_policy(tmp_path, options=options), masked_batch()
    scaled = replace(batch, actions=policy.scaling.actions(batch.actions))
    found = policy.scaling.raw_actions(policy.network(scaled))
    assert batch.attention_mask is not None
    assert (found - their_actions(model, batch))[batch.attention_mask].abs().max() < 1e-4
    export_huggingface(policy, tmp_path / "out")
    assert torch.equal(load_base_policy(tmp_path / "out").network(scaled), policy.network(scaled))
    uniform = PolicyOptions(str(tmp_path), action_bounds=[-2.0, 2.0], observation_mean=[0], observation_std=[1])
    by_command = open_policy(replace(uniform, target_return=1.0), torch.device("cpu"))
    scaled = replace(batch, actions=by_command.scaling.actions(batch.actions))
    found = by_command.scaling.raw_actions(by_command.network(scaled))
    assert (found - their_actions(model, batch))[batch.attention_mask].abs().max() < 1e-5


@pytest.mark.parametrize("stochastic", [False, True])
def test_export_loads_in_transformers_and_comes_back_identical(tmp_path: Path, stochastic: bool) -> None:
    policy = _policy(stochastic)
    notes = export_huggingface(policy, tmp_path / "out")
    model = DecisionTransformerModel.from_pretrained(tmp_path / "out").eval()
    assert difference(policy.network, model) < 1e-5
    back = load_base_policy(tmp_path / "out")
    own = {k: v for k, v in policy.network.state_dict().items() if not k.startswith("log_std_head")}
    assert list(back.network.state_dict()) == list(own)
    assert all(torch.equal(value, own[name]) for name, value in back.network.state_dict().items())
    assert back.network.config == replace(policy.network.config, stochastic=False)
    assert (back.env_id, back.conditioning, back.metadata) == (policy.env_id, policy.conditioning, policy.metadata)
    for name in ("observation_mean", "observation_std", "action_center", "action_half_range"):
        assert torch.equal(getattr(back.scaling, name), getattr(policy.scaling, name))
    assert any("log-standard-deviation" in note for note in notes) == stochastic


def _policy(stochastic: bool) -> DecisionTransformerPolicy:
    policy = make_policy(OBS, ACT, stochastic=stochastic)
    policy.scaling = replace(policy.scaling, observation_mean=torch.rand(OBS), observation_std=torch.rand(OBS) + 0.1)
    policy.set_target_return(123.0, "Hopper-v5")
    policy.metadata = {"data": "mine"}
    return policy


def test_merged_weights_are_exported_and_checked(tmp_path: Path) -> None:
    policy = make_policy(OBS, ACT)
    merged = {name: value * 1.5 for name, value in policy.network.state_dict().items()}
    export_huggingface(policy, tmp_path / "out", weights=merged)
    back = load_base_policy(tmp_path / "out").network.state_dict()
    assert all(torch.equal(back[name], value) for name, value in merged.items())
    merged["blocks.0.attention.q_proj.lora_A.weight"] = merged.pop("final_norm.bias")
    with pytest.raises(UserError, match=r"final_norm.bias is missing.*lora_A"):
        export_huggingface(policy, tmp_path / "out", weights=merged)


def test_reward_tokens_are_refused(tmp_path: Path) -> None:
    policy = make_policy(OBS, ACT, token_order=TOKEN_ORDERS[1])
    with pytest.raises(UserError, match="save_policy"):
        export_huggingface(policy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_loading_needs_no_transformers(tmp_path: Path) -> None:
    export_huggingface(make_policy(OBS, ACT), tmp_path / "out")
    code = (
        "import sys; from eva_rl.agents import load_base_policy; load_base_policy(sys.argv[1]);"
        "sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=True, cwd=tmp_path)


def test_old_buffers_and_plain_pickles_of_tensors_are_read(tmp_path: Path) -> None:
    model = their_model(tmp_path, n_head=2)
    weights = load_file(tmp_path / "model.safetensors")
    weights["encoder.h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
    weights["encoder.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert difference(load_base_policy(tmp_path, options=OPTIONS).network, model) < 1e-5


def test_original_state_dicts(tmp_path: Path) -> None:
    model = their_model(tmp_path, n_head=1)
    with torch.no_grad():
        model.encoder.wpe.weight.zero_()  # the original has no position embedding
    state = {k.replace("encoder.", "transformer."): v.clone() for k, v in model.state_dict().items()}
    del state["transformer.wpe.weight"]
    save_file(state, tmp_path / "original.safetensors")
    torch.save(state, tmp_path / "original.pt")
    assert difference(load_base_policy(tmp_path / "original.safetensors", options=OPTIONS).network, model) < 1e-5
    with pytest.raises(UserError, match="allow_pickle=True"):
        load_base_policy(tmp_path / "original.pt", options=OPTIONS)
    allowed = load_base_policy(tmp_path / "original.pt", options=replace(OPTIONS, allow_pickle=True))
    assert difference(allowed.network, model) < 1e-5


def test_gym_checkpoints_are_known_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "decision-transformer-gym-hopper-medium"
    their_model(folder, n_head=1)
    policy = load_base_policy(folder)
    assert policy.scaling.observation_mean[0] == pytest.approx(1.311279)
    assert (policy.conditioning.target_return, policy.scaling.return_scale) == (3600.0, 1000.0)
    assert (policy.env_id, policy.network.config.context_length) == ("Hopper-v4", 20)
    given = ImportOptions(context_length=5, target_return=1800.0, observation_mean=[1.0] * OBS)
    other = load_base_policy(folder, options=given)
    assert other.network.config.context_length == 5
    assert (other.conditioning.target_return, float(other.scaling.observation_mean[0])) == (1800.0, 1.0)
    cached = Path("/x/models--edbeeching--decision-transformer-gym-hopper-medium-replay/snapshots/0")
    assert card_of(cached)["observation_mean"] == STATISTICS["hopper-medium-replay"][0]
    assert card_of(Path("/x/hopper-medium")) == {}


def test_unknown_normalisation_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "decision-transformer-gym-hopper-expert"
    their_model(folder, n_head=1)
    with pytest.raises(UserError, match=r"does not say its observation_mean, observation_std, without"):
        load_base_policy(folder)
    with pytest.raises(UserError, match="lengths"):
        load_base_policy(folder, options=replace(OPTIONS, observation_std=[1.0, 1.0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'; expected 'decision_transformer'"),
        ({"activation_function": "silu"}, "activation_function is 'silu'; expected"),
        ({"n_head": 5}, "num_heads=5"),
        ({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon=0.001"),
        ({"state_dim": 17}, r"embed_state.weight has shape \(32, 11\), expected \(32, 17\)"),
        ({"n_layer": 3}, "encoder.h.2.ln_1.weight is missing"),
        ({"n_layer": 1}, "encoder.h.1.* is not part of the architecture"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'; expected a whole number"),
    ],
)
def test_configs_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    their_model(tmp_path, n_head=1)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_base_policy(tmp_path, options=OPTIONS)


def test_pickles_with_code_and_missing_files(tmp_path: Path) -> None:
    model = their_model(tmp_path, n_head=1)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        load_base_policy(tmp_path, options=OPTIONS)
    torch.save(model, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="Only state dicts are read"):
        load_base_policy(tmp_path, options=OPTIONS)
    with pytest.raises(UnknownNameError, match="hub id"):
        load_base_policy("no-such-policy")
    with pytest.raises(UserError, match="could not be fetched"):
        load_base_policy("nobody/no-such-policy")
