"""Which rows of an activation count, from a mask over time steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eva_rl.errors import UserError


def default_mask(batch: Any) -> Tensor | None:
    """The `attention_mask` key or attribute of a batch, where it has a (B, T) one."""
    mask = batch.get("attention_mask") if isinstance(batch, dict) else getattr(batch, "attention_mask", None)
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


class Mask:
    """A (B, T) mask and its expansions to the row counts of the layers that saw the same forward.

    Args:
        steps: (B, T), bool or 0-1: which time steps count.
    """

    def __init__(self, steps: Tensor) -> None:
        if steps.ndim != 2:
            raise UserError(f"A mask has to be (batch, time), got the shape {tuple(steps.shape)}.")
        self.steps = steps != 0
        self._expanded: dict[tuple[int, ...], Tensor] = {}
        self._indices: dict[tuple[tuple[int, ...], int], Tensor | None] = {}

    def rows(self, shape: torch.Size, name: str) -> Tensor:
        """The mask (N,) of the rows of an activation of `shape` (..., D).

        A layer that sees c tokens per time step, as (B, c * T, D) or as (B * c * T, D), takes each step's entry c
        times in a row; (B, D) takes the samples that have any step.

        Raises:
            UserError: The shape does not belong to this mask.
        """
        key = tuple(shape[:-1])
        if key not in self._expanded:
            self._expanded[key] = self._expand(key, name)
        return self._expanded[key]

    def indices(self, shape: torch.Size, name: str, rows: slice) -> Tensor | None:
        """Numbers of the rows that count among `rows`, for `index_select`; None if all do. Waits for the device."""
        key = (tuple(shape[:-1]), rows.start)
        if key not in self._indices:
            part = self.rows(shape, name)[rows]
            self._indices[key] = None if bool(part.all()) else part.nonzero()[:, 0] + rows.start
        return self._indices[key]

    def _expand(self, shape: tuple[int, ...], name: str) -> Tensor:
        B, T = self.steps.shape
        if len(shape) >= 2 and shape[0] == B and shape[-1] % T == 0:
            tokens = self.steps.repeat_interleave(shape[-1] // T, dim=1)
            middle = tokens.view(B, *[1] * (len(shape) - 2), shape[-1])
            return middle.expand(shape).reshape(-1)
        if len(shape) == 1 and shape[0] == B:
            return self.steps.any(1)
        if len(shape) == 1 and shape[0] % (B * T) == 0:
            return self.steps.repeat_interleave(shape[0] // (B * T), dim=1).reshape(-1)
        raise UserError(
            f"Layer {name!r} sees activations of shape {(*shape, 'D')}, which do not fit a mask of {B} samples of {T} "
            f"steps: expected ({B}, c * {T}, D), ({B} * c * {T}, D) or ({B}, D). Give another mask= (a function of the "
            "batch), or mask=lambda batch: None to count every row."
        )
