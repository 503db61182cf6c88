"""The steps of a Decision Transformer while it acts on a CPU: plain tensors, caches made once, no module calls.

The numbers are those of :class:`eva_rl.agents.decision_transformer.DecisionTransformer`, but that queries, keys and
values come from one product. A layer that carries an adapter is folded into one matrix, in a copy: an adapter costs
nothing while a policy acts, and the network stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from eva_rl.agents.decision_transformer import ACTION, RETURN, REWARD, STATE, DecisionTransformer
from eva_rl.agents.linear import Linear, linear
from eva_rl.agents.transformer import ACTIVATIONS, Block

AFFINE_TOLERANCE = 1e-4
"""Largest difference, relative to the outputs, of a layer from the matrix that it is folded into."""

Affine = tuple[Tensor, Tensor | None]
Norm = tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class _Layer:
    """One block's weights: ``qkv`` are those of queries, keys and values, one below the other."""

    attention_norm: Norm
    qkv: Affine
    o_proj: Affine
    mlp_norm: Norm
    up_proj: Affine
    down_proj: Affine


class _NotFoldableError(Exception):
    """A module is more than a matrix, or somebody listens to it."""


class _Watch:
    """Tells whether a network has changed. Asked at every step: five times as fast as a walk over all its modules.

    Args:
        network: As it is now.
    """

    def __init__(self, network: nn.Module) -> None:
        modules: list[Any] = list(network.modules())
        self._children = [(module._modules, list(module._modules.values())) for module in modules if module._modules]
        self._parameters = [module._parameters for module in modules if module._parameters]
        self._adapted = [module for module in modules if hasattr(module, "active_adapters")]
        self._hooks = [own for module in modules for own in (module._forward_hooks, module._forward_pre_hooks)]
        self._alive = list(network.parameters())  # so that no other gets the identity of one of them
        self._seen = self._now()

    def changed(self) -> bool:
        """Whether a parameter, a module, or how an adapter acts is another than at first, or somebody listens."""
        modules = any(list(own.values()) != before for own, before in self._children)
        return modules or any(self._hooks) or self._now() != self._seen

    def _now(self) -> tuple[Any, ...]:
        parameters = [p for own in self._parameters for p in own.values() if p is not None]
        versions = [(id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]
        return versions, _acting(self._adapted)


class CachedDecoder:
    """A network's weights as plain tensors, and the keys and values of n environments.

    Args:
        network: In evaluation mode; its weights are copied where an adapter changes them, else shared.
        num_envs: n.

    Attributes:
        length: Tokens in the cache.
    """

    def __init__(self, network: DecisionTransformer, num_envs: int) -> None:
        config = network.config
        self._config, self._activation = config, ACTIVATIONS[config.activation]
        self._read(network)
        heads, width = config.num_heads, config.hidden_size
        shape = (num_envs, heads, config.context_length * config.tokens_per_step, width // heads)
        weight = self._embed_norm[0]
        self._keys = [weight.new_zeros(shape) for _ in self._layers]
        self._values = [weight.new_zeros(shape) for _ in self._layers]
        self.length = 0

    def refresh(self, network: DecisionTransformer) -> bool:
        """Read the weights again where they have changed, as while a policy learns online; the cache stays.

        An adapter that is switched, turned off, merged or rescaled changes them, too.

        Returns:
            Whether the network's modules are still those that plain tensors can stand for, without hooks.
        """
        if not self._watch.changed():
            return True
        try:
            with torch.no_grad():
                self._read(network)
        except _NotFoldableError:
            return False
        return True

    def _read(self, network: DecisionTransformer) -> None:
        config, self._watch = network.config, _Watch(network)
        self._kinds = {
            kind: _linear(getattr(network, f"embed_{name}"))
            for kind, name in ((RETURN, "return"), (STATE, "state"), (ACTION, "action"), (REWARD, "reward"))
            if kind in config.token_order
        }
        self._times = _embedding(network.embed_timestep)
        self._embed_norm, self._final_norm = _norm(network.embed_norm), _norm(network.final_norm)
        self._layers = [_layer(block) for block in network.blocks]
        self._head = _linear(network.action_head)

    @classmethod
    def of(cls, network: DecisionTransformer, num_envs: int) -> CachedDecoder | None:
        """A decoder for the network; None where a module of it is not a plain or an adapted linear layer."""
        if network.training:
            return None
        try:
            with torch.no_grad():
                return cls(network, num_envs)
        except _NotFoldableError:
            return None

    def actions(self, features: Tensor) -> Tensor:
        """Deterministic actions (n, act) of hidden states (n, D)."""
        raw = linear(features, *self._head)
        return torch.tanh(raw) if self._config.action_tanh else raw

    def embed(self, steps: dict[str, Tensor], timesteps: Tensor) -> Tensor:
        """Tokens of m env steps in time order, (n, m * tokens_per_step, D).

        Args:
            steps: For each kind of token its numbers, (n, m, numbers).
            timesteps: (n, m).
        """
        time = F.embedding(timesteps.clamp(max=self._config.max_timestep - 1), self._times)
        embedded = [linear(steps[kind], *self._kinds[kind]) + time for kind in self._config.token_order]
        n, m = timesteps.shape
        tokens = torch.stack(embedded, dim=2).view(n, m * len(embedded), -1)
        return _normalised(tokens, self._embed_norm)

    def encode(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Add new tokens (n, m, D) to the cache; returns the hidden state (n, D) of the last one.

        Args:
            tokens: Embedded.
            mask: (n or 1, 1, m, length + m), True where a token may look; None says causal, into an empty cache.
        """
        x, last = tokens, len(self._layers) - 1
        end = self.length + tokens.shape[1]
        for index, layer in enumerate(self._layers):
            x = self._block(x, layer, index, end, mask, only_last=index == last)
        self.length = end
        return _normalised(x, self._final_norm)[:, -1]

    def _block(self, x: Tensor, layer: _Layer, index: int, end: int, mask: Tensor | None, only_last: bool) -> Tensor:
        n, m, D = x.shape
        H = self._config.num_heads
        projected = linear(_normalised(x, layer.attention_norm), *layer.qkv).view(n, m, 3, H, D // H)
        q, k, v = projected.permute(2, 0, 3, 1, 4)  # (n, H, m, D / H) each
        keys, values = self._keys[index], self._values[index]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        if only_last:
            q, x, m = q[:, :, -1:], x[:, -1:], 1
            mask = None if mask is None else mask[:, :, -1:]
        heads = F.scaled_dot_product_attention(
            q, keys[:, :, :end], values[:, :, :end], attn_mask=mask, is_causal=mask is None and not only_last
        )
        x = x + linear(heads.transpose(1, 2).reshape(n, m, D), *layer.o_proj)
        hidden = self._activation(linear(_normalised(x, layer.mlp_norm), *layer.up_proj))
        return x + linear(hidden, *layer.down_proj)


def _acting(adapted: list[Any]) -> list[tuple[Any, ...]]:
    """What PEFT's layers say of how their adapters act: which of them do, whether at all, and at which scale."""
    return [
        (
            module.disable_adapters,
            tuple(module.active_adapters),
            tuple(module.merged_adapters),
            tuple(getattr(module, "scaling", {}).items()),  # MiSS has none
        )
        for module in adapted
    ]


def _layer(block: nn.Module) -> _Layer:
    if type(block) is not Block:
        raise _NotFoldableError
    attention, mlp = block.attention, block.mlp
    projections = [_linear(projection) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
    biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in projections]
    return _Layer(
        _norm(block.attention_norm),
        (torch.cat([weight for weight, _ in projections]), torch.cat(biases)),
        _linear(attention.o_proj),
        _norm(block.mlp_norm),
        _linear(mlp.up_proj),
        _linear(mlp.down_proj),
    )


def _linear(module: nn.Module | None) -> Affine:
    """Weight and bias of a linear layer; of another module what it does to the unit vectors, if that says all."""
    if module is None or _has_hooks(module):
        raise _NotFoldableError
    if isinstance(module, nn.Linear) and type(module) in {Linear, nn.Linear}:
        return module.weight.detach(), None if module.bias is None else module.bias.detach()
    inputs = getattr(module, "in_features", None)
    if not isinstance(inputs, int):
        raise _NotFoldableError
    if forget := getattr(module, "forget", None):  # written past the version counter (`.data`), weights look unchanged
        forget()
    like = next(module.parameters())
    bias = module(like.new_zeros(1, inputs))[0]
    weight = (module(torch.eye(inputs, dtype=like.dtype, device=like.device)) - bias).T.contiguous()
    _check_affine(module, weight, bias)
    return weight.detach(), bias.detach()


def _check_affine(module: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor) -> None:
    probe = torch.linspace(-1, 1, 3 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(3, -1)
    expected = module(probe)
    if not torch.allclose(linear(probe, weight, bias), expected, rtol=AFFINE_TOLERANCE, atol=AFFINE_TOLERANCE):
        raise _NotFoldableError


def _norm(module: nn.Module) -> Norm:
    if type(module) is not nn.LayerNorm or module.weight is None or module.bias is None or _has_hooks(module):
        raise _NotFoldableError
    return module.weight.detach(), module.bias.detach(), module.eps


def _embedding(module: nn.Module) -> Tensor:
    if type(module) is not nn.Embedding or _has_hooks(module):
        raise _NotFoldableError
    return module.weight.detach()


def _has_hooks(module: nn.Module) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def _normalised(x: Tensor, norm: Norm) -> Tensor:
    weight, bias, eps = norm
    return F.layer_norm(x, weight.shape, weight, bias, eps)
