"""Critics on single env steps, and their temporal differences (Fujimoto et al. 2018, arXiv 1802.09477)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

OUTGROWN = 4.0
"""Rewards get another scale once what it was found by is so many times as large."""


class CriticEnsemble(nn.Module):
    """E action values, each an MLP with layer normalisation, computed together: one batched product a layer.

    They take one env step, not the history, so that the actor's gradient does not depend on returns-to-go
    (arXiv 2410.24108, section 4).

    Args:
        observation_dim: Numbers in one (scaled) observation.
        action_dim: Numbers in one (scaled) action.
        hidden_size: Width of the two hidden layers.
        size: E.
    """

    def __init__(self, observation_dim: int, action_dim: int, hidden_size: int = 256, size: int = 5) -> None:
        super().__init__()
        self.size = size
        self.layers = nn.ModuleList(
            [
                _EnsembleLayer(size, observation_dim + action_dim, hidden_size),
                _EnsembleLayer(size, hidden_size, hidden_size),
            ]
        )
        self.head = _EnsembleLinear(size, hidden_size, 1)

    def forward(self, observations: Tensor, actions: Tensor, members: Tensor | None = None) -> Tensor:
        """Values (E, ...) of observations (..., obs) and actions (..., act), or (M, ...) of some members (M,)."""
        inputs, number = torch.cat([observations, actions], -1), self.size if members is None else len(members)
        x = inputs.flatten(0, -2).expand(number, -1, -1)
        for layer in self.layers:
            x = layer(x, members)
        values: Tensor = self.head(x, members).view(number, *inputs.shape[:-1])
        return values

    def min_of(self, observations: Tensor, actions: Tensor, members: Tensor) -> Tensor:
        """The smallest value (...,) among some members (M,): clipped double Q-learning."""
        values: Tensor = self(observations, actions, members)
        return values.amin(0)


def random_pair(size: int, generator: torch.Generator) -> Tensor:
    """Two members (2,) of an ensemble, for one gradient step (REDQ, Chen et al. 2021, arXiv 2101.05982)."""
    return torch.randperm(size, generator=generator)[:2]


def fitting_scale(
    scale: float, found: float, critics: CriticEnsemble, target: CriticEnsemble, optimizer: torch.optim.Adam
) -> float:
    """What rewards are divided by from here on; where that changes, values in units of reward stay as they are.

    The last layers are multiplied (PopArt, van Hasselt et al. 2016, arXiv 1602.07714), and Adam's moments, as if the
    gradients had been of the new scale from the start.

    Args:
        scale: So far; 0 where no reward was paid.
        found: By the rewards that are kept now.
        critics: Trained by ``optimizer``; changed in place.
        target: What follows them.
        optimizer: Of ``critics``.

    Returns:
        ``scale``, or ``found`` where that is :data:`OUTGROWN` times as large, or the first.
    """
    if scale and found <= OUTGROWN * scale:
        return scale
    if scale:
        _multiply_values(scale / found, critics, target, optimizer)
    return found


def _multiply_values(
    factor: float, critics: CriticEnsemble, target: CriticEnsemble, optimizer: torch.optim.Adam
) -> None:
    last = set(critics.head.parameters())
    with torch.no_grad():
        for parameter in [*last, *target.head.parameters()]:
            parameter.mul_(factor)
        for parameter in critics.parameters():
            moments = optimizer.state.get(parameter, {})
            gradients = factor if parameter in last else factor**2
            for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
                if name in moments:
                    moments[name].mul_(gradients**power)


class _EnsembleLinear(nn.Module):
    """E linear layers, begun as PyTorch begins one."""

    def __init__(self, size: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(size, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(size, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor, members: Tensor | None) -> Tensor:
        """(M, B, outputs) of (M, B, inputs)."""
        if members is None:
            return torch.baddbmm(self.bias, x, self.weight)
        return torch.baddbmm(self.bias[members], x, self.weight[members])


class _EnsembleLayer(nn.Module):
    """E times a linear layer, layer normalisation and ReLU."""

    def __init__(self, size: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = _EnsembleLinear(size, inputs, outputs)
        self.scale = nn.Parameter(torch.ones(size, 1, outputs))
        self.shift = nn.Parameter(torch.zeros(size, 1, outputs))

    def forward(self, x: Tensor, members: Tensor | None) -> Tensor:
        """(M, B, outputs) of (M, B, inputs)."""
        y = self.linear(x, members)
        scale, shift = (self.scale, self.shift) if members is None else (self.scale[members], self.shift[members])
        return torch.relu(torch.addcmul(shift, F.layer_norm(y, y.shape[-1:]), scale))


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
    pairs = [(s, f) for s, f in zip(target.parameters(), source.parameters(), strict=True) if f.requires_grad]
    with torch.no_grad():
        torch._foreach_lerp_([slow for slow, _ in pairs], [fast for _, fast in pairs], tau)
