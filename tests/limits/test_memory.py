from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from eva_rl.limits.memory import memory_limit

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def limit(root: Path, groups: str, files: Mapping[str, str]) -> int:
    (root / "self").write_text(groups)
    for place, text in files.items():
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return memory_limit(root, root / "self")


def test_the_tightest_group_around_the_process_counts(tmp_path: Path) -> None:
    found = limit(tmp_path, "0::/pod/box\n", {"pod/memory.max": "2000000\n", "pod/box/memory.max": "3000000\n"})
    assert found == 2_000_000


def test_version_1(tmp_path: Path) -> None:
    groups = "4:cpu,cpuacct:/docker\n5:memory:/docker\n"
    assert limit(tmp_path, groups, {"memory/docker/memory.limit_in_bytes": "1000000\n"}) == 1_000_000


@pytest.mark.parametrize("content", ["max", str(2**63 - 4096), "rubbish", "", "0"])
def test_without_a_limit_it_is_the_machine_s(content: str, tmp_path: Path) -> None:
    assert limit(tmp_path, "0::/\n", {"memory.max": content}) == MACHINE
