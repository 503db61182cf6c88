"""One run on several processes, as ``torchrun`` or ``accelerate launch`` start them."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eva_rl.batch import WindowBatch
from eva_rl.data import WindowSampler
from eva_rl.errors import UserError

T = TypeVar("T")
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: longer than the first of them takes to collect demonstrations."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        index: From 0; process 0 alone writes.
        count: How many there are.
        device: Where tensors for communication live.
    """

    index: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def here(cls) -> Ranks:
        """The processes of torch.distributed's default group, or this one alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        on_gpu = dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.index == 0

    def share(self, total: int) -> slice:
        """This process's part of ``total`` things; the parts are adjacent and differ by one at most."""
        return slice(total * self.index // self.count, total * (self.index + 1) // self.count)

    def mine(self, total: int) -> int:
        """How many of ``total`` things are this process's."""
        share = self.share(total)
        return int(share.stop - share.start)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over processes, the same to the last bit everywhere."""
        if self.count == 1:
            return tensor
        with _answering():
            summed = tensor.detach().to(self.device, copy=True)
            dist.all_reduce(summed)
            return summed.to(tensor.device)

    def everyones(self, value: T) -> list[T]:
        """A picklable value from every process, in their order."""
        if self.count == 1:
            return [value]
        values: list[T | None] = [None] * self.count
        with _answering():
            dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]  # all are filled

    def decided_by_first(self, decide: Callable[[], T]) -> T:
        """What ``decide`` gives on the first process, everywhere; it is not called on the others."""
        if self.count == 1:
            return decide()
        values = [decide() if self.first else None]
        with _answering():
            dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]  # type: ignore[return-value]  # the first process's

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The first process goes through the block before the others enter it: it makes files that they read."""
        if not self.first:
            self.everyones(None)
        yield
        if self.first:
            self.everyones(None)

    def equalise(self, module: nn.Module) -> None:
        """Give every process the first one's parameters and buffers."""
        if self.count == 1:
            return
        with torch.no_grad(), _answering():
            for tensor in module.state_dict().values():
                sent = tensor.detach().to(self.device).contiguous()
                dist.broadcast(sent, src=0)
                tensor.copy_(sent)

    def total_gradients(self, parameters: Sequence[nn.Parameter], number: Tensor) -> Tensor:
        """Replace gradients by their sums over processes, in one message, and return the sum of a number beside them.

        Args:
            parameters: With the same gradients missing everywhere.
            number: (), for instance this process's part of the loss.
        """
        if self.count == 1:
            return number
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self.total(torch.cat([*(g.reshape(-1) for g in gradients), number.detach().reshape(1)]))
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()
        return flat[-1]


class ShardedSampler:
    """This process's part of the windows of each gradient step: together the processes see what one would see.

    Args:
        sampler: Draws the windows of the whole step; which ones depends on its seed and the step alone.
        ranks: This process among the others.
    """

    def __init__(self, sampler: WindowSampler, ranks: Ranks) -> None:
        self._sampler = sampler
        self._ranks = ranks

    def sample(self, batch_size: int, step: int, device: torch.device | str = "cpu") -> WindowBatch:
        """Draw this process's windows of gradient step ``step``, of ``batch_size`` in all.

        Raises:
            UserError: There are fewer windows than processes.
        """
        if batch_size < self._ranks.count:
            raise UserError(
                f"{batch_size} windows a step leave some of {self._ranks.count} processes without one. Use a larger "
                "batch_size, or fewer processes."
            )
        rows = self._sampler.rows(batch_size, step)
        return self._sampler.windows(rows[self._ranks.share(batch_size)], device)


def local_rank() -> int:
    """Number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0


def local_count() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return all(key in os.environ for key in LAUNCHED) and int(os.environ["WORLD_SIZE"]) > 1


def join(device: torch.device, timeout: timedelta = TIMEOUT) -> Ranks:
    """Meet the other processes that a launcher started, if it did.

    Args:
        device: What this process computes on: NVIDIA's library carries the messages of GPUs, gloo those of CPUs.
        timeout: How long a process waits for the others before it gives up.

    Raises:
        UserError: They do not come.
    """
    if not launched() or dist.is_initialized():
        return Ranks.here()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _answering():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    atexit.register(_leave)
    return Ranks.here()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _answering() -> Iterator[None]:
    """Turn what torch raises when another process is gone into what a user can act on."""
    try:
        yield
    except RuntimeError as error:  # of gloo, and dist.DistError
        raise UserError(
            f"Another process of this run has ended or does not answer ({str(error).splitlines()[0][:200]}). Its own "
            "message, if it left one, says why. The last checkpoint is whole: type the same command again to continue "
            "from it, on this or another number of processes."
        ) from error
