"""What training costs: memory at its peak, seconds a gradient step, bytes of what a task adds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, time

import torch

from eva_rl.errors import UserError
from eva_rl.files import read_json, write_json
from eva_rl.schema import MapOf, Number, Record

PROCESS = Path("/proc/self")
FORGET_PEAK = "5"
"""Written to Linux's clear_refs, sets the peak of resident memory to what is resident now (proc(5))."""
SECONDS, WALL_TIME = "seconds", "wall_time"
KEPT = Record({SECONDS: MapOf(Number(0)), WALL_TIME: Number()})
"""What the seconds of a run are kept in: those of the phases that have ended, and when the last of them did."""


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
    """Seconds spent in each phase of a run, by all processes that have worked on it.

    Attributes:
        seconds: By phase.
        file: Where they are kept for a process that continues the run; None before :meth:`keep`.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    file: Path | None = None
    _began: float = field(default_factory=perf_counter)

    def end(self, name: str) -> None:
        """Add the time since the previous phase ended."""
        now = perf_counter()
        self._add(name, now - self._began)
        self._began = now
        self._write()

    def keep(self, file: Path, interrupted: str = "", until: float = 0.0) -> None:
        """Keep the seconds in a file from now on, together with those of the processes before where a run goes on.

        Args:
            file: What they kept theirs in.
            interrupted: The phase that was under way when the last of them ended; empty for a run that is new.
            until: Wall time up to which the run builds on it.
        """
        if interrupted:
            self._add_earlier(file, interrupted, until)
        self.file = file
        self._write()

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _add_earlier(self, file: Path, interrupted: str, until: float) -> None:
        with suppress(UserError):  # of a version without the file, or damaged: it holds no result
            found = read_json(file, KEPT)
            for phase, seconds in found[SECONDS].items():
                self._add(phase, seconds)
            self._add(interrupted, max(0.0, until - found[WALL_TIME]))

    def _write(self) -> None:
        if self.file is not None:
            write_json(self.file, {SECONDS: self.seconds, WALL_TIME: time()})
