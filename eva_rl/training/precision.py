"""Mixed precision where this machine gains by it."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from eva_rl.batch import WindowBatch
from eva_rl.options import BFLOAT16, FLOAT32
from eva_rl.training.losses import autocast, clone_loss
from eva_rl.training.options import AUTO

ROUNDS = 5
GAIN = 0.9
"""bfloat16 is taken where a pass takes less than this fraction of float32's time."""


def choose_precision(asked: str, network: nn.Module, draw: Callable[[], WindowBatch]) -> str:
    """What ``precision=auto`` comes to for these windows.

    bfloat16 is out of the question where the processor only emulates it. Elsewhere forward and backward passes of both
    are timed in turns. The network's gradients are cleared, and no random number is drawn that training would see.

    Args:
        asked: ``float32``, ``bfloat16`` or ``auto``.
        network: That is trained.
        draw: Gives the windows of a gradient step.

    Returns:
        ``float32`` or ``bfloat16``.
    """
    if asked != AUTO:
        return asked
    batch = draw()
    device = batch.actions.device
    if not has_bfloat16(device):
        return FLOAT32
    seconds: dict[str, list[float]] = {FLOAT32: [], BFLOAT16: []}
    devices = [device] if device.type == "cuda" else []
    network.train()
    with torch.random.fork_rng(devices):
        for _ in range(ROUNDS + 1):
            for precision, taken in seconds.items():
                taken.append(_pass_seconds(network, batch, precision))
    network.zero_grad(set_to_none=True)
    return BFLOAT16 if median(seconds[BFLOAT16][1:]) < GAIN * median(seconds[FLOAT32][1:]) else FLOAT32


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(
        bool(getattr(torch.cpu, name, bool)()) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )


def _pass_seconds(network: nn.Module, batch: WindowBatch, precision: str) -> float:
    device = batch.actions.device
    began = time.perf_counter()
    with autocast(device, precision):
        loss = clone_loss(network, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
