"""One process group for the engine, training and the commands, as ``torchrun`` or ``accelerate launch`` start it."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eva_rl.errors import UserError

T = TypeVar("T")
TorchGroup: TypeAlias = dist.ProcessGroup
"""torch.distributed's own class, for annotations elsewhere."""
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: longer than rank 0 takes to collect demonstrations."""
SETTLING = 0.3
"""Seconds that threads of communication get at the end of a process."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those of the run; a single process by default.

    Attributes:
        rank: From 0; rank 0 alone writes files.
        world_size: Number of processes.
        device: Where tensors for communication live.
        group: torch.distributed's group; None for its default one.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: TorchGroup | None = None

    @classmethod
    def current(cls, group: TorchGroup | None = None) -> ProcessGroup:
        """Describe a group of torch.distributed, or this process alone where it is not initialised.

        Args:
            group: None for the default group.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        on_gpu = dist.get_backend(group) == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        return cls(dist.get_rank(group), dist.get_world_size(group), device, group)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.rank == 0

    def shard(self, total: int) -> slice:
        """This process's part of ``total`` items; shards are contiguous and differ by one at most."""
        return slice(total * self.rank // self.world_size, total * (self.rank + 1) // self.world_size)

    def local_count(self, total: int) -> int:
        """Number of items in this process's shard of ``total``."""
        shard = self.shard(total)
        return int(shard.stop - shard.start)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, the same to the last bit on all of them."""
        if self.world_size == 1:
            return tensor
        with _peer_errors():
            summed = tensor.detach().to(self.device, copy=True).contiguous()
            dist.all_reduce(summed, group=self.group)
            return summed.to(tensor.device)

    def any(self, *flags: bool) -> list[bool]:
        """Each flag, true if it is true on any process."""
        if self.world_size == 1:
            return list(flags)
        with _peer_errors():
            reduced = torch.tensor(flags, dtype=torch.int32, device=self.device)
            dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in reduced.tolist()]

    def all_gather_object(self, value: T) -> list[T]:
        """A picklable value from every process, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        with _peer_errors():
            dist.all_gather_object(values, value, group=self.group)
        return values  # type: ignore[return-value]  # all are filled

    def all_gather_cat(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, of equal shape, concatenated along the last dimension."""
        if self.world_size == 1:
            return tensor
        with _peer_errors():
            own = tensor.to(self.device).contiguous()
            parts = [torch.empty_like(own) for _ in range(self.world_size)]
            dist.all_gather(parts, own, group=self.group)
        return torch.cat(parts, dim=-1)

    def broadcast_object(self, decide: Callable[[], T]) -> T:
        """Call ``decide`` on rank 0 and broadcast the result; it is not called elsewhere."""
        if self.world_size == 1:
            return decide()
        values = [decide() if self.is_main else None]
        with _peer_errors():
            dist.broadcast_object_list(values, src=self._source, group=self.group, device=self.device)
        return values[0]  # type: ignore[return-value]  # rank 0's

    def broadcast_tensor(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor."""
        if self.world_size == 1:
            return tensor
        with _peer_errors():
            sent = tensor.to(self.device, copy=True).contiguous()
            dist.broadcast(sent, src=self._source, group=self.group)
        return sent

    def broadcast_parameters(self, module: nn.Module) -> None:
        """Give every process rank 0's parameters and buffers."""
        if self.world_size == 1:
            return
        with torch.no_grad():
            for tensor in module.state_dict().values():
                tensor.copy_(self.broadcast_tensor(tensor.detach()))

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Let rank 0 go through the block before the others enter it: it makes files that they read."""
        if not self.is_main:
            self.all_gather_object(None)
        yield
        if self.is_main:
            self.all_gather_object(None)

    def all_reduce_gradients(self, parameters: Sequence[nn.Parameter], scalar: Tensor) -> Tensor:
        """Replace gradients by their sums over processes, in one message, and return the sum of a scalar beside them.

        Args:
            parameters: With the same gradients missing on every process.
            scalar: (), for instance this process's part of the loss.
        """
        if self.world_size == 1:
            return scalar
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self.all_reduce_sum(torch.cat([*(g.reshape(-1) for g in gradients), scalar.detach().reshape(1)]))
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()
        return flat[-1]

    @property
    def _source(self) -> int:
        """Global rank of this group's rank 0."""
        return 0 if self.group is None else dist.get_global_rank(self.group, 0)


def local_rank() -> int:
    """Rank of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_torchrun() else 0


def local_world_size() -> int:
    """Number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_torchrun() else 1


def is_torchrun() -> bool:
    """Whether torchrun or accelerate started this process as one of several."""
    return all(key in os.environ for key in TORCHRUN_VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


def init_distributed(device: torch.device, timeout: timedelta = TIMEOUT) -> ProcessGroup:
    """Initialise torch.distributed when launched by torchrun or accelerate.

    Args:
        device: What this process computes on; CUDA takes the nccl backend, a CPU gloo.
        timeout: How long a process waits for the others before it gives up.

    Raises:
        UserError: The other processes do not come.
    """
    if not is_torchrun() or dist.is_initialized():
        return ProcessGroup.current()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _peer_errors():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    atexit.register(_destroy)
    return ProcessGroup.current()


def _destroy() -> None:
    """End the group while the interpreter is whole.

    A thread of gloo's lets go of the tensors of the last communication after the caller has gone on, for which it needs
    the interpreter: one that comes too late aborts the process.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(SETTLING)


@contextmanager
def _peer_errors() -> Iterator[None]:
    """Turn what torch raises when another process is gone into what a user can act on."""
    try:
        yield
    except RuntimeError as error:  # of gloo, and dist.DistError
        raise UserError(
            f"Another process of this run has ended or does not respond ({str(error).splitlines()[0][:200]}). Its own "
            "message, if it left one, says why. The last checkpoint is whole: rerun the same command with the same "
            "run_dir= to continue from it, on this or another number of processes."
        ) from error
