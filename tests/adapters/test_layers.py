"""Which layers get an adapter, of which rank, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from eva_rl.adapters import METHODS, PROJECTIONS, load_policy, save_adapted_policy, second_moments, target_layers
from eva_rl.adapters.layers import rank_limits
from eva_rl.data import Trajectories
from eva_rl.errors import UserError
from tests.adapters.making import attached, backward, batches, measure, train, usual_first
from tests.adapters.test_folders import windows
from tests.conftest import make_policy

EDGES = [*PROJECTIONS, "action_head", "embed_return", "embed_state", "embed_action"]
LINEAR = [name for name, method in METHODS.items() if method.adapter and not (method.adalora or method.miss)]


def ranks(network: torch.nn.Module) -> dict[str, int]:
    found = {}
    for name, module in network.named_modules():
        if "default" in getattr(module, "lora_A", {}):
            found[name] = module.lora_A["default"].weight.shape[0]
        elif "default" in getattr(module, "lora_embedding_A", {}):
            found[name] = module.lora_embedding_A["default"].shape[0]
    return found


@pytest.mark.parametrize("method", usual_first(LINEAR))
def test_no_rank_exceeds_its_layer(method: str, tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    """Narrow layers get what they can have, with the update scale of the others; what is saved loads."""
    narrow = {"lora_ga": "embed_return", "orthogonal": "embed_return"}
    targets = [name for name in EDGES if name != narrow.get(method)]
    policy, adapter = attached(method, reach_demonstrations, targets=targets, rank_caps={"embed_state": 2})
    found = ranks(policy.network)
    head = 2 if method == "lora_ga" else 4
    assert (found["blocks.0.mlp.up_proj"], found["action_head"], found["embed_state"]) == (4, head, 2)
    assert found.get("embed_return", 1) == 1
    scales = {module.scaling["default"] for module in policy.network.modules() if hasattr(module, "scaling")}
    assert len({round(scale, 6) for scale in scales}) == 1
    train(policy, reach_demonstrations, adapter)
    save_adapted_policy(tmp_path / "policy", policy, adapter, "card")
    batch = windows(reach_demonstrations)
    loaded = load_policy(tmp_path / "policy", merge=True)
    torch.testing.assert_close(loaded.network(batch), policy.network(batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "mica", "lora_plus"])
def test_lookup_tables(method: str, tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    batch, before = windows(reach_demonstrations), make_policy().network(windows(reach_demonstrations))
    policy, adapter = attached(method, reach_demonstrations, targets=["embed_timestep"])
    assert ranks(policy.network) == {"embed_timestep": 4}
    torch.testing.assert_close(policy.network(batch), before, atol=1e-5, rtol=0)
    train(policy, reach_demonstrations, adapter)
    save_adapted_policy(tmp_path / "policy", policy, adapter, "card")
    expected = policy.network(batch)
    assert (expected - before).abs().max() > 1e-4
    torch.testing.assert_close(load_policy(tmp_path / "policy").network(batch), expected, atol=1e-5, rtol=0)
    merged = load_policy(tmp_path / "policy", merge=True).network(batch)
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("method", "rank", "targets", "caps", "words"),
    [
        ("eva", 4, ["embed_timestep"], {}, "lookup table.*adapter=lora"),
        ("pissa", 4, ["q_proj", "embed_timestep"], {}, "lookup table"),
        ("orthogonal", 3, ["q_proj"], {}, "has to be even"),
        ("orthogonal", 4, ["embed_return"], {}, "no direction in embed_return"),
        ("lora_ga", 4, ["embed_return"], {}, "no direction in embed_return"),
        ("miss", 8, ["action_head"], {}, "adapter.rank=8; action_head takes 4"),
        ("miss", 4, ["q_proj"], {"q_proj": 2}, "one rank for all layers"),
        ("lora_one", 4, ["embed_timestep"], {}, "lookup table"),
        ("adalora", 4, ["action_head"], {}, "begins with rank 6.*action_head takes 4"),
        ("adalora", 4, ["q_proj"], {"q_proj": 2}, "begins with rank 6"),
        ("lora", 4, ["q_proj"], {"quproj": 2}, "rank_caps.*'quproj' matches no layer.*q_proj"),
        ("lora", 4, ["q_proj"], {"q_proj": 0}, "q_proj=0"),
        ("lora", 4, ["q_proj", "qq"], {}, "targets: 'qq' matches no layer.*embed_timestep.*q_proj"),
    ],
)
def test_what_a_method_cannot_do(method: str, rank: int, targets: list[str], caps: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        rank_limits(make_policy().network, METHODS[method], rank, targets, caps)


def test_caps_cut_evas_ranks(reach_demonstrations: Trajectories) -> None:
    free = measure(make_policy(), reach_demonstrations, rho=2.0)
    policy, adapter = attached(
        "eva", reach_demonstrations, rho=2.0, rank_caps={"up_proj": 1, "blocks.1.mlp.down_proj": 3}
    )
    assert adapter.eva is not None
    caps = {"blocks.0.mlp.up_proj": 1, "blocks.1.mlp.up_proj": 1, "blocks.1.mlp.down_proj": 3}
    wanted = {name: min(layer.rank, caps.get(name, 99)) for name, layer in free.layers.items()}
    assert ranks(policy.network) == {name: rank for name, rank in wanted.items() if rank}
    assert any(wanted[name] < free.layers[name].rank for name in caps)


def test_second_moments_are_those_of_the_inputs(reach_demonstrations: Trajectories) -> None:
    policy, name = make_policy(), "blocks.1.mlp.down_proj"
    seen: list[torch.Tensor] = []
    layer = policy.network.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))
    mask = torch.ones(32, 6)
    mask[:16, :4] = 0
    three = [replace(batch, attention_mask=mask) for batch in islice(batches(policy, reach_demonstrations), 3)]
    for batch in three:
        policy.network(batch)
    handle.remove()
    rows = torch.cat([x[mask.bool()] for x in seen]).double()
    found = second_moments(policy, target_layers(policy.network), iter(three), None, max_batches=3)
    torch.testing.assert_close(found[name], rows.T @ rows / len(rows), atol=1e-5, rtol=1e-4)
    padded = torch.cat([x.flatten(0, 1) for x in seen]).double()
    assert not torch.allclose(found[name], padded.T @ padded / len(padded), rtol=1e-3), "padding would show"


def test_corda_starts_from_what_acts_on_the_inputs(reach_demonstrations: Trajectories) -> None:
    """B0 A0 is W C's best approximation of its rank, times the inverse of C."""
    policy, name = make_policy(), "blocks.0.attention.o_proj"
    moments = second_moments(policy, [name], batches(policy, reach_demonstrations), None, max_batches=4)[name]
    C = moments / moments.diagonal().mean() + 0.01 * torch.eye(len(moments))
    W = policy.network.get_submodule(name).weight.detach().double()
    U, S, Vh = torch.linalg.svd(W @ C)
    wanted = U[:, :4] * S[:4] @ Vh[:4] @ torch.linalg.inv(C)
    policy, _ = attached("corda", reach_demonstrations, targets=[name])
    layer = policy.network.get_submodule(name)
    update = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).double()
    torch.testing.assert_close(update, wanted, atol=1e-4, rtol=1e-3)


