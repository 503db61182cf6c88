"""Where runs are started: processes on this machine, tasks of Ray, and jobs of Slurm through submitit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eva_rl.errors import UserError
from eva_rl.launch.jobs import RAY, SLURM, Job, Launcher, LaunchOptions, Running
from eva_rl.limits.threads import thread_limits


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
        if not options.address:
            self._check_room(options)
        task = ray.remote(_call)
        self._task = task.options(
            num_cpus=options.cpus, num_gpus=options.gpus_per_run, max_retries=options.retries, name="eva_rl"
        )

    def _check_room(self, options: LaunchOptions) -> None:
        """Raise where a run asks for more than this machine has: it would wait for ever."""
        there = self._ray.cluster_resources()
        for name, asked in (("CPU", options.cpus), ("GPU", options.gpus_per_run)):
            if asked > there.get(name, 0):
                self.close()
                raise UserError(
                    f"A run asks for {asked:g} {name}, and this machine has {there.get(name, 0):g}. Request less."
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

    def interrupt(self) -> None:
        """Cancel it."""
        if self.poll() is None:
            self._ray.cancel(self._reference)

    def end(self, seconds: float) -> None:
        """Give it so long to end; its worker kills it."""
        self._ray.wait([self._reference], timeout=seconds)


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
        """No resources to release."""


class SlurmJob:
    """A job of submitit."""

    def __init__(self, job: Any) -> None:
        self._job = job

    def poll(self) -> int | None:
        """Exit status, None while it runs; 1 where it ended without any."""
        if not self._job.done():
            return None
        return 1 if self._job.exception() is not None else int(self._job.result())

    def interrupt(self) -> None:
        """Cancel it."""
        if self.poll() is None:
            self._job.cancel()

    def end(self, seconds: float) -> None:
        """Slurm ends it."""


def missing_extra(name: str, error: ImportError) -> UserError:
    """The error of a package that is not installed."""
    return UserError(f"{name} is not installed ({error}). Install it with: pip install 'eva-rl[{name}]'")


class LocalLauncher:
    """Processes on this machine."""

    def __init__(self, options: LaunchOptions) -> None:
        cores = thread_limits().cpus
        self.capacity = options.jobs or max(1, cores // options.threads)

    def start(self, job: Job) -> Running | None:
        """Start a run; None where an earlier launch still works on it."""
        return job.start(forked=True)

    def close(self) -> None:
        """No resources to release."""


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
