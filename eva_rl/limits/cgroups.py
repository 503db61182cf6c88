"""The control groups around this process, version 1 and 2 (Linux, cgroups(7)), and the numbers in their files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MOUNTED, PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def folders(controller: str, root: Path = MOUNTED, process: Path = PROCESS) -> Iterator[Path]:
    """Folders of the groups that a controller applies to this process, the innermost first.

    Args:
        controller: Its name in version 1, such as ``cpu`` or ``memory``.
        root: Where control groups are mounted.
        process: Names the control groups of the process.
    """
    try:
        lines = process.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, place = [*line.split(":", 2), "", ""][:3]
        if controllers == "" or controller in controllers.split(","):
            mounted = root if controllers == "" else root / controller
            group = mounted / place.strip("/")
            yield from (group, *(parent for parent in group.parents if parent.is_relative_to(mounted)))
    yield from (root, root / controller)  # of a container that sees its own group as the root


def numbers(path: Path) -> list[float]:
    """Numbers of a file; none where it is not there, or where it says ``max``."""
    try:
        return [float(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []
