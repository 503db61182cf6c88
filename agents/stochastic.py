"""Tanh-Gaussian actions around a Decision Transformer's own (Haarnoja et al. 2018, arXiv 1801.01290, appendix C)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from eva_rl.agents.decision_transformer import LOG_STD_RANGE, DecisionTransformer
from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.errors import UserError

ACTION_LIMIT = 1 - 1e-6
"""Largest magnitude of an executed action whose likelihood is asked for: the inverse of tanh ends at 1."""


def make_stochastic(policy: DecisionTransformerPolicy, std: float) -> bool:
    """Give a deterministic policy a log-standard-deviation head, in place; one that has it stays as it is.

    Args:
        policy: Without an adapter; its deterministic actions do not change.
        std: Standard deviation, before the tanh, in every state at first.

    Returns:
        Whether it was given one.

    Raises:
        UserError: The policy's actions do not pass through a tanh, or ``std`` is out of range.
    """
    network = policy.network
    if network.config.stochastic:
        return False
    low, high = LOG_STD_RANGE
    if not math.exp(low) < std < math.exp(high):
        raise UserError(
            f"algo.initial_std={std}: expected a number between {math.exp(low):.3g} and {math.exp(high):.3g}."
        )
    if not network.config.action_tanh:
        raise UserError(
            "This policy's actions do not pass through a tanh, so that no tanh-Gaussian fits them. Use algo=odt_td3, "
            "which keeps the policy deterministic, or algo=bc."
        )
    config = replace(network.config, stochastic=True)
    head = nn.Linear(config.hidden_size, config.action_dim)
    nn.init.zeros_(head.weight)
    share = (math.log(std) - low) / (high - low)
    nn.init.constant_(head.bias, math.atanh(2 * share - 1))
    weights = network.state_dict() | {f"log_std_head.{name}": value for name, value in head.state_dict().items()}
    policy.network = DecisionTransformer.with_weights(config, weights).to(policy.device)
    return True


def make_deterministic(policy: DecisionTransformerPolicy) -> None:
    """Take the log-standard-deviation head from a policy, in place; its deterministic actions do not change."""
    policy.network.log_std_head = None
    policy.network.config = replace(policy.network.config, stochastic=False)


def gaussian_log_prob(actions: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of actions whose inverse tanh is Gaussian.

    Args:
        actions: (..., act) in [-1, 1].
        mean: (..., act), before the tanh.
        log_std: (..., act), before the tanh.

    Returns:
        (...,), summed over the dimensions of the action.
    """
    return raw_log_prob(torch.atanh(actions.clamp(-ACTION_LIMIT, ACTION_LIMIT)), mean, log_std)


def raw_log_prob(raw: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """As :func:`gaussian_log_prob`, of actions before their tanh, (..., act), however far from zero."""
    gaussian = -0.5 * ((raw - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    log_slope = 2 * (math.log(2) - raw - F.softplus(-2 * raw))  # of tanh: log(1 - tanh^2)
    return (gaussian - log_slope).sum(-1)


def sample_actions(mean: Tensor, log_std: Tensor, generator: torch.Generator) -> Tensor:
    """Draw actions (..., act) in (-1, 1); differentiable in mean and log standard deviation."""
    return torch.tanh(sample_raw(mean, log_std, generator))


def sample_raw(mean: Tensor, log_std: Tensor, generator: torch.Generator) -> Tensor:
    """As :func:`sample_actions`, before the tanh."""
    noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)
    return mean + log_std.exp() * noise