def test_lora_ga_starts_along_the_gradient(reach_demonstrations: Trajectories) -> None:
    policy, name = make_policy(), "blocks.0.mlp.up_proj"
    network = policy.network.requires_grad_(True)
    backward(policy, reach_demonstrations)()
    gradient = network.get_parameter(name + ".weight").grad
    assert gradient is not None
    _, _, Vh = torch.linalg.svd(gradient)
    policy, _ = attached("lora_ga", reach_demonstrations, targets=[name])
    A = policy.network.get_submodule(name).lora_A["default"].weight
    torch.testing.assert_close((A @ Vh[:4].T).abs().sum(), torch.tensor(4.0), atol=0.02, rtol=0)


def test_mica_reads_out_along_minor_directions(reach_demonstrations: Trajectories) -> None:
    policy, _ = attached("mica", reach_demonstrations)
    layer = policy.network.blocks[0].mlp.up_proj
    U, S, _ = torch.linalg.svd(layer.base_layer.weight, full_matrices=False)
    B = layer.lora_B["default"].weight
    torch.testing.assert_close((U[:, -4:].T @ B).abs(), torch.eye(4), atol=1e-3, rtol=0)
    assert S[:-4].min() > S[-4:].max(), "they come last"
    assert not B.requires_grad


def test_the_ranks_stand_in_pefts_config(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    policy, adapter = attached(
        "pissa", reach_demonstrations, targets=["q_proj", "action_head"], rank_caps={"q_proj": 3}
    )
    save_adapted_policy(tmp_path / "policy", policy, adapter, "card")
    config = json.loads((tmp_path / "policy/adapter/adapter_config.json").read_text())
    assert config["init_lora_weights"] is True, "plain LoRA: nothing is decomposed again when it is loaded"
    assert sorted(config["rank_pattern"].values()) == [6, 6], "of twice the rank: what was learned less the start"
