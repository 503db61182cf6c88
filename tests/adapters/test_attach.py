"""Every method: what it changes, what it leaves, and that PEFT reads what is saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from eva_rl.adapters import (
    METHODS,
    attach_adapter,
    initial_rank,
    load_policy,
    save_adapted_policy,
    second_moments,
    target_layers,
)
from eva_rl.adapters.extensions import AdaLoraExtension
from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.batch import WindowBatch
from eva_rl.data import Trajectories
from eva_rl.errors import UserError
from eva_rl.training.bc import train_bc
from eva_rl.training.checkpoint import Checkpoints
from eva_rl.training.losses import clone_loss
from eva_rl.training.options import BCOptions
from tests.adapters.making import (
    RANK,
    REWRITING,
    UPDATES,
    attached,
    backward,
    batches,
    measure,
    sampler,
    train,
    usual_first,
)
from tests.adapters.test_folders import windows
from tests.conftest import make_policy


@pytest.mark.parametrize("method", usual_first(METHODS))
def test_actions_are_unchanged_at_first_and_change_with_training(
    method: str, reach_demonstrations: Trajectories
) -> None:
    plain = make_policy()
    batch = sampler(plain, reach_demonstrations).sample(16, 7)
    before = plain.network(batch)
    policy, adapter = attached(method, reach_demonstrations)
    if method == "lora_one":
        before = first_step_taken(plain, policy, before, batch)
    torch.testing.assert_close(policy.network.eval()(batch), before, atol=1e-5, rtol=0)
    train(policy, reach_demonstrations, adapter)
    assert (policy.network(batch) - before).abs().max() > 1e-4


def first_step_taken(
    plain: DecisionTransformerPolicy, policy: DecisionTransformerPolicy, before: Tensor, batch: WindowBatch
) -> Tensor:
    """LoRA-One starts a step ahead: other actions, a lower loss."""
    found = policy.network.eval()(batch).detach()
    assert (found - before).abs().max() > 1e-4
    assert clone_loss(policy.network, batch) < clone_loss(plain.network, batch)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_one_update_changes_only_what_may_change(method: str, reach_demonstrations: Trajectories) -> None:
    policy, adapter = attached(method, reach_demonstrations)
    before = {name: p.detach().clone() for name, p in policy.network.named_parameters()}
    train(policy, reach_demonstrations, adapter, updates=1)
    changed = {name for name, p in policy.network.named_parameters() if not torch.equal(p, before[name])}
    parts = {name.split(".lora_")[-1].split(".")[0] for name in changed}
    expected = {"mica": {"A"}, "dora": {"B", "magnitude_vector"}, "eva_dora": {"B", "magnitude_vector"}}
    if method == "full":
        assert len(changed) > len(before) / 2
    elif method == "head":
        assert changed == {"action_head.weight", "action_head.bias"}
    elif method == "miss":
        assert {name.split(".")[-2] for name in changed} == {"miss_block"}
    elif method in (*REWRITING, "orthogonal", "lora_one"):
        assert parts == {"A", "B"}
    elif METHODS[method].adalora:
        assert parts >= {"E"}
        assert parts <= {"A", "B", "E"}
    else:
        assert parts <= expected.get(method, {"B"}) | {"A"}  # weight decay and rounding move A a little
        assert parts >= expected.get(method, {"B"})
    assert method in {"full", "head", "miss"} or all(".lora_" in name for name in changed)


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


def test_rslora_keeps_its_scale_when_ranks_differ(reach_demonstrations: Trajectories) -> None:
    policy, adapter = attached("eva_rslora", reach_demonstrations, rho=2.0)
    assert adapter.eva is not None
    assert len({layer.rank for layer in adapter.eva.layers.values()}) > 1
    for name in adapter.eva.ranks:
        assert policy.network.get_submodule(name).scaling["default"] == pytest.approx(4 / 4**0.5)


@pytest.mark.parametrize(("method", "root"), [("eva", 1.0), ("eva_rslora", 0.5)])
def test_one_alpha_for_all_ranks(method: str, root: float, reach_demonstrations: Trajectories) -> None:
    """Without keep_scale, PEFT divides the same alpha by each layer's rank, or by its root."""
    policy = make_policy()
    found = measure(policy, reach_demonstrations, rho=2.0, alpha=8.0, keep_scale=False)
    attach_adapter(policy, method, eva=found)
    assert len(set(found.ranks.values())) > 1
    for name, rank in found.ranks.items():
        assert policy.network.get_submodule(name).scaling["default"] == pytest.approx(8 / rank**root)


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


