"""Bare weights of other projects, against independent implementations of their networks in PyTorch's own modules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from eva_rl.agents import ImportOptions, load_base_policy
from eva_rl.batch import WindowBatch
from eva_rl.errors import UserError
from tests.agents.test_huggingface import ACT, OBS, their_model

D, LAYERS, T = 16, 2, 4
GIVEN: dict[str, Any] = {"observation_mean": [0.0], "observation_std": [1.0], "target_return": 1.0}


def windows() -> WindowBatch:
    g = torch.Generator().manual_seed(0)
    return WindowBatch(
        torch.randn(3, T, OBS, generator=g),
        torch.randn(3, T, ACT, generator=g),
        torch.randn(3, T, 1, generator=g),
        torch.arange(T).repeat(3, 1) + 5,
    )


def random_(module: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)


class CorlBlock(nn.Module):
    """By the names of the weights in CORL's checkpoints (FACTS: nn.MultiheadAttention, pre-norm, gelu)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention = nn.MultiheadAttention(D, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D), nn.Dropout(0.0))
        self.register_buffer("causal_mask", ~torch.ones(3 * T, 3 * T).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, attn_mask=self.causal_mask, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Corl(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.timestep_emb = nn.Embedding(20, D)
        self.state_emb, self.action_emb, self.return_emb = nn.Linear(OBS, D), nn.Linear(ACT, D), nn.Linear(1, D)
        self.emb_norm, self.out_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.blocks = nn.ModuleList(CorlBlock(heads) for _ in range(LAYERS))
        self.action_head = nn.Sequential(nn.Linear(D, ACT), nn.Tanh())

    def forward(self, batch: WindowBatch) -> Tensor:
        time = self.timestep_emb(batch.timesteps)
        parts = [
            self.return_emb(batch.returns_to_go),
            self.state_emb(batch.observations),
            self.action_emb(batch.actions),
        ]
        x = self.emb_norm(torch.stack([part + time for part in parts], 2).flatten(1, 2))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.action_head(self.out_norm(x)[:, 1::3])
        return out


@pytest.mark.parametrize("heads", [1, 4])
@torch.no_grad()
def test_corl(tmp_path: Path, heads: int) -> None:
    model = Corl(heads).eval()
    random_(model)
    torch.save(
        {"model_state": model.state_dict(), "state_mean": np.full((1, OBS), 2.0), "state_std": np.full((1, OBS), 3.0)},
        tmp_path / "dt.pt",
    )
    options = ImportOptions(allow_pickle=True, target_return=1.0, context_length=T, num_heads=heads)
    policy = load_base_policy(tmp_path / "dt.pt", options=options)
    torch.testing.assert_close(policy.network(windows()), model(windows()), atol=1e-5, rtol=0)
    assert (policy.scaling.observation_mean == 2).all()
    assert (policy.scaling.observation_std == 3).all()
    if heads == 4:
        other = load_base_policy(tmp_path / "dt.pt", options=ImportOptions(allow_pickle=True, target_return=1.0))
        assert (other.network(windows()) - model(windows())).abs().max() > 1e-3


@torch.no_grad()
def test_corl_embeds_actions_as_they_are_executed(tmp_path: Path) -> None:
    """With a max_action of 2 its network saw half of each action that it had taken."""
    model, batch = Corl(1).eval(), windows()
    random_(model)
    save_file(model.state_dict(), tmp_path / "dt.safetensors")
    options = ImportOptions(**GIVEN, context_length=T, action_low=[-2.0], action_high=[2.0])
    policy = load_base_policy(tmp_path / "dt.safetensors", options=options)
    scaled = replace(batch, actions=policy.scaling.actions(batch.actions))
    torch.testing.assert_close(policy.scaling.raw_actions(policy.network(scaled)), 2 * model(batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("ordering", [False, True])
@torch.no_grad()
def test_online_dt(tmp_path: Path, ordering: bool) -> None:
    """GPT-2's blocks (transformers' own), no timestep embedding unless with ordering, a tanh-Gaussian head."""
    model = their_model(tmp_path / "hf", n_head=4)
    model.encoder.wpe.weight.zero_()
    names = {k.replace("encoder.", "transformer."): v.clone() for k, v in model.state_dict().items()}
    for name in [
        *(n for n in names if ".wpe." in n or ".wte." in n),
        "predict_action.0.weight",
        "predict_action.0.bias",
    ]:
        names.pop(name)
    mu, log_std, table = nn.Linear(32, ACT), nn.Linear(32, ACT), torch.randn(100, 32)
    for kind in ("weight", "bias"):
        names[f"predict_action.mu.{kind}"] = getattr(mu, kind).data
        names[f"predict_action.log_std.{kind}"] = getattr(log_std, kind).data
    names |= {"embed_ordering.weight": table} if ordering else {}
    state = np.random.RandomState(0).get_state()
    torch.save({"model_state_dict": names, "iter": 3, "np": state, "python": (3, (1, 2), None)}, tmp_path / "model.pt")
    policy = load_base_policy(tmp_path / "model.pt", options=ImportOptions(allow_pickle=True, **GIVEN))

    model.embed_timestep.weight.copy_(table if ordering else torch.zeros_like(table))
    model.predict_action[0].weight.copy_(mu.weight)
    model.predict_action[0].bias.copy_(mu.bias)
    batch = windows()
    out = model(
        states=batch.observations,
        actions=batch.actions,
        rewards=None,
        returns_to_go=batch.returns_to_go,
        timesteps=batch.timesteps,
        attention_mask=torch.ones(3, T),
    )
    torch.testing.assert_close(policy.network(batch), out.action_preds, atol=1e-5, rtol=0)
    features = policy.network.features(batch)
    mean, spread = policy.network.distribution(features)
    torch.testing.assert_close(mean, mu(features))
    torch.testing.assert_close(spread, -5 + 3.5 * (torch.tanh(log_std(features)) + 1))


def test_unknown_layouts_are_told_what_is_known(tmp_path: Path) -> None:
    save_file({"actor.fc1.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"it holds actor\.fc1\.weight\. Known are the original .* online-dt, CORL's"):
        load_base_policy(tmp_path / "x.safetensors")
    torch.save({"model_state": {"a": torch.zeros(1)}, "config": Path("x")}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"it names pathlib") as refused:
        load_base_policy(tmp_path / "x.pt", options=ImportOptions(allow_pickle=True))
    assert "\x1b" not in str(refused.value)
    corl = Corl(1).state_dict()
    corl.pop("blocks.1.mlp.0.weight")
    save_file(corl, tmp_path / "y.safetensors")
    with pytest.raises(UserError, match=r"encoder\.h\.1\.mlp\.c_fc\.weight is missing"):
        load_base_policy(tmp_path / "y.safetensors", options=ImportOptions(**GIVEN))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module._orig_mod.", "model.", "policy.network."])
def test_what_wrappers_put_before_all_names_is_left_out(tmp_path: Path, prefix: str) -> None:
    """Of torch.compile around DistributedDataParallel only the first was."""
    model = Corl(1)
    random_(model)
    plain, wrapped = tmp_path / "plain.safetensors", tmp_path / "wrapped.safetensors"
    save_file(model.state_dict(), plain)
    save_file({prefix + name: value for name, value in model.state_dict().items()}, wrapped)
    options = ImportOptions(**GIVEN)
    expected, found = (load_base_policy(path, options=options).network.state_dict() for path in (plain, wrapped))
    assert all(torch.equal(expected[name], value) for name, value in found.items())
