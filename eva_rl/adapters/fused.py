"""Fused low-rank layers: PEFT's modules hold the parameters, the forward and backward passes are ours.

A LoRA layer computes x W^T + s (x A^T) B^T. Done term by term, as PEFT does, that is more work than full fine-tuning:
every activation is read several times. Here W' = W + s B A is composed first, which costs next to nothing, so that the
forward and the gradient of x are one large product each; the gradients of A and B are thin products that share
H = x A^T.
Layers that read the same input (the q, k and v projections) share H and the gradient of x.

While gradients are off, W' is kept from one call to the next: an adapter costs nothing per step while a policy acts,
and the base weights are not touched. Files, names and everything else stay PEFT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant, MiCALinearVariant
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from eva_rl.agents.linear import linear, product
from eva_rl.agents.transformer import Attention

ADALORA_EPSILON = 1e-5
"""PEFT divides AdaLoRA's update by the rank plus this."""
_Versions = tuple[float, tuple[tuple[int, int, float], ...]]


@dataclass(frozen=True)
class LowRank:
    """A linear layer and its low-rank update.

    Attributes:
        weight: W (out, in).
        bias: (out,) or None.
        a: A (R, in).
        b: B (out, R).
        scale: s.
        magnitude: (out,), DoRA's m; None for plain LoRA.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    def composed(self) -> tuple[Tensor, Tensor | None]:
        """W' (out, in): W + s B A, for DoRA with rows of norm m; and m over the norms of the rows, (out,)."""
        direction = torch.addmm(self.weight, self.b, self.a, alpha=self.scale)
        if self.magnitude is None:
            return direction, None
        gain = self.magnitude / torch.linalg.vector_norm(direction, dim=1)
        return direction * gain.unsqueeze(1), gain


class _FusedLinears(torch.autograd.Function):
    """Layers that read one input: x (N, in) to y_i = x W'_i^T + bias_i (N, out_i).

    Arguments come flat, five tensors a layer (W, bias, A, B, m), for autograd to see them. The norm in DoRA's W' counts
    as a constant (Liu et al. 2024, arXiv 2402.09353, section 4.3), as in PEFT.
    """

    @staticmethod
    def forward(ctx: Any, scales: tuple[float, ...], x: Tensor, *flat: Tensor | None) -> tuple[Tensor, ...]:
        layers = _layers(scales, flat)
        composed = [layer.composed() for layer in layers]
        weights = [weight.to(x.dtype) for weight, _ in composed]
        outputs, hidden = _outputs(x, layers, weights)
        ctx.scales, ctx.gains = scales, [gain for _, gain in composed]
        outputs_kept = [y if gain is not None else None for y, (_, gain) in zip(outputs, composed, strict=True)]
        ctx.save_for_backward(x, hidden, *weights, *outputs_kept, *flat)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        n = len(ctx.scales)
        x, hidden, *rest = ctx.saved_tensors
        weights, outputs, layers = rest[:n], rest[n : 2 * n], _layers(ctx.scales, rest[2 * n :])
        needs = [ctx.needs_input_grad[2 + 5 * i : 7 + 5 * i] for i in range(n)]
        grad_x, inner = _inner_gradients(layers, grads, weights, ctx.gains, ctx.needs_input_grad[1])
        ranks = [layer.a.shape[0] for layer in layers]
        grads_a = torch.split(product(inner.mT, x), ranks)  # (R_i, in) each
        parts = hidden.split(ranks, dim=1)
        found: list[Tensor | None] = []
        for i, (layer, grad) in enumerate(zip(layers, grads, strict=True)):
            own = _layer_gradients(layer, grad, parts[i], outputs[i], ctx.gains[i], needs[i])
            own[2] = grads_a[i].to(layer.a.dtype) if needs[i][2] else None
            found += own
        return (None, grad_x, *found)


def _layers(scales: Sequence[float], flat: Sequence[Tensor | None]) -> list[LowRank]:
    parts = [flat[5 * i : 5 * i + 5] for i in range(len(scales))]
    return [LowRank(w, bias, a, b, s, m) for s, (w, bias, a, b, m) in zip(scales, parts, strict=True)]  # type: ignore[arg-type]  # W, A and B are there