def test_adaloras_statistics_come_back_beside_the_parameters(reach_demonstrations: Trajectories) -> None:
    """A checkpoint is read on the CPU, whatever device the parameters are on."""
    policy, adapter = attached("adalora", reach_demonstrations)
    train(policy, reach_demonstrations, adapter, updates=2)
    assert isinstance(adapter.extension, AdaLoraExtension)
    checkpoint = adapter.extension.tensors()
    assert any(name.startswith("exp_avg_ipt/") for name in checkpoint)
    policy.network.to("meta")
    adapter.extension.restore(checkpoint)
    statistics = {name: value for name, value in adapter.extension.tensors().items() if not name.startswith("kept/")}
    assert {value.device.type for value in statistics.values()} == {"meta"}
    assert {name: value.shape for name, value in checkpoint.items() if name in statistics} == {
        name: value.shape for name, value in statistics.items()
    }


@pytest.mark.parametrize("method", usual_first(METHODS, ("adalora", "dora", "lora_ga", "pissa")))
def test_resumed_equals_uninterrupted(method: str, tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    """Also where the start comes out otherwise the second time: other random numbers, other windows."""

    class KilledError(Exception):
        pass

    def run(folder: Path, die_at: int, seed: int) -> dict[str, torch.Tensor]:
        policy = make_policy()
        torch.manual_seed(seed)
        policy, adapter = attached(method, reach_demonstrations, policy=policy)
        options = BCOptions(updates=UPDATES, batch_size=8, warmup_steps=1, log_every=1)

        def log(metrics: object, step: int) -> None:
            if step == die_at:
                raise KilledError

        draw = sampler(policy, reach_demonstrations)
        train_bc(policy, draw, options, log=log, checkpoints=Checkpoints(folder, 1), extension=adapter.extension)
        return {name: value.clone() for name, value in policy.network.state_dict().items()}

    whole = run(tmp_path / "whole", die_at=-1, seed=0)
    for die_at, seed in ((3, 0), (6, 1)):
        with pytest.raises(KilledError):
            run(tmp_path / "parts", die_at, seed)
    resumed = run(tmp_path / "parts", die_at=-1, seed=2)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize(
    ("method", "lacks"),
    [("eva", "EVA directions"), ("corda", "moments"), ("lora_ga", "gradients"), ("lora_one", "gradients")],
)
def test_a_method_without_its_data_is_refused(method: str, lacks: str) -> None:
    with pytest.raises(UserError, match=f"needs .*{lacks}"):
        attach_adapter(make_policy(), method)
    with pytest.raises(UserError, match="takes no"):
        attach_adapter(make_policy(), "lora", moments={})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rank": 0}, "rank=0: expected at least 1"),
        ({"rank": 4.0}, "rank=4.0: expected at least 1, and a whole number"),
        ({"alpha": 0.0}, "alpha=0.0: expected a number above 0"),
        ({"dropout": 1.0}, "dropout=1.0: expected a probability"),
    ],
)
def test_sizes_with_which_nothing_is_learned_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        attach_adapter(make_policy(), "lora", **wrong)


def test_eva_scales_its_update_as_lora_does(reach_demonstrations: Trajectories) -> None:
    """Without an alpha, alpha is the rank; EVA's was 1, an eighth of LoRA's scale at rank 8."""
    for rank in (4, 8):
        found = measure(make_policy(), reach_demonstrations, rank=rank, alpha=None)
        scales = []
        for method, eva in (("eva", found), ("lora", None)):
            policy = make_policy()
            attach_adapter(policy, method, eva=eva)
            scales += [m.scaling["default"] for m in policy.network.modules() if hasattr(m, "scaling")]
        assert set(scales) == {1.0}


