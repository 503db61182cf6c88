"""How many CPU threads this process may use: what the scheduler, the container and the environment allow."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from eva_rl.errors import counted
from eva_rl.limits import cgroups

VARIABLE = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class ThreadLimits:
    """What limits the threads of this process.

    Attributes:
        affinity: CPUs that the scheduler lets it run on.
        quota: CPUs' worth of time that its control group grants; infinite without a quota.
        environment: ``OMP_NUM_THREADS``; None where it is not set.
    """

    affinity: int
    quota: float
    environment: int | None

    @property
    def cpus(self) -> int:
        """CPUs that affinity and quota leave, at least one."""
        return max(1, min(self.affinity, math.floor(min(self.quota, 1e9))))

    @property
    def threads(self) -> int:
        """Threads to use; a variable that is set decides, for somebody set it on purpose."""
        return self.cpus if self.environment is None else max(1, min(self.environment, self.affinity))

    def of_each(self, processes: int) -> int:
        """Threads of each of several processes; a variable that is set is each one's own."""
        return self.threads if self.environment is not None else max(1, self.cpus // processes)

    def __str__(self) -> str:
        quota = (
            "no quota" if math.isinf(self.quota) else f"a quota of {self.quota:g} CPU{'' if self.quota == 1 else 's'}"
        )
        variable = "" if self.environment is None else f", {VARIABLE}={self.environment}"
        return f"{counted(self.affinity, 'CPU')} by affinity, {quota}{variable}"


def thread_limits(
    environment: Mapping[str, str] = os.environ, root: Path = cgroups.MOUNTED, process: Path = cgroups.PROCESS
) -> ThreadLimits:
    """The limits of this process.

    Args:
        environment: Variables.
        root: Where control groups are mounted.
        process: Names the control groups of the process.
    """
    first = environment.get(VARIABLE, "").partition(",")[0].strip()
    variable = int(first) if first.isdecimal() and int(first) > 0 else None
    return ThreadLimits(len(os.sched_getaffinity(0)), min(_quotas(root, process), default=math.inf), variable)


def _quotas(root: Path, process: Path) -> Iterator[float]:
    """CPUs granted by each control group around the process, version 2 (cpu.max) and 1 (cpu.cfs_quota_us)."""
    for folder in cgroups.folders("cpu", root, process):
        found = cgroups.numbers(folder / "cpu.max")
        if len(found) == 2 and found[1] > 0:
            yield found[0] / found[1]
        quota, period = (cgroups.numbers(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota and period and quota[0] > 0 and period[0] > 0:
            yield quota[0] / period[0]
