"""Runs started side by side: in processes here, on a Ray cluster, or by Slurm; unfinished ones are started again."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from eva_rl.commands.options import between, one_of, option
from eva_rl.errors import UserError

LOCAL, RAY, SLURM = LAUNCHERS = ("local", "ray", "slurm")
CLUSTERS = ("slurm", "local", "debug")
POLL_SECONDS, PATIENCE_SECONDS = 0.2, 15.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class LaunchOptions:
    """How many runs are started."""

    launcher: str = option(LOCAL, "local processes, a ray cluster, or slurm")
    jobs: int = option(0, "local: runs at once; 0 for as many as there are cores for")
    threads: int = option(1, "CPU threads of each run")
    retries: int = option(1, "further attempts at a run that failed")
    cpus_per_run: float = option(0, "ray, slurm: CPUs that each run asks for; 0 takes threads=")
    gpus_per_run: float = option(0, "ray, slurm: GPUs that each run asks for; Ray takes fractions")
    address: str = option("", "ray: auto or ray://HOST:PORT for a cluster that is up; empty starts one here")
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

    def start(self) -> Running | None:
        """Start the run in a process of its own; None while one of an earlier launch still works on it.

        The process holds a lock for as long as it lives, also where whoever started it was killed.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.with_suffix(".lock").open("ab") as lock, self.log.open("ab") as log:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            if self.done.exists():
                return Ended()
            return Process(self._popen(log, lock.fileno()))

    def _popen(self, log: IO[bytes], lock: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", *self.command],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(self.threads))},
            start_new_session=True,
            pass_fds=(lock,),
        )

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
            process.stop()

    def checkpoint(self) -> Any:
        """What submitit submits when the time is up: the same again, which continues."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Running(Protocol):
    """A run under way."""

    def poll(self) -> int | None:
        """Exit status, None while it runs."""

    def stop(self) -> None:
        """End it, so that it can be continued; nothing where it has ended."""


class Launcher(Protocol):
    """Starts runs."""

    capacity: int
    """Runs that may be started before one has ended."""

    def start(self, job: Job) -> Running | None:
        """Start a run; None where it cannot start yet."""

    def close(self) -> None:
        """Give back what was taken."""


class Process:
    """A run in a process here, with whatever it starts."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def poll(self) -> int | None:
        """Exit status, None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Interrupt it, and kill it if that is not enough."""
        if self._process.poll() is not None:
            return
        self._signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


class Ended:
    """A run that has ended well already."""

    def poll(self) -> int:
        """Exit status."""
        return 0

    def stop(self) -> None:
        """Nothing runs."""


class LocalLauncher:
    """Processes on this machine."""

    def __init__(self, options: LaunchOptions) -> None:
        cores = len(os.sched_getaffinity(0))
        self.capacity = options.jobs or max(1, cores // options.threads)

    def start(self, job: Job) -> Running | None:
        """Start a run; None where an earlier launch still works on it."""
        return job.start()

    def close(self) -> None:
        """Nothing was taken."""


class RayLauncher:
    """Tasks of Ray; the run directories have to lie where all machines see them.

    Raises:
        UserError: Ray is not installed, or there is no cluster at the address.
    """

    capacity = 10**6  # Ray keeps the queue

    def __init__(self, options: LaunchOptions) -> None:
        try:
            import ray
        except ImportError as error:
            raise missing_extra("ray", error) from error
        self._ray = ray
        own = {"include_dashboard": False, "object_store_memory": 100 * 2**20}
        try:
            ray.init(address=options.address or "local", log_to_driver=False, **({} if options.address else own))
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"address={options.address}: {error} Start one with ray start --head.") from error
        task = ray.remote(_call)
        self._task = task.options(
            num_cpus=options.cpus, num_gpus=options.gpus_per_run, max_retries=options.retries, name="eva_rl"
        )

    def start(self, job: Job) -> Running:
        """Queue a run."""
        return RayTask(self._ray, self._task.remote(job))

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self._ray.shutdown()


def _call(job: Job) -> int:
    return job()


