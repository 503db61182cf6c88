"""A snapshot acts in the policy's place, and leaves it as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.training.optimizer import trainable_parameters
from eva_rl.training.self_imitation.snapshot import acting_as, load_snapshot, save_snapshot
from tests.training.problems import make_learner


def first_actions(policy: DecisionTransformerPolicy) -> np.ndarray:
    policy.network.eval()
    policy.reset(["reach"] * 3)
    seen = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    return policy.act(seen, np.zeros(3, np.float32), np.ones(3, bool))


def test_it_acts_and_leaves_the_policy_as_it_was(tmp_path: Path) -> None:
    policy, path = make_learner(), tmp_path / "snapshot.safetensors"
    for parameter in policy.network.embed_state.parameters():
        parameter.requires_grad_(False)
    earlier = first_actions(policy)
    save_snapshot(policy.network, path)
    snapshot = load_snapshot(path)
    assert snapshot is not None
    assert snapshot.keys() == trainable_parameters(policy.network).keys()
    assert not any(name.startswith("embed_state") for name in snapshot)
    with torch.no_grad():
        for parameter in trainable_parameters(policy.network).values():
            parameter.add_(0.1)
    own, later = {n: p.clone() for n, p in policy.network.named_parameters()}, first_actions(policy)
    assert np.abs(later - earlier).max() > 0.01
    with acting_as(policy.network, snapshot):
        np.testing.assert_array_equal(first_actions(policy), earlier)
    np.testing.assert_array_equal(first_actions(policy), later)
    with pytest.raises(RuntimeError), acting_as(policy.network, snapshot):
        raise RuntimeError
    assert all(torch.equal(p, own[n]) for n, p in policy.network.named_parameters())


def test_there_may_be_none(tmp_path: Path) -> None:
    assert load_snapshot(tmp_path / "snapshot.safetensors") is None
