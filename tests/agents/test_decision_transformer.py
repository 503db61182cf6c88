"""The network: who sees what, and what its config refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from eva_rl.agents import SIZES, DecisionTransformer, DecisionTransformerConfig
from eva_rl.agents.decision_transformer import LOG_STD_RANGE, TOKEN_ORDERS
from eva_rl.batch import WindowBatch
from eva_rl.errors import UserError

OBS, ACT, T = 5, 2, 6
CONFIG = DecisionTransformerConfig(OBS, ACT, 32, 3, 4, context_length=T, max_timestep=50)


def make_network(config: DecisionTransformerConfig = CONFIG) -> DecisionTransformer:
    torch.manual_seed(0)
    network = DecisionTransformer(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return network


def make_batch(B: int = 3, steps: int = T) -> WindowBatch:
    generator = torch.Generator().manual_seed(1)
    return WindowBatch(
        observations=torch.randn(B, steps, OBS, generator=generator),
        actions=torch.randn(B, steps, ACT, generator=generator),
        returns_to_go=torch.randn(B, steps, 1, generator=generator),
        timesteps=torch.arange(steps).repeat(B, 1) + 3,
        rewards=torch.randn(B, steps, 1, generator=generator),
    )


@pytest.mark.parametrize("order", TOKEN_ORDERS)
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_an_action_depends_on_the_past_and_on_nothing_later(order: tuple[str, ...], masked: bool) -> None:
    network, batch = make_network(replace(CONFIG, token_order=order)), make_batch()
    if masked:
        batch = replace(batch, attention_mask=torch.ones(3, T, dtype=torch.bool))
    before = network(batch)
    inputs = ["observations", "returns_to_go", "actions"] + (["rewards"] if "reward" in order else [])
    for name in inputs:
        changed = getattr(batch, name).clone()
        changed[:, 3] += 1
        moved = (network(replace(batch, **{name: changed})) - before).abs().amax(dim=(0, 2))
        known_at_its_own_step = name in {"observations", "returns_to_go"}
        first = 3 if known_at_its_own_step else 4
        assert torch.all(moved[:first] == 0), name
        assert torch.all(moved[first:] > 1e-4), name


@torch.no_grad()
def test_padding_changes_nothing_and_a_padded_window_equals_the_short_one() -> None:
    network, batch = make_network(), make_batch()
    mask = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1], [1] * T]).bool()
    padded = replace(batch, attention_mask=mask)
    rubbish = replace(
        padded,
        observations=torch.where(mask[..., None], batch.observations, 1e3),
        actions=torch.where(mask[..., None], batch.actions, -10.0),
        returns_to_go=torch.where(mask[..., None], batch.returns_to_go, 7.0),
        timesteps=torch.where(mask, batch.timesteps, 0),
    )
    out = network(padded)
    assert torch.equal(network(rubbish)[mask], out[mask])
    assert torch.isfinite(network(rubbish)).all()
    for row, length in enumerate(mask.sum(1).tolist()):
        cut = {
            name: getattr(batch, name)[row : row + 1, -length:]
            for name in ("observations", "actions", "returns_to_go", "timesteps")
        }
        torch.testing.assert_close(network(WindowBatch(**cut))[0], out[row, -length:], rtol=0, atol=1e-5)
    assert (network(batch) - out)[0, -1].abs().max() > 1e-3  # an ignored mask would be noticed


@torch.no_grad()
def test_an_all_true_mask_and_integer_masks_mean_what_they_say() -> None:
    network, batch = make_network(), make_batch()
    ones = torch.ones(3, T)
    torch.testing.assert_close(network(replace(batch, attention_mask=ones)), network(batch), rtol=0, atol=1e-5)
    assert torch.equal(
        network(replace(batch, attention_mask=ones.long())), network(replace(batch, attention_mask=ones.bool()))
    )


@torch.no_grad()
def test_late_timesteps_share_the_last_embedding() -> None:
    network, batch = make_network(), make_batch()
    late, last = (replace(batch, timesteps=torch.full((3, T), t)) for t in (1000, 49))
    assert torch.equal(network(late), network(last))
    assert not torch.equal(network(last), network(replace(batch, timesteps=torch.full((3, T), 48))))


def test_the_distribution_head() -> None:
    network = make_network(replace(CONFIG, stochastic=True))
    features = network.features(make_batch()) * 100
    mean, log_std = network.distribution(features)
    low, high = LOG_STD_RANGE
    assert mean.shape == log_std.shape == (3, T, ACT)
    assert low <= log_std.min() < (low + high) / 2 < log_std.max() <= high
    torch.testing.assert_close(torch.tanh(mean), network.actions(features))
    with pytest.raises(UserError, match="deterministic"):
        make_network().distribution(features)


@torch.no_grad()
def test_without_tanh_actions_are_not_bounded() -> None:
    bounded, batch = make_network(), make_batch()
    free = make_network(replace(CONFIG, action_tanh=False))
    torch.testing.assert_close(torch.tanh(free(batch)), bounded(batch))
    assert free(batch).abs().max() > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide hidden_size=32"),
        ({"token_order": ("state", "action")}, "token_order"),
        ({"activation": "swish"}, "activation='swish': expected one of"),
        ({"stochastic": True, "action_tanh": False}, "action_tanh=true"),
        ({"num_layers": 0}, "num_layers=0: expected at least 1"),
        ({"context_length": -1}, "context_length=-1: expected at least 1"),
        ({"max_timestep": 0}, "max_timestep=0: expected at least 1"),
        ({"inner_size": -3}, "inner_size=-3: expected at least 1, or 0"),
    ],
)
def test_config_errors(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **change)  # type: ignore[arg-type]


def test_every_weight_learns() -> None:
    network = make_network()
    network(make_batch()).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(("name", "millions"), [("small", 0.93), ("base", 13.1), ("large", 43.3)])
def test_named_sizes(name: str, millions: float) -> None:
    config = DecisionTransformerConfig(39, 4, **SIZES[name])
    network = DecisionTransformer.empty(config)
    D, L = config.hidden_size, config.num_layers
    blocks = sum(p.numel() for p in network.blocks.parameters())
    assert blocks == L * (12 * D * D + 13 * D)
    assert math.isclose(sum(p.numel() for p in network.parameters()) / 1e6, millions, rel_tol=0.02)
