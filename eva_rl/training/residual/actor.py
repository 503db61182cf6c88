"""A small actor on what the frozen policy computes, and the policy that both make together."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.batch import WindowBatch
from eva_rl.training.residual.embeddings import StateActionEncoder


def frozen_copy(policy: DecisionTransformerPolicy) -> DecisionTransformerPolicy:
    """The policy as it is now, with a network and histories of its own, none of which is trained."""
    kept = copy.copy(policy)
    kept.network = copy.deepcopy(policy.network).requires_grad_(False)
    kept.forget_histories()
    return kept


class ResidualActor(nn.Module):
    """What to add to the action that the frozen policy proposes; nothing at first.

    Args:
        observation_dim: Numbers in one (scaled) observation.
        action_dim: Numbers in one (scaled) action.
        feature_dim: Width of the frozen policy's hidden states; 0 leaves them out.
        hidden_size: Width of the two hidden layers.
        scale: Largest magnitude of what is added, to actions in [-1, 1].
        encoder: Whose embeddings of the observations it sees, too; not trained here.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        feature_dim: int = 0,
        hidden_size: int = 256,
        scale: float = 0.3,
        encoder: StateActionEncoder | None = None,
    ) -> None:
        super().__init__()
        self.scale, self.feature_dim, self.encoder = scale, feature_dim, encoder
        embedding_dim = 0 if encoder is None else encoder.size
        self.feature_norm = nn.LayerNorm(feature_dim) if feature_dim else None
        self.trunk = nn.Sequential(
            nn.Linear(observation_dim + action_dim + feature_dim + embedding_dim, hidden_size),
            nn.LayerNorm(hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.LayerNorm(hidden_size),
            nn.ReLU(),
        )
        self.head = nn.Linear(hidden_size, action_dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, observations: Tensor, proposals: Tensor, features: Tensor, embeddings: Tensor | None = None
    ) -> Tensor:
        """Residuals (B, act) in [-1, 1], before they are scaled.

        Args:
            observations: (B, obs), scaled.
            proposals: (B, act), the frozen policy's scaled actions.
            features: (B, D), the hidden states that these were read from.
            embeddings: (B, E), the observations'; None computes them where there is an encoder.
        """
        parts = [observations, proposals]
        if self.feature_norm is not None:
            parts.append(self.feature_norm(features))
        if self.encoder is not None:
            parts.append(self.encoder.observations(observations) if embeddings is None else embeddings)
        residual: Tensor = torch.tanh(self.head(self.trunk(torch.cat(parts, -1))))
        return residual

    def actions(
        self, observations: Tensor, proposals: Tensor, features: Tensor, embeddings: Tensor | None = None
    ) -> Tensor:
        """Scaled actions (B, act): the proposals with the residuals added, within the bounds."""
        return self.added(proposals, self(observations, proposals, features, embeddings))

    def added(self, proposals: Tensor, residuals: Tensor) -> Tensor:
        """Scaled actions (B, act) of proposals and residuals."""
        clamped: Tensor = _Clamp.apply(proposals + self.scale * residuals)  # type: ignore[no-untyped-call]
        return clamped


class _Clamp(torch.autograd.Function):
    """Clamp to [-1, 1]; what lies outside has the gradient that leads back.

    Policies of locomotion often act at the bounds, where nothing would bring a residual back that is once outside
    (as the inverting gradients of Hausknecht and Stone 2016, arXiv 1511.04143).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        outwards = ((x > 1) & (gradient < 0)) | ((x < -1) & (gradient > 0))
        return gradient.masked_fill(outwards, 0)


class ResidualPolicy:
    """Acts as the frozen policy proposes with the actor's residuals added, one pass of the Transformer an env step.

    Args:
        base: Proposes; its histories hold the actions that were executed.
        actor: Adds.
    """

    def __init__(self, base: DecisionTransformerPolicy, actor: ResidualActor) -> None:
        self.base, self.actor = base, actor

    @property
    def observation_dim(self) -> int:
        """Numbers in one observation."""
        return self.base.observation_dim

    @property
    def action_dim(self) -> int:
        """Numbers in one action."""
        return self.base.action_dim

    def with_own_history(self) -> Self:
        """This policy with histories of its own, to act for a second group of environments."""
        second = copy.copy(self)
        second.base = self.base.with_own_history()
        return second

    def actions_in(self, batch: WindowBatch) -> Tensor:
        """What it would do in each env step of scaled windows, (B, T, act), given what lies before it there."""
        with torch.no_grad():
            return self._added_to(self.base.network.features(batch), batch.observations)

    def _added_to(self, features: Tensor, observations: Tensor) -> Tensor:
        proposals = self.base.network.actions(features).clamp(-1, 1)
        return self.actor.actions(observations, proposals, features)

    def reset(self, env_ids: Sequence[str]) -> None:
        """Forget all histories and prepare for one environment per name."""
        self.base.reset(env_ids)

    def act(
        self, observations: NDArray[np.float32], rewards: NDArray[np.float32], episode_starts: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """Choose the deterministic action of each environment; see :meth:`eva_rl.agents.policy.Policy.act`."""
        base = self.base
        scaled = base.scaling.observations(torch.from_numpy(observations).to(base.device))
        return base.act_by(partial(self._added_to, observations=scaled), observations, rewards, episode_starts)
