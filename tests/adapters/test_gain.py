"""Gain and effective rank of adapter starts, and starts put on one scale."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from eva_rl.adapters import METHODS, check_gain, input_moments, measure_start, rotate, set_gain, target_layers
from eva_rl.adapters.extensions import low_rank_layers
from eva_rl.configs.finetune import AdapterOptions
from eva_rl.data import Trajectories
from eva_rl.errors import UserError
from eva_rl.eva import SecondMoment
from tests.adapters.making import attached, batches, usual_first
from tests.conftest import make_policy

ZERO_B = [name for name, method in METHODS.items() if method.zero_b]


@pytest.fixture(scope="module")
def moments(reach_demonstrations: Trajectories) -> dict[str, SecondMoment]:
    policy = make_policy()
    return input_moments(
        policy, target_layers(policy.network), batches(policy, reach_demonstrations), None, max_batches=4
    )


@pytest.fixture(scope="module")
def inputs(reach_demonstrations: Trajectories) -> dict[str, Tensor]:
    """Every real row of every layer's input, float64."""
    policy = make_policy()
    rows: dict[str, list[Tensor]] = {}
    for name in target_layers(policy.network):
        layer = policy.network.get_submodule(name)
        layer.register_forward_pre_hook(lambda module, args, name=name: rows.setdefault(name, []).append(args[0]))
    kept: dict[str, list[Tensor]] = {}
    for _, batch in zip(range(4), batches(policy, reach_demonstrations), strict=False):
        rows.clear()
        with torch.no_grad():
            policy.network(batch)
        for name, (x,) in rows.items():
            mask = torch.ones(batch.timesteps.shape, dtype=torch.bool)
            if batch.attention_mask is not None:
                mask = batch.attention_mask
            kept.setdefault(name, []).append(x[mask.repeat_interleave(x.shape[1] // mask.shape[1], dim=1)].double())
    return {name: torch.cat(parts) for name, parts in kept.items()}


@pytest.mark.parametrize("method", ["lora", "eva", "pissa", "orthogonal", "dora"])
def test_measured_as_on_all_rows(
    method: str, reach_demonstrations: Trajectories, moments: dict[str, SecondMoment], inputs: dict[str, Tensor]
) -> None:
    _, adapter = attached(method, reach_demonstrations)
    assert adapter.model is not None
    found = measure_start(adapter.model, moments)
    assert found.keys() == moments.keys()
    for name, a in ((layer.name, layer.A) for layer in low_rank_layers(adapter.model)):
        passed = inputs[name] @ a.detach().double().T
        m = passed.T @ passed / len(passed)
        assert found[name].gain == pytest.approx(float(m.trace()), rel=1e-3)
        assert found[name].effective_rank == pytest.approx(float(m.trace() ** 2 / m.square().sum()), rel=1e-3)


@pytest.mark.parametrize("method", usual_first(ZERO_B, ("lora", "eva", "dora")))
@pytest.mark.parametrize("reference", ["lora", "eva", "2.5"])
def test_starts_on_one_scale(
    method: str, reference: str, reach_demonstrations: Trajectories, moments: dict[str, SecondMoment]
) -> None:
    policy, adapter = attached(method, reach_demonstrations)
    assert adapter.model is not None
    batch = next(batches(policy, reach_demonstrations))
    with torch.no_grad():
        before = policy.network(batch)
        shapes = {name: one.effective_rank for name, one in measure_start(adapter.model, moments).items()}
        set_gain(adapter.model, moments, reference)
        torch.testing.assert_close(policy.network(batch), before)
    for name, one in measure_start(adapter.model, moments).items():
        rank = next(layer for layer in low_rank_layers(adapter.model) if layer.name == name).A.shape[0]
        assert one.gain == pytest.approx(wanted(reference, moments[name], rank), rel=1e-3), name
        assert one.effective_rank == pytest.approx(shapes[name], rel=1e-4)


def wanted(reference: str, moment: SecondMoment, rank: int) -> float:
    assert moment.dense is not None
    if reference == "lora":
        return float(rank * moment.dense.trace() / (3 * moment.width))
    if reference == "eva":
        return float(torch.linalg.svdvals(moment.dense)[:rank].sum())
    return float(reference)


def test_loras_mean_gain_is_loras(reach_demonstrations: Trajectories, moments: dict[str, SecondMoment]) -> None:
    """The formula against PEFT's own draws; EVA rescaled to it has their mean, to 1 %."""
    gains = []
    for seed in range(60):
        torch.manual_seed(seed)
        _, adapter = attached("lora", reach_demonstrations)
        assert adapter.model is not None
        gains.append({name: one.gain for name, one in measure_start(adapter.model, moments).items()})
    _, eva = attached("eva", reach_demonstrations)
    assert eva.model is not None
    own = measure_start(eva.model, moments)
    set_gain(eva.model, moments, "lora")
    found = measure_start(eva.model, moments)
    mean = sum(sum(one.values()) for one in gains) / len(gains)
    assert sum(one.gain for one in found.values()) == pytest.approx(mean, rel=0.05), "60 draws"
    assert sum(one.gain for one in own.values()) > 3 * mean, "EVA's own is far larger"


def test_rotated_rows_keep_what_counts(reach_demonstrations: Trajectories, moments: dict[str, SecondMoment]) -> None:
    _, adapter = attached("lora", reach_demonstrations)
    assert adapter.model is not None
    before = {layer.name: layer.A.detach().clone() for layer in low_rank_layers(adapter.model)}
    start = measure_start(adapter.model, moments)
    rotate(adapter.model, 3)
    for name, a in ((layer.name, layer.A) for layer in low_rank_layers(adapter.model)):
        assert not torch.allclose(a, before[name])
        torch.testing.assert_close(a.T @ a, before[name].T @ before[name], atol=1e-5, rtol=1e-4)
    for name, one in measure_start(adapter.model, moments).items():
        assert asdict(one) == pytest.approx(asdict(start[name]), rel=1e-4)


@pytest.mark.parametrize("value", ["", "big", "0", "-1", "nan", "inf"])
def test_wrong_gains(value: str) -> None:
    with pytest.raises(UserError, match=r"expected own, lora, eva, or a number above 0"):
        check_gain(value)


def test_what_has_no_zero_b_is_refused() -> None:
    with pytest.raises(UserError, match="adapter=pissa has none"):
        AdapterOptions(method="pissa", gain="lora")
    with pytest.raises(UserError, match="adapter=lora has none"):
        AdapterOptions(method="lora", variant="whiten")
    assert AdapterOptions(method="lora", variant="rotate", gain="eva").gain == "eva"
