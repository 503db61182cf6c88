"""What a Decision Transformer remembers while it acts in a batch of environments."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from eva_rl.agents.decision_transformer import DecisionTransformer
from eva_rl.agents.transformer import LayerCache, causal_mask
from eva_rl.batch import InputScaling, WindowBatch

Window = Literal["cached", "full"]


class RolloutContext:
    """The last T env steps of n environments, and the keys and values of their tokens.

    ``window="full"`` shows the network the last T steps at every step. ``window="cached"`` keeps keys and values of a
    context that grows from T / 2 to T steps and is then rebuilt from the last T / 2: every action is the network's own
    on a window of legitimate length (it was trained on all lengths from 1 to T), at the cost of about one env step's
    tokens instead of T.

    Args:
        network: The Decision Transformer.
        scaling: How raw numbers become what the network sees.
        target_returns: (n,), return to ask for, unscaled, per environment.
        window: ``cached`` or ``full``.
    """

    def __init__(
        self,
        network: DecisionTransformer,
        scaling: InputScaling,
        target_returns: Tensor,
        window: Window = "cached",
    ) -> None:
        config = network.config
        self._network, self._scaling, self._window = network, scaling, window
        self._targets = (target_returns / scaling.return_scale).unsqueeze(-1)  # (n, 1)
        n, T = len(target_returns), config.context_length
        zeros = target_returns.new_zeros
        self._observations = zeros(n, T, config.observation_dim)
        self._actions = zeros(n, T, config.action_dim)
        self._returns_to_go = zeros(n, T, 1)
        self._rewards = zeros(n, T, 1)
        self._timesteps = zeros(n, T, dtype=torch.long)
        self._real = zeros(n, T, dtype=torch.bool)
        self._caches: list[LayerCache] = []
        self._cached_steps = 0
        self._cached_real = zeros(n, T * config.tokens_per_step, dtype=torch.bool)

    def features(self, observations: Tensor, rewards: Tensor, starts: Tensor) -> Tensor:
        """Take in one env step and return the hidden state that its action is read from.

        Args:
            observations: (n, obs), raw.
            rewards: (n,), raw rewards of the previous env step; ignored where an episode starts.
            starts: (n,), True where this is the first observation of an episode.

        Returns:
            (n, D).
        """
        self._append(observations, rewards, starts)
        if self._window == "full":
            return self._network.features(self._last(self._real.shape[1]))[:, -1]
        full = self._cached_steps == self._network.config.context_length
        if full or self._cached_steps == 0 or bool(starts.all()):
            return self._rebuild(1 if bool(starts.all()) else max(1, self._real.shape[1] // 2))
        return self._extend(starts)

    def acted(self, actions: Tensor) -> None:
        """Record the scaled actions (n, act) taken on the last features."""
        self._actions[:, -1] = actions

    def _append(self, observations: Tensor, rewards: Tensor, starts: Tensor) -> None:
        first, scaling = starts.unsqueeze(-1), self._scaling
        scaled_rewards = rewards.unsqueeze(-1) / scaling.return_scale
        self._rewards[:, -1] = scaled_rewards
        to_go = torch.where(first, self._targets, self._returns_to_go[:, -1] - scaled_rewards)
        timesteps = torch.where(starts, 0, self._timesteps[:, -1] + 1)
        self._observations = _shift(self._observations, scaling.observations(observations))
        self._actions = _shift(self._actions, torch.zeros_like(self._actions[:, -1]))
        self._returns_to_go = _shift(self._returns_to_go, to_go)
        self._rewards = _shift(self._rewards, torch.zeros_like(scaled_rewards))
        self._timesteps = _shift(self._timesteps, timesteps)
        self._real = _shift(self._real & ~first, torch.ones_like(starts))

    def _last(self, num_steps: int) -> WindowBatch:
        real = self._real[:, -num_steps:]
        return WindowBatch(
            observations=self._observations[:, -num_steps:],
            actions=self._actions[:, -num_steps:],
            returns_to_go=self._returns_to_go[:, -num_steps:],
            timesteps=self._timesteps[:, -num_steps:],
            attention_mask=None if bool(real.all()) else real,
            rewards=self._rewards[:, -num_steps:],
        )

    def _rebuild(self, num_steps: int) -> Tensor:
        config = self._network.config
        self._caches = self._caches or self._network.new_caches(len(self._real), config.context_length)
        for cache in self._caches:
            cache.length = 0
        features = self._network.features(self._last(num_steps), self._caches)
        tokens = self._caches[0].length
        real = self._real[:, -num_steps:].repeat_interleave(config.tokens_per_step, dim=1)
        self._cached_real[:, :tokens] = real[:, :tokens]
        self._cached_steps = num_steps
        return features[:, -1]

    def _extend(self, starts: Tensor) -> Tensor:
        """Add the rest of the previous env step and the read-out part of this one."""
        config = self._network.config
        rest = config.tokens_per_step - config.tokens_before_action
        tokens = self._network.embed(self._last(2))[:, config.tokens_before_action : -rest]
        length, new = self._caches[0].length, tokens.shape[1]
        total = length + new
        self._cached_real[:, length : length + rest] = True
        self._cached_real[:, : length + rest] &= ~starts.unsqueeze(-1)
        self._cached_real[:, length + rest : total] = True
        mask = self._cached_real[:, None, None, :total].expand(-1, 1, new, total).clone()
        mask[..., length:] &= causal_mask(new, tokens.device)
        mask[..., length:] |= torch.eye(new, dtype=torch.bool, device=tokens.device)
        features = self._network.encode(tokens, mask, slice(new - 1, new), self._caches)
        self._cached_steps += 1
        return features[:, -1]


def _shift(buffer: Tensor, newest: Tensor) -> Tensor:
    return torch.cat([buffer[:, 1:], newest.unsqueeze(1)], dim=1)
