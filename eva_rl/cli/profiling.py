"""What training costs: memory at its peak, seconds a gradient step, bytes of what a task adds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch

PROCESS = Path("/proc/self")
FORGET_PEAK = "5"
"""Written to Linux's clear_refs, sets the peak of resident memory to what is resident now (proc(5))."""


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Fill in ``peak_memory_bytes`` when the block ends.

    On CUDA it is the most that PyTorch had allocated on the device inside the block. On a CPU it is by how much the
    process's resident memory grew above what it was when the block began; absent where the system does not say.
    """
    found: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        return
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text(FORGET_PEAK)
    before = _status("VmRSS")
    yield found
    after = _status("VmHWM")
    if before is not None and after is not None:
        found["peak_memory_bytes"] = max(0, after - before)


def _status(key: str) -> int | None:
    """A size in bytes of Linux's record of this process."""
    try:
        match = re.search(rf"^{key}:\s+(\d+) kB", (PROCESS / "status").read_text(), re.M)
    except OSError:
        return None
    return None if match is None else int(match[1]) * 1024


@dataclass
class Phases:
    """Seconds spent in each phase of a run."""

    seconds: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=perf_counter)

    def end(self, name: str) -> None:
        """Add the time since the previous phase ended."""
        now = perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._began
        self._began = now
