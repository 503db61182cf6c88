"""Runs started side by side: in processes here, on a Ray cluster, or by Slurm; unfinished ones are started again."""

from __future__ import annotations

import fcntl
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from eva_rl.errors import UserError
from eva_rl.launch.processes import PATIENCE_SECONDS, ForkedProcess, FreshProcess
from eva_rl.options import between, one_of, option

LOCAL, RAY, SLURM = LAUNCHERS = ("local", "ray", "slurm")
CLUSTERS = ("slurm", "local", "debug")
OF_LAUNCHERS = {
    "jobs": (LOCAL,), "cpus_per_run": (RAY, SLURM), "gpus_per_run": (RAY, SLURM), "address": (RAY,),
    "partition": (SLURM,), "hours": (SLURM,), "cluster": (SLURM,),
}  # fmt: skip
"""Options that not every launcher has a use for."""
POLL_SECONDS = 0.2
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class LaunchOptions:
    """How many runs are started."""

    launcher: str = option(LOCAL, "local processes, a ray cluster, or slurm")
    jobs: int = option(0, "local: number of parallel runs; 0 for as many as the cores allow")
    threads: int = option(1, "CPU threads of each run")
    retries: int = option(1, "retries of a failed run")
    cpus_per_run: float = option(0, "ray, slurm: CPUs that each run asks for; 0 uses threads=")
    gpus_per_run: float = option(0, "ray, slurm: GPUs that each run asks for; Ray takes fractions")
    address: str = option("", "ray: auto or ray://HOST:PORT for a running cluster; empty starts a local one")
    partition: str = option("", "slurm: partition")
    hours: float = option(24, "slurm: time limit of a run, which continues in another job if it needs more")
    cluster: str = option(SLURM, "submitit's cluster: slurm, or local and debug for a try without one")

    def __post_init__(self) -> None:
        one_of(LAUNCHERS, launcher=self.launcher)
        one_of(CLUSTERS, cluster=self.cluster)
        between(0, 4096, jobs=self.jobs, cpus_per_run=self.cpus_per_run, gpus_per_run=self.gpus_per_run)
        between(1, 4096, threads=self.threads)
        between(0, 100, retries=self.retries)
        between(0.01, 10_000, hours=self.hours)
        for key, launchers in OF_LAUNCHERS.items():
            value = getattr(self, key)
            if value != getattr(LaunchOptions, key) and self.launcher not in launchers:
                typed = " or ".join(f"launcher={name}" for name in launchers)
                raise UserError(
                    f"{key}={value}: launcher={self.launcher} has no use for it. Type {typed} as well, or leave it out."
                )
        if self.launcher == SLURM and self.gpus_per_run != round(self.gpus_per_run):
            raise UserError(f"gpus_per_run={self.gpus_per_run}: Slurm gives whole GPUs. Type a whole number.")

    @property
    def cpus(self) -> float:
        """CPUs of a run."""
        return self.cpus_per_run or self.threads


@dataclass(frozen=True)
class Job:
    """One run, as a command that continues where it was interrupted.

    Attributes:
        name: For people.
        command: What comes after ``python -m``.
        log: Where it speaks; appended to.
        done: A file that exists once it has ended well.
        threads: CPU threads.
    """

    name: str
    command: tuple[str, ...]
    log: Path
    done: Path
    threads: int = 1

    def start(self, *, forked: bool = False) -> Running | None:
        """Start the run in a process of its own; None while one of an earlier launch still works on it.

        The process holds a lock for as long as it lives, also where whoever started it was killed.

        Args:
            forked: Fork it from a process that has imported everything, which saves the seconds of a start.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.with_name(self.log.name + ".lock").open("ab") as lock, self.log.open("ab") as log:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            if self.done.exists():
                return Ended()
            kind = ForkedProcess if forked else FreshProcess
            return kind(self.command, self._environment(), lock.fileno(), log.fileno())

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(self.threads))}

    def __call__(self) -> int:
        """Run to the end, on whatever machine this is; returns the exit status."""
        process = self.start()
        while process is None:
            time.sleep(POLL_SECONDS)
            process = self.start()
        try:
            while (status := process.poll()) is None:
                time.sleep(POLL_SECONDS)
            return status
        finally:
            stop_all([process])

    def checkpoint(self) -> Any:
        """What submitit submits when the time is up: the same again, which continues."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def check_names(names: Sequence[str]) -> None:
    """Raise where two runs have one folder, as ``a/b`` and ``a-b`` have: the second would count as finished.

    Raises:
        UserError: Naming it.
    """
    twice = next((name for name, number in Counter(names).items() if number > 1), None)
    if twice is not None:
        raise UserError(
            f"Two runs would share the folder {twice}: a value is typed twice, or two paths differ by / and - alone. "
            "Leave one of them out, or run it apart."
        )


class Running(Protocol):
    """A run under way."""

    def poll(self) -> int | None:
        """Exit status, None while it runs."""

    def interrupt(self) -> None:
        """Ask it to end, so that it can be continued, and return at once."""

    def end(self, seconds: float) -> None:
        """Give it so long to end after :meth:`interrupt`, and kill it where that is not enough."""


def stop_all(runs: Sequence[Running], seconds: float = PATIENCE_SECONDS) -> None:
    """End runs so that they can be continued: they have the seconds in common; a second interruption kills them."""
    deadline = time.monotonic() + seconds
    try:
        for run in runs:
            run.interrupt()
        for run in runs:
            run.end(max(0.0, deadline - time.monotonic()))
    finally:
        for run in runs:
            run.end(0.0)


class Launcher(Protocol):
    """Starts runs."""

    capacity: int
    """Runs that may be started before one has ended."""

    def start(self, job: Job) -> Running | None:
        """Start a run; None where it cannot start yet."""

    def close(self) -> None:
        """Release what was acquired."""


class Ended:
    """A run that has ended well already."""

    def poll(self) -> int:
        """Exit status."""
        return 0

    def interrupt(self) -> None:
        """Nothing runs."""

    def end(self, seconds: float) -> None:
        """Nothing runs."""
