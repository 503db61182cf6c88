"""Saved adapters: what comes back is what was saved, here and through plain PEFT; what does not fit is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eva_rl.adapters import (
    METHODS,
    AdaptedPolicy,
    attach_adapter,
    base_weights,
    fused,
    load_policy,
    save_adapted_policy,
)
from eva_rl.agents import save_policy
from eva_rl.agents.policy_folder import read_policy
from eva_rl.batch import WindowBatch
from eva_rl.data import Trajectories
from eva_rl.errors import UserError
from tests.adapters.making import PEFT_METHODS, attached, sampler, train, usual_first
from tests.conftest import make_policy, unseal

PLAIN_PEFT = """
import sys
from pathlib import Path
import torch
from peft import PeftModel
from eva_rl.agents.policy_folder import read_policy
torch.set_num_threads(1)
batch = torch.load(sys.argv[1], weights_only=False)
for folder in map(Path, sys.argv[2:]):
    network = read_policy(folder).network
    plain = network(batch)
    model = PeftModel.from_pretrained(network, str(folder / "adapter"))
    acted = model(batch)
    with model.disable_adapter():
        off = model(batch)
    merged = model.merge_and_unload()(batch)
    torch.save([t.detach() for t in (plain, acted, off, merged)], folder / "out.pt")
"""


def windows(data: Trajectories) -> WindowBatch:
    return sampler(make_policy(), data).sample(16, 7)


def trained(method: str, data: Trajectories, folder: Path, rho: float = 1.0) -> torch.Tensor:
    """Train a method, save it, and return the actions on the windows."""
    policy, adapter = attached(method, data, rho=rho)
    train(policy, data, adapter)
    save_adapted_policy(folder, policy, adapter, "card")
    return policy.network(windows(data)).detach()


@pytest.fixture(scope="module")
def once(
    reach_demonstrations: Trajectories, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, torch.Tensor]]:
    """The folder of a method that was trained, and its actions on the windows; only read."""
    root = tmp_path_factory.mktemp("trained")

    @cache
    def found(method: str) -> tuple[Path, torch.Tensor]:
        return root / method, trained(method, reach_demonstrations, root / method, rho=2.0)

    return found


@pytest.mark.parametrize("method", usual_first(METHODS))
def test_loaded_and_merged_act_the_same(
    method: str, once: Callable[[str], tuple[Path, torch.Tensor]], reach_demonstrations: Trajectories
) -> None:
    batch = windows(reach_demonstrations)
    folder, expected = once(method)
    untouched, original = read_policy(folder), make_policy()
    if METHODS[method].adapter:
        for name, value in original.network.state_dict().items():
            assert torch.equal(untouched.network.state_dict()[name], value), name
    torch.testing.assert_close(load_policy(folder).network(batch), expected, atol=1e-5, rtol=0)
    merged = load_policy(folder, merge=True)
    torch.testing.assert_close(merged.network(batch), expected, atol=1e-5, rtol=0)
    assert merged.network.state_dict().keys() == original.network.state_dict().keys()


@pytest.mark.slow
def test_plain_peft_in_a_new_process_acts_the_same(
    once: Callable[[str], tuple[Path, torch.Tensor]], tmp_path: Path, reach_demonstrations: Trajectories
) -> None:
    """Every method: adapter on, off and merged, on the base that is saved beside it."""
    batch, before = windows(reach_demonstrations), make_policy().network(windows(reach_demonstrations)).detach()
    for method in PEFT_METHODS:
        shutil.copytree(once(method)[0], tmp_path / method)
    torch.save(batch, tmp_path / "batch.pt")
    folders = [str(tmp_path / method) for method in PEFT_METHODS]
    command = [sys.executable, "-c", PLAIN_PEFT, str(tmp_path / "batch.pt"), *folders]
    subprocess.run(command, check=True, timeout=300)
    for method in PEFT_METHODS:
        plain, acted, off, merged = torch.load(tmp_path / method / "out.pt", weights_only=True)
        torch.testing.assert_close(plain, before, atol=1e-6, rtol=0)
        torch.testing.assert_close(off, before, atol=1e-6, rtol=0)
        torch.testing.assert_close(acted, once(method)[1], atol=1e-5, rtol=0)
        torch.testing.assert_close(merged, once(method)[1], atol=1e-5, rtol=0)
        assert (acted - before).abs().max() > 1e-4, method


@pytest.mark.parametrize(
    "method", usual_first(["lora", "eva_dora", "adalora", "pissa", "mica", "lora_plus", "miss"], ("eva_dora", "miss"))
)
def test_loaded_to_be_trained_and_saved_again(method: str, tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    first = trained(method, reach_demonstrations, tmp_path / "first")
    policy = load_policy(tmp_path / "first", is_trainable=True)
    adapter = policy.adapters.attached()
    assert adapter.method.name == method
    asking = {name for name, p in policy.network.named_parameters() if p.requires_grad}
    assert asking
    assert all(".lora_" in name or ".miss_" in name for name in asking)
    train(policy, reach_demonstrations, adapter)
    expected = policy.network(windows(reach_demonstrations))
    assert (expected - first).abs().max() > 1e-4
    save_adapted_policy(tmp_path / "second", policy, adapter, "card")
    again = load_policy(tmp_path / "second").network(windows(reach_demonstrations))
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("merge", "expected"), [(False, ["to", "fuse", "to"]), (True, ["fuse", "to"])])
def test_layers_are_fused_where_they_will_be(
    merge: bool, expected: list[str], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device, whose kind decides; that the classes are those of training is seen on a GPU, in test_attach.py."""
    order, move, fuse = [], AdaptedPolicy.to, fused.fuse_where_faster

    def moved(self: AdaptedPolicy, device: torch.device | str) -> AdaptedPolicy:
        order.append("to")
        return move(self, device)

    def fused_there(network: torch.nn.Module) -> int:
        order.append("fuse")
        return fuse(network)

    monkeypatch.setattr(AdaptedPolicy, "to", moved)
    monkeypatch.setattr(fused, "fuse_where_faster", fused_there)
    load_policy(saved, merge=merge)
    assert order == expected


