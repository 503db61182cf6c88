"""A pre-norm causal Transformer with separate projections and a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from eva_rl.agents.linear import Linear

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Cache(Protocol):
    """What attention keeps of earlier tokens, in one layer."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, H, M, D / H) and return all that can be looked at."""


@dataclass
class LayerCache:
    """Keys and values of one layer, (B, H, S, D / H) each, of which the first ``length`` tokens are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, H, M, D / H) and return all stored so far."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Multi-head attention with projections that can each carry an adapter."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj = Linear(hidden_size, hidden_size)
        self.k_proj = Linear(hidden_size, hidden_size)
        self.v_proj = Linear(hidden_size, hidden_size)
        self.o_proj = Linear(hidden_size, hidden_size)

    def forward(
        self, x: Tensor, mask: Tensor | None, queries: slice = slice(None), cache: Cache | None = None
    ) -> Tensor:
        """Attend from the tokens ``x[:, queries]`` to all of ``x`` and to the cache.

        Args:
            x: (B, S, D).
            mask: (B or 1, 1, queries, keys), True where a query may look; None says causal.
            queries: Which tokens ask.
            cache: Keys and values of earlier tokens; the new ones are added.

        Returns:
            (B, queries, D).
        """
        q, k, v = (self._split(projected) for projected in self.project(x, queries))
        if cache is not None:
            k, v = cache.append(k, v)
        heads = self._attend(q, k, v, mask)
        out: Tensor = self.o_proj(heads.transpose(1, 2).flatten(2))
        return out

    def project(self, x: Tensor, queries: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of ``x[:, queries]``, keys and values of all of ``x`` (B, S, D), each (B, tokens, D)."""
        return self.q_proj(x[:, queries]), self.k_proj(x), self.v_proj(x)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if q.device.type == "cpu" and q.dtype is torch.bfloat16:
            # PyTorch's CPU attention runs its bfloat16 backward about six times slower than float32.
            with torch.autocast("cpu", enabled=False):
                return self._attend(q.float(), k.float(), v.float(), mask)
        with _kernels(q, mask):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)

    def _split(self, x: Tensor) -> Tensor:
        B, S, D = x.shape
        return x.view(B, S, self.num_heads, D // self.num_heads).transpose(1, 2)  # (B, H, S, D / H)


def _kernels(q: Tensor, mask: Tensor | None) -> AbstractContextManager[None]:
    """Which attention kernels may run: cuDNN's not with a mask, whose rows it reads as if they were aligned.

    Its backward pass ends in "misaligned address" where the number of keys is no multiple of 8 (PyTorch 2.11, cuDNN 9,
    H100, bfloat16). PyTorch's other kernels pad the mask.
    """
    if q.is_cuda and mask is not None:
        return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    return nullcontext()


class MLP(nn.Module):
    """Two projections around an activation."""

    def __init__(self, hidden_size: int, inner_size: int, activation: str) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, inner_size)
        self.down_proj = Linear(inner_size, hidden_size)
        self._activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        out: Tensor = self.down_proj(self._activation(self.up_proj(x)))
        return out


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a residual path (GPT-2's order)."""

    def __init__(self, hidden_size: int, num_heads: int, inner_size: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.attention = Attention(hidden_size, num_heads, dropout)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.mlp = MLP(hidden_size, inner_size, activation)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None, queries: slice = slice(None), cache: Cache | None = None
    ) -> Tensor:
        """Return the tokens ``x[:, queries]`` after this block; the others only serve as keys and values."""
        attended = self.attention(self.attention_norm(x), mask, queries, cache)
        x = x[:, queries] + self.dropout(attended)
        out: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return out


def causal_mask(num_tokens: int, device: torch.device) -> Tensor:
    """(S, S), True where the key is not after the query."""
    return torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()