class RayTask:
    """A task of Ray."""

    def __init__(self, ray: Any, reference: Any) -> None:
        self._ray, self._reference = ray, reference

    def poll(self) -> int | None:
        """Exit status, None while it runs; 1 where its machine was lost too often."""
        ended, _ = self._ray.wait([self._reference], timeout=0)
        if not ended:
            return None
        try:
            return int(self._ray.get(self._reference))
        except self._ray.exceptions.RayError:
            return 1

    def stop(self) -> None:
        """Interrupt it."""
        if self.poll() is None:
            self._ray.cancel(self._reference)
            self._ray.wait([self._reference], timeout=PATIENCE_SECONDS)


class SlurmLauncher:
    """Jobs of Slurm through submitit.

    Raises:
        UserError: submitit is not installed, or there is no Slurm here.
    """

    capacity = 10**6  # Slurm keeps the queue

    def __init__(self, options: LaunchOptions, folder: Path) -> None:
        try:
            import submitit
        except ImportError as error:
            raise missing_extra("submitit", error) from error
        try:
            self._executor = submitit.AutoExecutor(folder, cluster=options.cluster)
        except (RuntimeError, OSError) as error:
            raise UserError(f"launcher=slurm: {error} Start this where sbatch is, or try cluster=local.") from error
        self._executor.update_parameters(
            name="eva_rl",
            timeout_min=max(1, round(60 * options.hours)),
            cpus_per_task=max(1, round(options.cpus)),
            gpus_per_node=round(options.gpus_per_run),
            **({"slurm_partition": options.partition} if options.partition else {}),
        )

    def start(self, job: Job) -> Running:
        """Submit a run."""
        return SlurmJob(self._executor.submit(job))

    def close(self) -> None:
        """Nothing was taken."""


class SlurmJob:
    """A job of submitit."""

    def __init__(self, job: Any) -> None:
        self._job = job

    def poll(self) -> int | None:
        """Exit status, None while it runs; 1 where it ended without any."""
        if not self._job.done():
            return None
        return 1 if self._job.exception() is not None else int(self._job.result())

    def stop(self) -> None:
        """Cancel it."""
        self._job.cancel()


def missing_extra(name: str, error: ImportError) -> UserError:
    """The error of a package that is not installed."""
    return UserError(f"{name} is not installed ({error}). Install it with: pip install 'eva-rl[{name}]'")


def make_launcher(options: LaunchOptions, folder: Path) -> Launcher:
    """The launcher of the options.

    Args:
        options: Which, and how.
        folder: For what a launcher itself writes.
    """
    if options.launcher == RAY:
        return RayLauncher(options)
    if options.launcher == SLURM:
        return SlurmLauncher(options, folder)
    return LocalLauncher(options)


@dataclass
class State:
    """How far a set of runs is.

    Attributes:
        waiting: Not started, with the attempts made.
        running: Under way.
        finished: Ended well.
        failed: Failed at every attempt.
    """

    waiting: deque[tuple[Job, int]]
    running: dict[Job, tuple[Running, int]] = field(default_factory=dict)
    finished: list[Job] = field(default_factory=list)
    failed: list[Job] = field(default_factory=list)


def run_all(jobs: Sequence[Job], launcher: Launcher, retries: int, tell: Callable[[State], None]) -> State:
    """Run jobs until all have ended; those that fail are tried again, after the others.

    Whatever interrupts this ends the runs that are under way.

    Args:
        jobs: In the order in which they are started.
        launcher: Starts them.
        retries: Further attempts.
        tell: Called as things change, and while they do not.
    """
    state = State(deque((job, 0) for job in jobs))
    with _stopping(state):
        while state.waiting or state.running:
            _start(state, launcher)
            _collect(state, retries)
            tell(state)
            time.sleep(POLL_SECONDS)
    return state


@contextmanager
def _stopping(state: State) -> Any:
    try:
        yield
    finally:
        for running, _ in state.running.values():
            running.stop()


def _start(state: State, launcher: Launcher) -> None:
    for _ in range(len(state.waiting)):
        if len(state.running) >= launcher.capacity:
            return
        job, attempts = state.waiting.popleft()
        running = launcher.start(job)
        if running is None:
            state.waiting.append((job, attempts))
        else:
            state.running[job] = (running, attempts)


def _collect(state: State, retries: int) -> None:
    for job, (running, attempts) in list(state.running.items()):
        status = running.poll()
        if status is None:
            continue
        del state.running[job]
        if status == 0:
            state.finished.append(job)
        elif attempts < retries:
            state.waiting.append((job, attempts + 1))
        else:
            state.failed.append(job)
