"""Embeddings of observations and actions, learned by predicting what follows (SALE).

Fujimoto et al. 2023, arXiv 2306.02451, section 4: critics and actors that see them, too, learn from fewer env steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

EMBEDDINGS = "embeddings"
"""Name of what is computed of a batch's observations."""


class StateActionEncoder(nn.Module):
    """Embeddings of observations, and of observations with an action: the latter predict the next observation's.

    Args:
        observation_dim: Numbers in one (scaled) observation.
        action_dim: Numbers in one (scaled) action.
        size: E, of an embedding, and of the two hidden layers.
    """

    def __init__(self, observation_dim: int, action_dim: int, size: int = 256) -> None:
        super().__init__()
        self.size = size
        self.of_observations, self.of_pairs = _mlp(observation_dim, size), _mlp(size + action_dim, size)

    def observations(self, observations: Tensor) -> Tensor:
        """Embeddings (..., E) of observations (..., obs), whose mean magnitude is 1 (AvgL1Norm of the paper)."""
        embeddings: Tensor = self.of_observations(observations)
        return embeddings / embeddings.abs().mean(-1, keepdim=True).clamp(min=1e-8)

    def pairs(self, embeddings: Tensor, actions: Tensor) -> Tensor:
        """Embeddings (..., E) of embedded observations (..., E) with actions (..., act)."""
        found: Tensor = self.of_pairs(torch.cat([embeddings, actions], -1))
        return found

    def seen_by_critics(self, observations: Tensor, embeddings: Tensor, actions: Tensor) -> Tensor:
        """Observations (..., obs) with their embeddings and those of the pairs, (..., obs + 2 E)."""
        return torch.cat([observations, embeddings, self.pairs(embeddings, actions)], -1)

    def loss(self, observations: Tensor, actions: Tensor, next_observations: Tensor) -> Tensor:
        """Mean squared error of the predicted embeddings, (); equation 2 of the paper.

        Args:
            observations: (B, obs).
            actions: (B, act), as executed.
            next_observations: (B, obs), one env step later.
        """
        with torch.no_grad():
            following = self.observations(next_observations)
        return (self.pairs(self.observations(observations), actions) - following).square().mean()


def _mlp(inputs: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, size), nn.ELU(), nn.Linear(size, size), nn.ELU(), nn.Linear(size, size))
