"""Every method: what it changes, what it leaves, and that PEFT reads what is saved."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from eva_rl import eva
from eva_rl.adapters import (
    METHODS,
    AttachedAdapter,
    attach_adapter,
    base_weights,
    initial_rank,
    load_policy,
    save_adapted_policy,
    target_layers,
)
from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.agents.checkpoint import read_policy
from eva_rl.data import Trajectories, WindowSampler
from eva_rl.errors import UserError
from eva_rl.training.bc import BCOptions, train_bc
from tests.conftest import make_policy


def sampler(policy: DecisionTransformerPolicy, data: Trajectories) -> WindowSampler:
    return WindowSampler(data, policy.network.config.context_length, policy.scaling)


def measure(policy: DecisionTransformerPolicy, data: Trajectories, **options: float) -> eva.EvaResult:
    batches = (sampler(policy, data).sample(32, step) for step in count())
    targets = target_layers(policy.network)
    return eva.compute(
        policy.network, batches, targets=targets, **({"rank": 4, "alpha": 4, "max_batches": 4} | options)
    )


def attached(method: str, data: Trajectories, **options: float):
    policy = make_policy()
    if METHODS[method].adalora:
        options = {"rank": initial_rank(4)}
    result = measure(policy, data, **options) if METHODS[method].eva else None
    return policy, attach_adapter(policy, method, rank=4, eva=result, total_updates=UPDATES)


UPDATES = 8


def train(policy: DecisionTransformerPolicy, data: Trajectories, adapter: AttachedAdapter) -> None:
    options = BCOptions(updates=UPDATES, batch_size=8, warmup=1)
    train_bc(policy, sampler(policy, data), options, log=lambda m, s: None, extension=adapter.extension)


@pytest.mark.parametrize("method", METHODS)
def test_actions_are_unchanged_at_first_and_change_with_training(
    method: str, reach_demonstrations: Trajectories
) -> None:
    plain = make_policy()
    batch = sampler(plain, reach_demonstrations).sample(16, 7)
    before = plain.network(batch)
    policy, adapter = attached(method, reach_demonstrations)
    torch.testing.assert_close(policy.network.eval()(batch), before, atol=1e-6, rtol=0)
    train(policy, reach_demonstrations, adapter)
    assert (policy.network(batch) - before).abs().max() > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_training_changes_only_what_may_change(method: str, reach_demonstrations: Trajectories) -> None:
    policy, adapter = attached(method, reach_demonstrations)
    before = {name: p.detach().clone() for name, p in policy.network.named_parameters()}
    train(policy, reach_demonstrations, adapter)
    changed = {name for name, p in policy.network.named_parameters() if not torch.equal(p, before[name])}
    allowed = {
        "full": lambda name: True,
        "head": lambda name: name.startswith("action_head"),
    }.get(method, lambda name: ".lora_" in name)
    assert changed
    assert all(map(allowed, changed))
    if METHODS[method].adapter:
        assert any("lora_B" in name for name in changed)
        assert any("magnitude" in name for name in changed) == METHODS[method].dora


def test_eva_directions_are_the_adapters(reach_demonstrations: Trajectories) -> None:
    policy, adapter = attached("eva", reach_demonstrations, rho=2.0)
    assert adapter.eva is not None
    ranks = {layer.rank for layer in adapter.eva.layers.values()}
    assert len(ranks) > 1, "ranks were redistributed"
    for name, layer in adapter.eva.layers.items():
        module = policy.network.get_submodule(name)
        if layer.rank == 0:
            assert not hasattr(module, "lora_A")
            continue
        torch.testing.assert_close(module.lora_A["default"].weight, layer.components)
        assert module.scaling["default"] == pytest.approx(1.0), "alpha follows the rank"


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_acts_the_same(method: str, tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    policy, adapter = attached(method, reach_demonstrations, rho=2.0)
    train(policy, reach_demonstrations, adapter)
    batch = sampler(policy, reach_demonstrations).sample(16, 7)
    expected = policy.network(batch)
    save_adapted_policy(tmp_path / "policy", policy, adapter, "card")
    assert torch.equal(load_policy(tmp_path / "policy").network(batch), expected)
    if adapter.model is None:
        return
    base = read_policy(tmp_path / "policy")
    for name, value in base_weights(policy.network).items():
        assert torch.equal(base.network.state_dict()[name], make_policy().network.state_dict()[name]), name
        assert torch.equal(value, base.network.state_dict()[name])
    by_peft = PeftModel.from_pretrained(base.network, str(tmp_path / "policy" / "adapter"))
    torch.testing.assert_close(by_peft(batch), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(by_peft.merge_and_unload()(batch), expected, atol=1e-5, rtol=0)


def test_rslora_keeps_its_scale_when_ranks_differ(reach_demonstrations: Trajectories) -> None:
    policy, adapter = attached("eva_rslora", reach_demonstrations, rho=2.0)
    assert adapter.eva is not None
    assert len({layer.rank for layer in adapter.eva.layers.values()}) > 1
    for name in adapter.eva.rank_pattern:
        assert policy.network.get_submodule(name).scaling["default"] == pytest.approx(4 / 4**0.5)


def test_adalora_really_prunes_and_starts_along_evas_directions(reach_demonstrations: Trajectories) -> None:
    policy, adapter = attached("eva_adalora", reach_demonstrations)
    assert adapter.eva is not None
    for name, layer in adapter.eva.layers.items():
        assert layer.rank == initial_rank(4) == 6
        torch.testing.assert_close(policy.network.get_submodule(name).lora_A["default"].data, layer.components)
    train(policy, reach_demonstrations, adapter)
    kept = [int((policy.network.get_submodule(name).lora_E["default"].abs() > 0).sum()) for name in adapter.eva.layers]
    assert sum(kept) == 4 * len(kept), "the budget is the target rank times the number of layers"
    assert len(set(kept)) > 1, "some layers keep more than others"


def test_adalora_resumed_equals_uninterrupted(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    class KilledError(Exception):
        pass

    def run(folder: Path, die_at: int) -> dict[str, torch.Tensor]:
        policy, adapter = attached("adalora", reach_demonstrations)
        options = BCOptions(updates=UPDATES, batch_size=8, warmup=1, log_every=1, checkpoint_every=1)

        def log(metrics: object, step: int) -> None:
            if step == die_at:
                raise KilledError

        draw = sampler(policy, reach_demonstrations)
        train_bc(policy, draw, options, log=log, checkpoint_dir=folder, extension=adapter.extension)
        return {name: value.clone() for name, value in policy.network.state_dict().items()}

    whole = run(tmp_path / "whole", die_at=-1)
    for die_at in (3, 6):
        with pytest.raises(KilledError):
            run(tmp_path / "parts", die_at)
    resumed = run(tmp_path / "parts", die_at=-1)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_eva_without_its_directions_is_refused() -> None:
    with pytest.raises(UserError, match="needs EVA directions"):
        attach_adapter(make_policy(), "eva")


def test_unknown_targets_are_an_error_with_the_names_that_exist() -> None:
    with pytest.raises(UserError, match=r"'query' matches no layer.*q_proj"):
        attach_adapter(make_policy(), "lora", targets=["q_proj", "query"])


def test_a_second_adapter_is_refused(reach_demonstrations: Trajectories) -> None:
    policy, _ = attached("lora", reach_demonstrations)
    with pytest.raises(UserError, match="adapter already"):
        attach_adapter(policy, "lora")


def test_damaged_adapters_are_refused(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    policy, adapter = attached("lora", reach_demonstrations)
    save_adapted_policy(tmp_path / "policy", policy, adapter, "card")
    weights = tmp_path / "policy" / "adapter" / "adapter_model.safetensors"
    good = load_file(weights)
    some = next(iter(good))
    save_file({k: (v[:, :-1] if k == some else v).contiguous() for k, v in good.items()}, weights)
    with pytest.raises(UserError, match="does not fit"):
        load_policy(tmp_path / "policy")
    save_file({k: v for k, v in good.items() if k != some}, weights)
    with pytest.raises(UserError, match="does not fit"):
        load_policy(tmp_path / "policy")
    weights.write_bytes(b"half")
    with pytest.raises(UserError, match="does not fit"):
        load_policy(tmp_path / "policy")
    config = tmp_path / "policy" / "adapter" / "adapter_config.json"
    save_file(good, weights)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["nowhere"]}))
    with pytest.raises(UserError, match="does not fit"):
        load_policy(tmp_path / "policy")
