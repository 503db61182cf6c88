"""Twin critics on single env steps, and their temporal differences (Fujimoto et al. 2018, arXiv 1802.09477)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TwinCritics(nn.Module):
    """Two action values of an observation and an action, each a plain MLP with layer normalisation.

    They take one env step, not the history, so that the actor's gradient does not depend on returns-to-go
    (arXiv 2410.24108, section 4).

    Args:
        observation_dim: Numbers in one (scaled) observation.
        action_dim: Numbers in one (scaled) action.
        hidden_size: Width of the two hidden layers.
    """

    def __init__(self, observation_dim: int, action_dim: int, hidden_size: int = 256) -> None:
        super().__init__()
        self.q1 = _mlp(observation_dim + action_dim, hidden_size)
        self.q2 = _mlp(observation_dim + action_dim, hidden_size)

    def forward(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Both values (...,) of observations (..., obs) and actions (..., act)."""
        x = torch.cat([observations, actions], -1)
        return self.q1(x).squeeze(-1), self.q2(x).squeeze(-1)

    def q1_forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The first critic's value (...,), which the actor maximises."""
        out: Tensor = self.q1(torch.cat([observations, actions], -1)).squeeze(-1)
        return out

    def min_q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The smaller of both values (...,): clipped double Q-learning."""
        return torch.minimum(*self(observations, actions))


def td_targets(rewards: Tensor, terminated: Tensor, next_values: Tensor, discount: float) -> Tensor:
    """TD targets: bootstrap through truncations, not through terminations.

    Args:
        rewards: (...,).
        terminated: (...,), True where the environment ended the episode, False where a time limit did.
        next_values: (...,), value of the next observation.
        discount: gamma.
    """
    return rewards + discount * next_values * (~terminated).to(next_values.dtype)


def polyak_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Soft update of a target network's parameters: ``target += tau * (source - target)``."""
    with torch.no_grad():
        for slow, fast in zip(target.parameters(), source.parameters(), strict=True):
            if fast.requires_grad:
                slow.lerp_(fast.data, tau)


def _mlp(inputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.LayerNorm(hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.LayerNorm(hidden),
        nn.ReLU(),
        nn.Linear(hidden, 1),
    )
