from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from eva_rl.limits.threads import ThreadLimits, thread_limits


def limits(root: Path, groups: str, **environment: str) -> ThreadLimits:
    process = root / "self"
    process.write_text(groups)
    return thread_limits(environment, root, process)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("place", ["cpu.max", "pod/cpu.max", "pod/box/cpu.max"])
def test_a_quota_of_version_2_anywhere_above_the_process_counts(place: str, tmp_path: Path) -> None:
    write(tmp_path / "pod/box/other", "")
    write(tmp_path / place, "150000 100000\n")
    assert limits(tmp_path, "0::/pod/box\n").quota == 1.5
    assert limits(tmp_path, "0::/pod/box\n").threads == 1


def test_a_quota_of_version_1(tmp_path: Path) -> None:
    write(tmp_path / "cpu/docker/cpu.cfs_quota_us", "400000\n")
    write(tmp_path / "cpu/docker/cpu.cfs_period_us", "100000\n")
    found = limits(tmp_path, "5:memory:/docker\n4:cpu,cpuacct:/docker\n")
    assert found.quota == 4
    assert found.threads == min(4, len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("content", ["max 100000", "-1", "rubbish", ""])
def test_no_quota(content: str, tmp_path: Path) -> None:
    write(tmp_path / "cpu.max", content)
    found = limits(tmp_path, "0::/\n")
    assert math.isinf(found.quota)
    assert found.threads == len(os.sched_getaffinity(0))


def test_the_environment_decides_within_the_affinity(tmp_path: Path) -> None:
    assert limits(tmp_path, "", OMP_NUM_THREADS="1").threads == 1
    assert limits(tmp_path, "", OMP_NUM_THREADS="9999").threads == len(os.sched_getaffinity(0))
    assert limits(tmp_path, "", OMP_NUM_THREADS="0").environment is None
    assert ThreadLimits(8, 2.5, None).threads == 2
    assert ThreadLimits(8, 0.5, None).threads == 1
    assert ThreadLimits(8, 6.0, None).of_each(2) == 3
    assert ThreadLimits(8, 6.0, None).of_each(16) == 1
    assert ThreadLimits(16, math.inf, 4).of_each(4) == 4, "the variable is of a process"
    assert str(ThreadLimits(8, 2.5, 1)) == "8 CPUs by affinity, a quota of 2.5 CPUs, OMP_NUM_THREADS=1"