@pytest.fixture
def saved(tmp_path: Path, reach_demonstrations: Trajectories) -> Path:
    """A folder without digests, so that what is checked besides them is seen."""
    trained("lora", reach_demonstrations, tmp_path / "policy")
    for record in ("policy.json", "adapter/eva_rl.json"):
        unseal(tmp_path / "policy" / record)
    return tmp_path / "policy"


def refused(folder: Path, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_policy(folder)


def test_damaged_adapters_are_refused(saved: Path) -> None:
    weights, config = saved / "adapter/adapter_model.safetensors", saved / "adapter/adapter_config.json"
    good = load_file(weights)
    some = next(iter(good))
    save_file({k: (v[:, :-1] if k == some else v).contiguous() for k, v in good.items()}, weights)
    refused(saved, "does not fit")
    save_file({k: v for k, v in good.items() if k != some}, weights)
    refused(saved, "does not fit")
    weights.write_bytes(b"half")
    refused(saved, "missing or damaged")
    save_file(good, weights)
    settings = json.loads(config.read_text())
    for wrong in ({"target_modules": ["nowhere"]}, {"r": settings["r"] + 1}, {"peft_type": "NONE"}):
        config.write_text(json.dumps(settings | wrong))
        refused(saved, "does not fit")
    config.write_text("{")
    refused(saved, "not readable JSON")


@pytest.mark.parametrize("lost", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_half_written_adapter_is_refused(lost: str, saved: Path) -> None:
    (saved / "adapter" / lost).unlink()
    refused(saved, f"is incomplete: {lost} is missing")


def test_a_lost_adapter_is_refused_rather_than_left_out(saved: Path) -> None:
    shutil.rmtree(saved / "adapter")
    refused(saved, "is incomplete")


def test_an_adapter_of_another_base_is_refused(saved: Path) -> None:
    other = make_policy(seed=1)
    save_policy(saved.parent / "other", other)
    shutil.copytree(saved / "adapter", saved.parent / "other/adapter")
    refused(saved.parent / "other", "different base weights")
    (saved / "model.safetensors").write_bytes((saved.parent / "other/model.safetensors").read_bytes())
    refused(saved, "different base weights")


def test_a_failed_save_leaves_the_old_folder(saved: Path, reach_demonstrations: Trajectories) -> None:
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    policy, adapter = attached("pissa", reach_demonstrations)
    with pytest.raises(TypeError):
        save_adapted_policy(saved, policy, adapter, b"no text")  # type: ignore[arg-type]
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name], "nothing half-written is left"


def test_pruned_directions_that_act_again_are_saved(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    """As with the parameters of the best validation, from before the last pruning."""
    policy, adapter = attached("adalora", reach_demonstrations)
    train(policy, reach_demonstrations, adapter)
    pattern = adapter.model.peft_config["default"].rank_pattern  # type: ignore[union-attr]
    assert not all(kept for own in pattern.values() for kept in own), "some are pruned"
    with torch.no_grad():
        for name, parameter in policy.network.named_parameters():
            if ".lora_E." in name:
                parameter.fill_(0.1)
    save_adapted_policy(tmp_path / "policy", policy, adapter, "card")
    batch = windows(reach_demonstrations)
    expected = policy.network.eval()(batch)
    torch.testing.assert_close(load_policy(tmp_path / "policy").network(batch), expected, atol=1e-5, rtol=0)


def test_weights_of_a_rewritten_base_come_back_exactly(reach_demonstrations: Trajectories) -> None:
    policy, adapter = attached("pissa", reach_demonstrations)
    original = make_policy().network.state_dict()
    plain = base_weights(policy.network)
    assert any(not torch.equal(plain[name], value) for name, value in original.items()), "the base was rewritten"
    kept = base_weights(policy.network, adapter)
    assert all(torch.equal(kept[name], value) for name, value in original.items())


def test_a_policy_with_an_adapter_is_not_saved_as_one_without(tmp_path: Path) -> None:
    """The folder could not be read again: the names of its weights were PEFT's."""
    policy = make_policy()
    model = attach_adapter(policy, "lora").model
    assert model is not None
    with pytest.raises(UserError, match="save_adapted_policy, or PEFT's merge_and_unload"):
        save_policy(tmp_path / "policy", policy)
    model.merge_and_unload()
    save_policy(str(tmp_path / "policy"), policy)
    kept = load_policy(tmp_path / "policy").network.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in policy.network.state_dict().items())
