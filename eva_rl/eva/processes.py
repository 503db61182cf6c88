"""What the processes of a distributed run tell each other: small flags every round, sums at every estimate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """A process group, or a single process.

    Args:
        group: None for the default group if torch.distributed is initialised, else this process alone.
        device: Where tensors for communication live.
    """

    group: dist.ProcessGroup | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def many(self) -> bool:
        """Whether there is anyone to talk to."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1

    def any(self, *flags: bool) -> list[bool]:
        """Each flag, true if it is true anywhere."""
        if not self.many:
            return list(flags)
        told = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in told.tolist()]

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over processes, equal everywhere."""
        if not self.many:
            return tensor
        summed = tensor.to(self.device, copy=True).contiguous()
        dist.all_reduce(summed, group=self.group)
        return summed

    def side_by_side(self, tensor: Tensor) -> Tensor:
        """Everyone's tensor, concatenated along the last dimension."""
        if not self.many:
            return tensor
        mine = tensor.to(self.device).contiguous()
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, mine, group=self.group)
        return torch.cat(parts, dim=-1)

    def everyones(self, value: T) -> list[T]:
        """A small picklable value from every process."""
        if not self.many:
            return [value]
        values: list[T | None] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return [value for value in values if value is not None]

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor."""
        if not self.many:
            return tensor
        sent = tensor.to(self.device, copy=True).contiguous()
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        dist.broadcast(sent, src=source, group=self.group)
        return sent
