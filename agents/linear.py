"""Linear layers whose float32 products run on the faster of a processor's two libraries.

PyTorch computes float32 products on x86 processors with MKL, which uses AVX-512 on Intel's processors only. oneDNN,
which PyTorch has for other kinds of layers, uses it wherever it is: on an AMD EPYC with AVX-512 it does 2.2 times as
many operations a second (``benchmarks/speed/products.py``). Both compute in float32; the order of their sums differs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

CPU_INFO = Path("/proc/cpuinfo")
SMALLEST = 1 << 20
"""Multiplications of a product from which oneDNN is worth its longer way to the kernel (10 µs)."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, on the faster library where no gradient is recorded.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.

    Returns:
        (..., out).
    """
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if recorded or not _suits(x, weight):
        return F.linear(x, weight, bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(_packed(x), _packed(weight), bias, "none", [], "")
    return result


def product(first: Tensor, second: Tensor) -> Tensor:
    """``first @ second`` for matrices (N, K) and (K, M) by :func:`linear`, (N, M)."""
    return linear(first, second.mT)


class Linear(nn.Linear):
    """``torch.nn.Linear`` with the products of :func:`linear`, forwards and backwards."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if torch.is_grad_enabled() and _suits(input, self.weight):
            result: Tensor = _Linear.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
            return result
        return linear(input, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    """x (..., in) to x W^T + bias (..., out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            linear(grad, weight.mT) if needs_x else None,
            product(rows.mT, x.flatten(0, -2)) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def _packed(matrix: Tensor) -> Tensor:
    """The matrix, or a copy where neither it nor its transpose is contiguous: oneDNN can be slow with these."""
    return matrix if matrix.is_contiguous() or matrix.mT.is_contiguous() else matrix.contiguous()


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is the faster way to this product; left to PyTorch in mixed precision, graphs and torch.func."""
    return (
        x.device.type == "cpu"
        and x.dtype is weight.dtype is torch.float32
        and x.ndim > 1
        and x.numel() * len(weight) >= SMALLEST
        and _is_faster()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    )


@cache
def _is_faster() -> bool:
    """Whether MKL leaves this processor's AVX-512 unused and oneDNN does not."""
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not CPU_INFO.is_file():
        return False
    return "GenuineIntel" not in CPU_INFO.read_text()
