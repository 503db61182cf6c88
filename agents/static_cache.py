"""One env step of a Decision Transformer with tensors whose shapes and places never change, for CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from eva_rl.agents.decision_transformer import DecisionTransformer
from eva_rl.batch import WindowBatch

Step = Callable[..., Tensor]


@dataclass
class StaticLayerCache:
    """All keys and values (B, H, S, D / H) of one layer; new ones go to ``positions`` (M,)."""

    keys: Tensor
    values: Tensor
    positions: Tensor

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, H, M, D / H) and return the whole memory."""
        self.keys.index_copy_(2, self.positions, keys.to(self.keys.dtype))
        self.values.index_copy_(2, self.positions, values.to(self.values.dtype))
        return self.keys, self.values


class StaticMemory:
    """Keys and values of n environments, and the inputs of their steps, in tensors made once.

    Slot s holds token s of the context, counted from the end of the env step before it: a chunk of whole steps, from
    the action of one env step to the read-out token of a later one, then always fills the slots of as many steps.

    Args:
        network: Its config decides the shapes.
        num_envs: n.
    """

    def __init__(self, network: DecisionTransformer, num_envs: int) -> None:
        config, weight = network.config, network.embed_norm.weight
        self.num_envs, self.device = num_envs, weight.device
        caches = network.new_caches(num_envs, config.context_length)
        self.keys, self.values = [c.keys for c in caches], [c.values for c in caches]
        self.visible = torch.zeros((), dtype=torch.long, device=weight.device)
        self.timesteps = torch.zeros(num_envs, dtype=torch.long, device=weight.device)
        self._inputs: dict[int, Tensor] = {}
        for tensor in (*self.keys, *self.values, self.visible, self.timesteps):
            torch._dynamo.mark_static_address(tensor)  # CUDA graphs then change it in place instead of copying it

    def fits(self, network: DecisionTransformer, num_envs: int) -> bool:
        """Whether the memory can serve this network again."""
        made = network.new_caches(0, network.config.context_length)
        same = len(made) == len(self.keys) and made[0].keys.shape[1:] == self.keys[0].shape[1:]
        return same and num_envs == self.num_envs and network.embed_norm.weight.device == self.device

    def forget(self) -> StaticMemory:
        """The memory itself, empty: what was not finite would pass through a mask."""
        for tensor in (*self.keys, *self.values):
            tensor.zero_()
        return self

    def inputs(self, steps: Tensor) -> Tensor:
        """Copy env steps (n, m, numbers) to where they always lie."""
        kept = self._inputs.get(steps.shape[1])
        if kept is None:
            kept = self._inputs[steps.shape[1]] = torch.empty_like(steps, memory_format=torch.contiguous_format)
            torch._dynamo.mark_static_address(kept)
        return kept.copy_(steps)


def static_step(
    network: DecisionTransformer,
    steps: Tensor,
    widths: tuple[int, ...],
    keys: list[Tensor],
    values: list[Tensor],
    visible: Tensor,
    timesteps: Tensor,
) -> Tensor:
    """Add m env steps to the context and return the hidden state (n, D) that the last one's action is read from.

    Args:
        network: The Decision Transformer.
        steps: (n, m + 1, numbers), the env step before them and the m new ones.
        widths: How many of the numbers are observations, actions, returns-to-go and rewards.
        keys: (n, H, S, D / H) of each layer; changed.
        values: The same for values.
        visible: (), env steps in the context, the new ones included; those of them that precede the context go where
            later ones will overwrite them, unseen.
        timesteps: (n,), of the newest env step in its episode.
    """
    config, m = network.config, steps.shape[1] - 1
    per_step, rest = config.tokens_per_step, config.tokens_per_step - config.tokens_before_action
    observations, actions, returns_to_go, rewards = torch.split(steps, list(widths), dim=-1)
    ages = torch.arange(m, -1, -1, device=steps.device)
    times = (timesteps.unsqueeze(-1) - ages).clamp(min=0)  # (n, m + 1)
    batch = WindowBatch(observations, actions, returns_to_go, times, rewards=rewards)
    tokens = network.embed(batch)[:, config.tokens_before_action : -rest]  # (n, m * tokens, D)
    slots = torch.arange(keys[0].shape[2], device=steps.device)  # (S,)
    positions = ((visible - m) * per_step + slots[: m * per_step]) % len(slots)
    of_step = torch.div(slots - rest, per_step, rounding_mode="floor")
    real = (of_step >= 0) & (visible - 1 - of_step <= timesteps.unsqueeze(-1))  # (n, S)
    queries = positions.unsqueeze(-1)
    mask = ((slots <= queries) & real[:, None, None]) | (slots == queries)  # (n, 1, m * tokens, S)
    caches = [StaticLayerCache(k, v, positions) for k, v in zip(keys, values, strict=True)]
    return network.encode(tokens, mask, slice(m * per_step - 1, None), caches)[:, -1]


@cache
def compiled_step(mode: str) -> Step:
    """:func:`static_step` under torch.compile: ``default``, or ``reduce-overhead`` for CUDA graphs."""
    step: Step = torch.compile(static_step, mode=None if mode == "default" else mode, dynamic=False)
    return step
