"""Runs in processes here: started afresh, or forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver, reduction
from typing import Any

PRELOADED = (
    *("h5py", "metaworld", "peft", "safetensors.torch", "scipy.stats", "torch.utils.tensorboard"),
    *("eva_rl.finetune.command", "eva_rl.finetune.phases"),
)
"""What the fork server imports: what a fine-tuning run does; nothing of it touches a device."""
PATIENCE_SECONDS = 15.0
"""What a run that is interrupted has to write its checkpoint."""
FORK_SECONDS = 5.0
"""What a fork has to begin its session."""


class SessionProcess(ABC):
    """A process that leads a session of its own, with whatever it starts."""

    @property
    @abstractmethod
    def pid(self) -> int:
        """Its number, which is its session's, too."""

    @abstractmethod
    def poll(self) -> int | None:
        """Exit status, None while it runs."""

    @abstractmethod
    def wait(self, seconds: float | None = None) -> None:
        """Return when it has ended, or when the seconds are over."""

    def interrupt(self) -> None:
        """Ask it to end, and return at once."""
        self._signal(signal.SIGINT)

    def end(self, seconds: float) -> None:
        """Give it so long to end, and kill it where that is not enough."""
        self.wait(seconds)
        if self.poll() is None:
            self._signal(signal.SIGKILL)
            self.wait()

    def _signal(self, number: signal.Signals) -> None:
        """Send it to the session, once there is one: a fork that has just begun would ignore an interruption."""
        late = time.monotonic() + FORK_SECONDS
        with suppress(ProcessLookupError, PermissionError):
            while self.poll() is None and os.getpgid(self.pid) != self.pid and time.monotonic() < late:
                time.sleep(0.01)
            if self.poll() is None:
                os.killpg(self.pid, number)


class FreshProcess(SessionProcess):
    """``python -m COMMAND`` in a process of its own.

    Args:
        command: A module and its arguments.
        environment: Environment variables.
        lock: File descriptor that the run keeps open while it lives.
        log: File descriptor of what it prints.
    """

    def __init__(self, command: tuple[str, ...], environment: dict[str, str], lock: int, log: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
            pass_fds=(lock,),
        )

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def poll(self) -> int | None:
        """Exit status, None while it runs."""
        return self._process.poll()

    def wait(self, seconds: float | None = None) -> None:
        """Return when it has ended, or when the seconds are over."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)


class ForkedProcess(SessionProcess):
    """``python -m COMMAND`` in a fork of a server that has imported everything; it starts with the first of them.

    The fork sees the environment given. Threads of numerical libraries other than torch are those of the first run,
    whose environment the server was started with.

    Args:
        command: A module and its arguments.
        environment: Environment variables.
        lock: File descriptor that the run keeps open while it lives.
        log: File descriptor of what it prints.
    """

    def __init__(self, command: tuple[str, ...], environment: dict[str, str], lock: int, log: int) -> None:
        _start_server(environment)
        context = multiprocessing.get_context("forkserver")
        arguments = (command, environment, _Inherited(lock), _Inherited(log))
        self._process = context.Process(target=_run, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int:
        """Its number."""
        assert self._process.pid is not None, "it has been started"
        return self._process.pid

    def poll(self) -> int | None:
        """Exit status, None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> None:
        """Return when it has ended, or when the seconds are over."""
        self._process.join(seconds)


def _start_server(environment: dict[str, str]) -> None:
    """Start the fork server with an environment; nothing where it runs."""
    before = dict(os.environ)
    os.environ.update(environment)
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # or a library that asks for a GPU spoils it for forks
    try:
        forkserver.set_forkserver_preload(list(PRELOADED))
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Inherited:
    """A file descriptor that a forked run gets, at whatever number it has there."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _detach, (reduction.DupFd(self._descriptor),)


def _detach(duplicate: Any) -> int:
    found: int = duplicate.detach()
    return found


def _run(command: tuple[str, ...], environment: dict[str, str], lock: int, log: int) -> None:
    """What ``python -m COMMAND`` does, in a session of its own and with its output in the log."""
    os.setsid()
    os.set_inheritable(lock, False)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.close(log)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [*command]
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