@pytest.mark.parametrize(
    ("other", "said"), [({"rank": 8}, "rank=8, and .* rank=4"), ({"alpha": 2.0}, "alpha=2, and .*=4")]
)
def test_sizes_that_contradict_evas_result_are_refused(
    other: dict[str, Any], said: str, reach_demonstrations: Trajectories
) -> None:
    policy = make_policy()
    found = measure(policy, reach_demonstrations, rank=4, alpha=4.0)
    with pytest.raises(UserError, match=said):
        attach_adapter(policy, "eva", eva=found, **other)
    attach_adapter(policy, "eva", eva=found, rank=4, alpha=4.0)
    policy = make_policy()
    odd = measure(policy, reach_demonstrations, rank=6, alpha=0.1)  # 0.1 * 6 / 6 is not 0.1
    attach_adapter(policy, "eva", eva=odd, rank=6, alpha=0.1)


def test_unknown_targets_are_an_error_with_the_names_that_exist() -> None:
    with pytest.raises(UserError, match=r"'query' matches no layer.*q_proj"):
        attach_adapter(make_policy(), "lora", targets=["q_proj", "query"])
    with pytest.raises(UserError, match=r"'all-linear' matches no layer"):
        attach_adapter(make_policy(), "lora", targets="all-linear")
    assert target_layers(make_policy().network, "q_proj") == target_layers(make_policy().network, ["q_proj"])


@pytest.mark.parametrize("given", ["mt40", make_policy().network])
def test_what_is_no_policy_gets_no_adapter(given: Any) -> None:
    with pytest.raises(UserError, match=r"policy is a \w+: expected what eva_rl\.load_policy returns.*attach_eva"):
        attach_adapter(given, "lora")


def test_a_second_adapter_is_refused(reach_demonstrations: Trajectories) -> None:
    policy, _ = attached("lora", reach_demonstrations)
    with pytest.raises(UserError, match="adapter already"):
        attach_adapter(policy, "lora")


