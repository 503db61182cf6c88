"""How many bytes of memory this process may use."""

from __future__ import annotations

import os
from pathlib import Path

from eva_rl.limits import cgroups

LIMITS = ("memory.max", "memory.limit_in_bytes")
"""Files of version 2 and 1; version 1 writes a number near 2 ** 63 where there is no limit."""


def memory_limit(root: Path = cgroups.MOUNTED, process: Path = cgroups.PROCESS) -> int:
    """Bytes: the machine's memory, or less where a control group grants less.

    Args:
        root: Where control groups are mounted.
        process: Names the control groups of the process.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    files = (folder / name for folder in cgroups.folders("memory", root, process) for name in LIMITS)
    granted = (int(number) for file in files for number in cgroups.numbers(file)[:1] if number > 0)
    return min((physical, *granted))
