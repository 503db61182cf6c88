"""EVA refresh: overlaps, and unused directions reinitialised without changing the function."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from eva_rl import eva
from eva_rl.adapters import (
    attach_adapter,
    compute_eva,
    measure_start,
    refresh_directions,
    subspace_overlap,
    target_layers,
)
from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.batch import WindowBatch
from eva_rl.data import Trajectories, WindowSampler
from tests.conftest import make_policy

RANK = 4
NAMES = target_layers(make_policy().network)


def test_overlap_of_known_subspaces() -> None:
    axes = torch.eye(5)
    assert subspace_overlap(axes[:2] * 7, axes[:2].flip(0)) == pytest.approx(1)
    assert subspace_overlap(axes[:2], axes[2:4]) == pytest.approx(0)
    assert subspace_overlap(axes[:2], axes[1:3]) == pytest.approx(0.5)
    slanted = torch.tensor([[np.cos(0.3), np.sin(0.3), 0, 0, 0]], dtype=torch.float32)
    assert subspace_overlap(slanted, axes[:1]) == pytest.approx(np.cos(0.3) ** 2)


def test_an_empty_subspace_lies_in_every_other() -> None:
    """That of a layer whose input does not vary: the mean over layers stays a number."""
    axes = torch.eye(5)
    assert subspace_overlap(axes[:2], axes[:0]) == subspace_overlap(axes[:0], axes[:2]) == 1


def batches(policy: DecisionTransformerPolicy, data: Trajectories) -> Iterator[WindowBatch]:
    sampler = WindowSampler(data, 6, policy.scaling)
    return (sampler.sample(32, step) for step in itertools.count())


def look(policy: DecisionTransformerPolicy, data: Trajectories) -> eva.EvaResult:
    return compute_eva(policy, NAMES, batches(policy, data), None, max_batches=6, rank=RANK)


@pytest.mark.parametrize("method", ["eva", "eva_dora", "eva_rslora"])
@pytest.mark.parametrize("used", [0, 2, RANK])
def test_unused_directions_are_reinitialised_and_nothing_else_changes(
    method: str, used: int, reach_demonstrations: Trajectories
) -> None:
    policy = make_policy()
    adapter = attach_adapter(policy, method, rank=RANK, eva=look(policy, reach_demonstrations))
    assert adapter.model is not None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.network.named_parameters():
            if "lora_A" in name:  # away from the activations, so that the layer has to be reinitialised
                parameter.copy_(torch.linalg.qr(torch.randn(parameter.shape, generator=generator).T)[0].T)
            elif "lora_B" in name:
                parameter[:, :used] = torch.randn(parameter.shape[0], used, generator=generator) * 0.3
    batch = next(batches(policy, reach_demonstrations))
    found = look(policy, reach_demonstrations)
    with torch.no_grad():
        before = policy.network(batch)
    done = refresh_directions(adapter.model, found, threshold=1.0)
    with torch.no_grad():
        torch.testing.assert_close(policy.network(batch), before, atol=1e-5, rtol=1e-5)
    again = refresh_directions(adapter.model, found, threshold=0.0)
    assert set(done.overlaps) == set(NAMES)
    if used == RANK:
        assert not done.reinitialised
        assert not done.changed
        return
    assert set(done.reinitialised.values()) == {RANK - used}
    assert all(again.overlaps[name] > overlap for name, overlap in done.overlaps.items())
    if used == 0:
        assert min(again.overlaps.values()) == pytest.approx(1, abs=1e-4)


def test_every_row_can_train_where_few_directions_are_new(reach_demonstrations: Trajectories) -> None:
    """Fewer than the adapter has unused rows, as where a layer's input has little variance."""
    policy = make_policy()
    found = look(policy, reach_demonstrations)
    adapter = attach_adapter(policy, "lora", rank=RANK)
    assert adapter.model is not None
    few = {name: replace(layer, components=layer.components[:1]) for name, layer in found.layers.items()}
    batch = next(batches(policy, reach_demonstrations))
    with torch.no_grad():
        before = policy.network(batch)
    done = refresh_directions(adapter.model, replace(found, layers=few), threshold=1.0)
    assert set(done.reinitialised.values()) == {1}
    with torch.no_grad():
        torch.testing.assert_close(policy.network(batch), before, atol=1e-5, rtol=1e-5)
    for name in NAMES:
        layer = policy.network.get_submodule(name)
        rows = layer.lora_A["default"].weight.detach()
        torch.testing.assert_close(rows @ rows.T, torch.eye(RANK), atol=1e-5, rtol=0)
        assert float((rows[:1] @ few[name].components.T).abs()) == pytest.approx(1, abs=1e-4), "the new one"


def test_layers_that_still_overlap_are_left_alone(reach_demonstrations: Trajectories) -> None:
    policy = make_policy()
    found = look(policy, reach_demonstrations)
    adapter = attach_adapter(policy, "eva", rank=RANK, eva=found)
    assert adapter.model is not None
    done = refresh_directions(adapter.model, found, threshold=0.99)
    assert not done.changed
    assert done.metrics()["eva/overlap_min"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("used", [0, 2])
def test_a_refreshed_layer_keeps_the_gain_that_was_asked_for(used: int, reach_demonstrations: Trajectories) -> None:
    """New rows were of length 1: a start rescaled to LoRA's gain was tens of times as strong after the refresh."""
    policy = make_policy()
    found = compute_eva(
        policy, NAMES, batches(policy, reach_demonstrations), None, max_batches=6, rank=RANK, keep_moments=True
    )
    adapter = attach_adapter(policy, "eva", rank=RANK, eva=found)
    assert adapter.model is not None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.network.named_parameters():
            if "lora_A" in name:
                parameter.copy_(torch.linalg.qr(torch.randn(parameter.shape, generator=generator).T)[0].T)
            elif "lora_B" in name:
                parameter[:, :used] = torch.randn(parameter.shape[0], used, generator=generator) * 0.3
        before = policy.network(next(batches(policy, reach_demonstrations)))
    done = refresh_directions(adapter.model, found, 1.0, "2.5")
    assert set(done.reinitialised) == set(NAMES)
    gains = [start.gain for start in measure_start(adapter.model, found.moments).values()]
    assert gains == pytest.approx([2.5] * len(NAMES), rel=1e-3)
    with torch.no_grad():
        after = policy.network(next(batches(policy, reach_demonstrations)))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_each_layer_is_compared_with_as_many_directions_as_it_has(reach_demonstrations: Trajectories) -> None:
    """Where EVA gave layers different ranks, a small one was compared with the largest one's number of directions: it
    lay in them however far it was from the first of them."""
    policy = make_policy()
    found = look(policy, reach_demonstrations)
    adapter = attach_adapter(policy, "lora", rank=1)
    assert adapter.model is not None
    with torch.no_grad():
        for name in NAMES:
            policy.network.get_submodule(name).lora_A["default"].weight.copy_(found.layers[name].components[-1:])
    done = refresh_directions(adapter.model, found, threshold=0.5)
    assert max(done.overlaps.values()) == pytest.approx(0, abs=1e-6)
    assert set(done.reinitialised) == set(NAMES)