def _outputs(x: Tensor, layers: Sequence[LowRank], weights: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Each layer's (N, out), and H (N, sum of R) = x A^T of all of them."""
    biases = [None if layer.bias is None else layer.bias.to(x.dtype) for layer in layers]
    if len(layers) == 1 and x.shape[1] > len(weights[0]):  # x is the larger matrix: read it once
        a, weight, bias = layers[0].a.to(x.dtype), weights[0], biases[0]
        wide = linear(x, torch.cat([weight, a]), None if bias is None else F.pad(bias, (0, len(a))))
        return (wide[:, : len(weight)],), wide[:, len(weight) :]
    outputs = tuple(linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    stacked = torch.cat([layer.a for layer in layers]).to(x.dtype)
    return outputs, product(stacked, x.mT).mT  # this order of the thin product is the faster one on CPUs


def _inner_gradients(
    layers: Sequence[LowRank],
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    gains: Sequence[Tensor | None],
    needs_x: bool,
) -> tuple[Tensor | None, Tensor]:
    """Gradients of x (N, in), or None, and of H (N, sum of R)."""
    real = next(grad for grad in grads if grad is not None)
    factors = [_scaled(layer, gain).to(real.dtype) for layer, gain in zip(layers, gains, strict=True)]  # (out, R)
    thin = [
        real.new_zeros(len(real), factor.shape[1]) if grad is None else product(factor.mT, grad.mT).mT
        for grad, factor in zip(grads, factors, strict=True)
    ]
    return _summed(grads, weights) if needs_x else None, torch.cat(thin, dim=1)


def _scaled(layer: LowRank, gain: Tensor | None) -> Tensor:
    """S B, with DoRA's factor on each row, (out, R)."""
    scaled = layer.b * layer.scale
    return scaled if gain is None else scaled * gain.unsqueeze(1)


def _summed(grads: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor:
    """Sum of grad_i weight_i over the outputs that have a gradient."""
    there = [(g, w) for g, w in zip(grads, weights, strict=True) if g is not None]
    if len(there) == 1:
        return product(*there[0])
    return product(torch.cat([grad for grad, _ in there], dim=1), torch.cat([weight for _, weight in there]))


def _layer_gradients(
    layer: LowRank, grad: Tensor | None, h: Tensor, y: Tensor | None, gain: Tensor | None, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of W, bias, A, B and m; that of A is filled in later, W stays frozen."""
    if grad is None:
        return [None] * 5
    grad_bias = grad.sum(0).to(layer.bias.dtype) if needs[1] and layer.bias is not None else None
    grad_b = grad_m = None
    if needs[3]:
        grad_b = product(h.mT, grad).mT.to(layer.b.dtype) * layer.scale  # (out, R)
        grad_b = grad_b if gain is None else grad_b * gain.unsqueeze(1)
    if needs[4] and y is not None and layer.magnitude is not None:
        centred = y if layer.bias is None else y - layer.bias.to(y.dtype)
        grad_m = (grad * centred).sum(0).to(layer.magnitude.dtype) / layer.magnitude
    return [None, grad_bias, None, grad_b, grad_m]


def fused_linears(x: Tensor, layers: Sequence[LowRank]) -> tuple[Tensor, ...]:
    """Apply layers that read the same input, with gradients.

    Args:
        x: (..., in).
        layers: Their weights and low-rank updates.

    Returns:
        (..., out) of each layer.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    flat = [tensor for layer in layers for tensor in (layer.weight, layer.bias, layer.a, layer.b, layer.magnitude)]
    with torch.autocast(kind, enabled=False):
        outputs = _FusedLinears.apply(tuple(layer.scale for layer in layers), x.flatten(0, -2), *flat)  # type: ignore[no-untyped-call]
    return tuple(y.unflatten(0, x.shape[:-1]) for y in outputs)


class _Fused:
    """What the fused classes share: when they apply, and W' between calls without gradients."""

    _kept: tuple[_Versions, Tensor] | None = None
    scaling: dict[str, float]
    active_adapters: list[str]

    def low_rank(self) -> LowRank | None:
        """The layer as it acts now; None where PEFT's own forward is needed.

        That is where adapters are off, merged or several, with dropout or a bias of B, and where the factors are more
        precise than the base (float32 on bfloat16): composed, a small update would be rounded away.
        """
        raise NotImplementedError

    def _sources(self) -> tuple[Tensor, ...]:
        """Parameters that W' is composed of."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer to (..., in); where its base weight is trained, too, as PEFT does."""
        layer = None if args or kwargs else self.low_rank()
        if layer is None or (layer.weight.requires_grad and torch.is_grad_enabled()):
            result: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]  # PEFT's
            return result
        if torch.is_grad_enabled():
            self.forget()
            return fused_linears(x, [layer])[0]
        return linear(x, self._effective_weight(layer), layer.bias)

    def forget(self) -> None:
        """Compose W' anew when it is needed next, since an optimiser may change a parameter past its version."""
        self._kept = None

    def _effective_weight(self, layer: LowRank) -> Tensor:
        """W' (out, in), composed again only where a parameter or the scale has changed since the last call.

        On a GPU, where a look at the values would make the CPU wait, a change past the version counter is not noticed.
        """
        if torch.compiler.is_compiling():
            return layer.composed()[0]
        scale, weight = self.scaling[self.active_adapters[0]], layer.weight
        versions = scale, tuple(_age(t, look=not (t is weight or t.is_cuda)) for t in self._sources())
        if self._kept is None or self._kept[0] != versions:
            with torch.autocast(layer.weight.device.type, enabled=False):
                self._kept = versions, layer.composed()[0]
        return self._kept[1]

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, which writes to the base weight past its version counter."""
        self.forget()
        super().merge(*args, **kwargs)  # type: ignore[misc]  # PEFT's

    def unmerge(self) -> None:
        """As PEFT's, which writes to the base weight past its version counter."""
        self.forget()
        super().unmerge()  # type: ignore[misc]  # PEFT's


def _age(tensor: Tensor, *, look: bool) -> tuple[int, int, float]:
    """What tells a tensor from itself before a change; with a look at its values also where its version does not."""
    content = float(tensor.detach().sum()) if look else 0.0
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, content


class FusedLoraLinear(_Fused, LoraLinear):  # type: ignore[misc]  # PEFT is untyped
    """PEFT's LoRA or DoRA layer with a fused forward and backward."""

    def low_rank(self) -> LowRank | None:
        """See :meth:`_Fused.low_rank`."""
        name = _single_adapter(self)
        variant = None if name is None else self.lora_variant.get(name)
        if name is None or not (variant is None or isinstance(variant, DoraLinearVariant | MiCALinearVariant)):
            return None
        magnitude = self.lora_magnitude_vector[name].weight if isinstance(variant, DoraLinearVariant) else None
        base = self.base_layer
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        if a.dtype is not base.weight.dtype or self.lora_B[name].bias is not None:
            return None
        return LowRank(base.weight, base.bias, a, b, self.scaling[name], magnitude)

    def _sources(self) -> tuple[Tensor, ...]:
        layer = self.low_rank()
        assert layer is not None
        return tuple(t for t in (layer.weight, layer.a, layer.b, layer.magnitude) if t is not None)


class FusedSVDLinear(_Fused, SVDLinear):  # type: ignore[misc]  # PEFT is untyped
    """PEFT's AdaLoRA layer with a fused forward and backward."""

    def low_rank(self) -> LowRank | None:
        """See :meth:`_Fused.low_rank`."""
        name = _single_adapter(self)
        if name is None:
            return None
        base = self.base_layer
        if self.lora_A[name].dtype is not base.weight.dtype:
            return None
        shrink = self.scaling[name] / (self.ranknum[name] + ADALORA_EPSILON)
        return LowRank(base.weight, base.bias, self.lora_A[name] * (self.lora_E[name] * shrink), self.lora_B[name], 1.0)

    def _sources(self) -> tuple[Tensor, ...]:
        name = self.active_adapters[0]
        parts = (self.lora_A, self.lora_E, self.lora_B, self.ranknum)
        return (self.base_layer.weight, *(part[name] for part in parts))


class FusedAttention(Attention):
    """Attention whose q, k and v projections are one fused call where all three carry an adapter."""

    def project(self, x: Tensor, queries: slice) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`Attention.project`."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        layers = [m.low_rank() if isinstance(m, _Fused) and not _hooked(m) else None for m in projections]
        found = [layer for layer in layers if layer is not None]
        trained = any(layer.weight.requires_grad for layer in found)
        if queries != slice(None) or len(found) < 3 or trained or not torch.is_grad_enabled():
            return super().project(x, queries)
        for module in projections:
            module.forget()  # type: ignore[operator]  # fused, as each has a low-rank layer
        q, k, v = fused_linears(x, found)
        return q, k, v


def _hooked(module: Any) -> bool:
    """Whether someone waits for the module itself to be called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _single_adapter(module: Any) -> str | None:
    """The one adapter that acts in a PEFT layer now, without dropout and without hooks on the layer inside it."""
    if module.disable_adapters or module.merged or len(module.active_adapters) != 1 or _hooked(module.base_layer):
        return None
    name = str(module.active_adapters[0])
    if name not in module.lora_A or (module.training and not isinstance(module.lora_dropout[name], nn.Identity)):
        return None
    return name


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    LoraLinear: FusedLoraLinear,
    SVDLinear: FusedSVDLinear,
    Attention: FusedAttention,
}


def fuse(network: nn.Module) -> int:
    """Give the network's LoRA, DoRA and AdaLoRA layers, and the attention around them, fused passes.

    Parameters, their names and what PEFT saves stay as they are; :func:`unfuse` gives PEFT's own passes back.

    Args:
        network: With an adapter of PEFT's; changed in place.

    Returns:
        Number of low-rank layers that are fused.
    """
    return _swap(network, _FUSED)


def fuse_where_faster(network: nn.Module) -> int:
    """:func:`fuse`, but for plain low-rank layers on a GPU.

    There a step of these policies is bound by launching kernels, and PEFT's layers launch fewer: 1.4 to 1.5 of full
    fine-tuning's time where fused ones take 1.6 to 1.9. With DoRA the fused ones launch fewer, 2.0 to 2.3 against 2.5
    to 2.7 (H100; ``benchmarks/speed/low_rank.py``).

    Args:
        network: With an adapter of PEFT's; changed in place.

    Returns:
        Number of low-rank layers that are fused.
    """
    layers = [module for module in network.modules() if type(module) in _FUSED]
    dora = any(isinstance(layer, LoraLinear) and any(layer.use_dora.values()) for layer in layers)
    if next(network.parameters()).is_cuda and not dora:
        return 0
    return fuse(network)


def unfuse(network: nn.Module) -> int:
    """Undo :func:`fuse`; returns the number of low-rank layers that were fused."""
    return _swap(network, {fused: plain for plain, fused in _FUSED.items()})


def _swap(network: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> int:
    count = 0
    for module in network.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
            count += not isinstance(module, Attention)
    return count