def test_every_method_is_documented() -> None:
    root = Path(__file__).parents[2]
    for file in ("docs/commands.md", "docs/adapters.md"):
        text = (root / file).read_text()
        for name in METHODS:
            assert f"`{name}`" in text or (f"`{name.removeprefix('eva_')}`" in text and "`eva_*`" in text), (file, name)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu(method: str, tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    policy = make_policy().to("cuda")
    batch = sampler(policy, reach_demonstrations).sample(16, 7, policy.device)
    before = policy.network(batch)
    plain = copy.deepcopy(policy)
    policy, adapter = attached(method, reach_demonstrations, policy=policy)
    if method == "lora_one":
        before = first_step_taken(plain, policy, before, batch)
    torch.testing.assert_close(policy.network.eval()(batch), before, atol=1e-4, rtol=0)
    train(policy, reach_demonstrations, adapter)
    save_adapted_policy(tmp_path / "policy", policy, adapter, "card")
    for merge in (False, True):
        loaded = load_policy(tmp_path / "policy", "cuda", merge=merge)
        torch.testing.assert_close(loaded.network(batch), policy.network(batch), atol=1e-4, rtol=0)
        assert merge or low_rank_classes(loaded.network) == low_rank_classes(policy.network)


def low_rank_classes(network: nn.Module) -> dict[str, type[nn.Module]]:
    """Whether PEFT's layers are fused, by name."""
    return {name: type(module) for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_a_policy_acts_as_before_though_its_adapter_has_dropout(
    method: str, reach_demonstrations: Trajectories
) -> None:
    """PEFT's new layers are in training mode, where dropout would hit what the base no longer holds."""
    policy, batch = make_policy(), windows(reach_demonstrations)
    before = policy.network(batch).detach()
    attached(method, reach_demonstrations, policy=policy, dropout=0.5)
    assert not policy.network.training
    torch.testing.assert_close(policy.network(batch), before, rtol=1e-4, atol=1e-5)


def test_adalora_without_enough_directions_leaves_the_policy_alone(reach_demonstrations: Trajectories) -> None:
    policy = make_policy()
    found = measure(policy, reach_demonstrations, rank=RANK)
    with pytest.raises(UserError, match=r"begins with rank 6 in every layer, and EVA found 4 directions.*rank=6"):
        attach_adapter(policy, "eva_adalora", rank=RANK, eva=found, total_updates=9)
    attach_adapter(policy, "lora", rank=RANK)


@pytest.mark.parametrize("variant", ["rotate", "permute"])
def test_directions_that_are_mixed_are_not_cut(
    variant: Literal["rotate", "permute"], reach_demonstrations: Trajectories
) -> None:
    """The first few of a rotation are not the leading ones."""
    policy = make_policy()
    found = measure(policy, reach_demonstrations, variant=variant)
    with pytest.raises(UserError, match=f"variant={variant} mixes all 4 directions of .*q_proj, which takes 2 at most"):
        attach_adapter(policy, "eva", rank=RANK, eva=found, rank_caps={"q_proj": 2})
    attach_adapter(policy, "eva", rank=RANK, eva=found)


def test_directions_of_another_network_leave_the_policy_alone(reach_demonstrations: Trajectories) -> None:
    """They were refused when PEFT had made its layers: the policy had an untrained adapter, and took no other."""
    policy, other = make_policy(hidden_size=48, num_heads=2), make_policy()
    found, before = measure(other, reach_demonstrations, rank=RANK), list(policy.network.state_dict())
    with pytest.raises(
        UserError, match=r"q_proj have 32 features, and its input has 48\. Compute them with this model"
    ):
        attach_adapter(policy, "eva", rank=RANK, eva=found)
    assert list(policy.network.state_dict()) == before
    assert all(parameter.requires_grad for parameter in policy.network.parameters())
    attach_adapter(policy, "lora", rank=RANK)


@pytest.mark.parametrize("method", ["lora_ga", "lora_one"])
def test_a_backward_pass_that_fails_leaves_the_policy_alone(method: str, reach_demonstrations: Trajectories) -> None:
    """Hooks stayed behind, and all parameters but the targets' were frozen."""
    policy = make_policy()

    def fails() -> None:
        backward(policy, reach_demonstrations)()
        raise UserError("the data ended")

    with pytest.raises(UserError, match="the data ended"):
        attach_adapter(policy, method, rank=RANK, backward=fails)
    modules = list(policy.network.modules())
    assert not any(module.training or module._backward_hooks for module in modules)
    assert not any("loraga" in key for module in modules for key in vars(module))
    assert all(p.requires_grad and p.grad is None for p in policy.network.parameters())
    attached(method, reach_demonstrations, policy=policy)


@pytest.mark.parametrize("method", ["lora_ga", "lora_one"])
def test_a_backward_pass_without_gradients_is_refused(method: str) -> None:
    """LoRA-GA became plain LoRA, and LoRA-One failed halfway."""
    policy = make_policy()
    with pytest.raises(UserError, match=r"backward= left no gradient at blocks\.0.*call backward\(\) on a loss of"):
        attach_adapter(policy, method, rank=RANK, backward=lambda: None)
    modules = list(policy.network.modules())
    assert not any("loraga" in key for module in modules for key in vars(module))
    assert not any(hasattr(module, "lora_A") for module in modules)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (torch.zeros_like, r"mean diagonal of 0, from which CorDA has no directions"),
        (lambda moment: moment * float("nan"), "not finite"),
        (lambda moment: moment[1:], r"is of shape \(31, 32\); expected a tensor of shape \(32, 32\)"),
        (lambda moment: moment.numpy(), "is a ndarray; expected a tensor"),
    ],
)
def test_second_moments_that_peft_cannot_invert_are_refused(
    spoil: Callable[[Tensor], object], error: str, reach_demonstrations: Trajectories
) -> None:
    """PEFT looked for an inverse for ever."""
    policy = make_policy()
    layers = target_layers(policy.network, ["q_proj"])
    moments = second_moments(policy, layers, batches(policy, reach_demonstrations), None, max_batches=2)
    spoilt = {name: spoil(moment) for name, moment in moments.items()}
    with pytest.raises(UserError, match=error):
        attach_adapter(policy, "corda", rank=RANK, targets=layers, moments=spoilt)  # type: ignore[arg-type]
