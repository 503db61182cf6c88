"""Windows drawn ahead of their use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

import numpy as np
import torch

from eva_rl.batch import WindowBatch
from eva_rl.data.windows import WindowSampler
from eva_rl.distributed import ProcessGroup
from eva_rl.errors import UserError


class Sampler(Protocol):
    """What draws windows by the number of a gradient step."""

    def sample(self, batch_size: int, step: int, device: torch.device | str = "cpu") -> WindowBatch:
        """Draw the windows of gradient step ``step``."""


class PrefetchingSampler:
    """Draws the windows of the next gradient steps in one background thread, and moves them to the device there.

    It gives what the sampler itself gives, since a batch depends on its step alone. Use it as a context manager, or
    call :meth:`close`.

    Args:
        sampler: What draws.
        ahead: Batches that wait at most.
    """

    def __init__(self, sampler: Sampler, ahead: int = 2) -> None:
        self._sampler = sampler
        self._ahead = ahead
        self._waiting: dict[tuple[int, int, str], Future[WindowBatch]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="windows")

    def sample(self, batch_size: int, step: int, device: torch.device | str = "cpu") -> WindowBatch:
        """The windows of gradient step ``step``, drawn already where the step before was asked for last."""
        wanted = [(batch_size, step + later, str(device)) for later in range(self._ahead + 1)]
        for key in [key for key in self._waiting if key not in wanted]:
            self._waiting.pop(key).cancel()
        draw: Callable[..., WindowBatch] = self._sampler.sample
        for key in wanted:
            if key not in self._waiting:
                self._waiting[key] = self._pool.submit(draw, *key)
        return self._waiting.pop(wanted[0]).result()

    def close(self) -> None:
        """Forget what waits and end the thread."""
        self._waiting.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> PrefetchingSampler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def prefetching(sampler: Sampler, device: torch.device) -> Iterator[Sampler]:
    """Draw ahead where that helps: beside a GPU. On a CPU the draws would take the cores that train."""
    if device.type == "cpu":
        yield sampler
        return
    with PrefetchingSampler(sampler) as ahead:
        yield ahead


class ShardedSampler:
    """This process's part of the windows of each gradient step: together the processes see what one would see.

    Args:
        sampler: Draws the windows of the whole step; which ones depends on its seed and the step alone.
        process_group: This process among the others.
        halves: Divide the two halves of the windows one by one, where there are two windows a process: the processes'
            first halves then are the first half of all, and what compares halves (EVA) finds what one process would.
    """

    def __init__(self, sampler: WindowSampler, process_group: ProcessGroup, *, halves: bool = False) -> None:
        self._sampler = sampler
        self._process_group = process_group
        self._halves = halves

    def sample(self, batch_size: int, step: int, device: torch.device | str = "cpu") -> WindowBatch:
        """Draw this process's windows of gradient step ``step``, of ``batch_size`` in all.

        Raises:
            UserError: There are fewer windows than processes.
        """
        if batch_size < self._process_group.world_size:
            raise UserError(
                f"batch_size={batch_size}: expected at least one window a process, and there are "
                f"{self._process_group.world_size}. Use a larger batch_size, or fewer processes."
            )
        rows, group = self._sampler.rows(batch_size, step), self._process_group
        middle = batch_size // 2 if self._halves and batch_size >= 2 * group.world_size else 0
        mine = [part[group.shard(len(part))] for part in (rows[:middle], rows[middle:])]
        return self._sampler.windows(np.concatenate(mine), device)
