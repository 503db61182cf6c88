"""The loss of behaviour cloning, as a mean or as sums that microbatches and processes add up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from eva_rl.batch import WindowBatch


def clone_loss(network: nn.Module, batch: WindowBatch, loss: str = "mse") -> Tensor:
    """Mean error of the predicted actions over the real env steps of the windows.

    Args:
        network: Maps a batch to (B, T, act) actions.
        batch: Scaled windows.
        loss: ``mse`` or ``l1``.
    """
    return summed_action_loss(network, batch, loss) / num_action_elements(batch)


def summed_action_loss(network: Callable[..., Any], batch: WindowBatch, loss: str) -> Tensor:
    """The sum that `clone_loss` is the mean of."""
    labels = batch.actions if batch.target_actions is None else batch.target_actions
    error: Tensor = (network(batch) - labels).float()
    error = error.abs() if loss == "l1" else error.square()
    if batch.attention_mask is not None:
        error = error * batch.attention_mask.unsqueeze(-1).to(error.dtype)
    return torch.sum(error)


def num_action_elements(batch: WindowBatch) -> Tensor:
    """Number of action elements at real env steps, which the mean is taken over, float64 ()."""
    mask, (B, T, act) = batch.attention_mask, batch.actions.shape
    if mask is None:
        return torch.tensor(B * T * act, dtype=torch.float64, device=batch.actions.device)
    return mask.sum(dtype=torch.float64) * act


def microbatches(batch: WindowBatch, number: int) -> Iterator[WindowBatch]:
    """Split windows into ``number`` microbatches of nearly equal size, fewer if there are fewer windows."""
    size, number = len(batch), min(number, len(batch))
    for i in range(number):
        rows = slice(size * i // number, size * (i + 1) // number)
        columns: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(batch)}
        part: dict[str, Any] = {name: None if x is None else x[rows] for name, x in columns.items()}
        yield replace(batch, **part)


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Mixed precision where ``precision`` is ``bfloat16``."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        yield


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of values (B, T) where the mask (B, T) is True, 0 where it is True nowhere; None says everywhere."""
    if mask is None:
        return values.mean()
    real = mask.to(values.dtype)
    return torch.sum(values * real) / real.sum().clamp(min=1)
