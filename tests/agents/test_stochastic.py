"""Tanh-Gaussian actions, held against PyTorch's own distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from eva_rl.agents.stochastic import (
    gaussian_log_prob,
    make_stochastic,
    raw_log_prob,
    sample_actions,
    sample_raw,
)
from eva_rl.errors import UserError
from tests.conftest import make_policy


def test_log_probability_is_that_of_the_transformed_gaussian() -> None:
    torch.manual_seed(0)
    mean, log_std = torch.randn(50, 3, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64) * 0.5
    reference = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), TanhTransform())  # type: ignore[no-untyped-call]
    actions = reference.sample()
    expected = reference.log_prob(actions)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(gaussian_log_prob(actions, mean, log_std), expected)
    without_tanh = Independent(Normal(mean, log_std.exp()), 1).log_prob(torch.atanh(actions))  # type: ignore[no-untyped-call]
    assert not torch.allclose(expected, without_tanh)


def test_saturated_actions_have_a_finite_likelihood() -> None:
    edge = torch.tensor([[1.0, -1.0]])
    assert torch.isfinite(gaussian_log_prob(edge, torch.zeros(1, 2), torch.zeros(1, 2))).all()


@pytest.mark.parametrize("place", [0.0, 3.0, 9.0, -40.0])
def test_the_entropy_has_its_own_gradient_however_far_out(place: float) -> None:
    """That of log(1 - tanh^2) in the mean is -2 tanh, and the Gaussian's entropy does not depend on the mean."""
    mean = torch.tensor([[place]], requires_grad=True)
    log_std, generator = torch.full((1, 1), -3.0), torch.Generator().manual_seed(0)
    raw = sample_raw(mean, log_std, generator)
    (-raw_log_prob(raw, mean, log_std)).sum().backward()
    assert mean.grad is not None
    torch.testing.assert_close(mean.grad, -2 * torch.tanh(raw.detach()))


def test_draws_have_the_asked_mean_and_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, log_std = torch.full((20_000, 1), 0.3), torch.full((20_000, 1), math.log(0.5))
    raw = torch.atanh(sample_actions(mean, log_std, generator))
    assert abs(raw.mean().item() - 0.3) < 0.02
    assert abs(raw.std().item() - 0.5) < 0.02


def test_a_policy_made_stochastic_acts_as_before() -> None:
    policy, same = make_policy(), make_policy()
    make_stochastic(policy, 0.2)
    features = torch.randn(4, 32)
    torch.testing.assert_close(policy.network.actions(features), same.network.actions(features), rtol=0, atol=0)
    _, log_std = policy.network.distribution(features)
    torch.testing.assert_close(log_std.exp(), torch.full((4, 4), 0.2))
    network = policy.network
    make_stochastic(policy, 0.5)
    assert policy.network is network


def test_unfit_deviations_and_policies_are_refused() -> None:
    with pytest.raises(UserError, match="initial_std=20"):
        make_stochastic(make_policy(), 20.0)
    with pytest.raises(UserError, match="odt_td3"):
        make_stochastic(make_policy(action_tanh=False), 0.2)
