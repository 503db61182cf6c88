"""Environments in a process of their own: the process, and the handle that talks to it.

Numbers pass through memory that both share; a message says when. On Linux a worker is forked, as PyTorch's data loaders
are: it starts in milliseconds and knows every environment that this process does.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any
from weakref import WeakSet

from eva_rl.envs import deadline
from eva_rl.envs.host import EnvHost, Maker, StepArrays
from eva_rl.errors import EnvironmentFailedError, UserError

log = logging.getLogger(__name__)
CLOSING = 5.0
"""Seconds in which a worker has to close its environments; then it is ended."""
PARENT_CHECK = 5.0
"""Seconds between two looks of an idle worker whether its parent is alive."""
CONTEXT: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")

_open_connections: WeakSet[Connection] = WeakSet()
"""This process's ends, which a worker that is forked later must not hold open."""


@dataclass(frozen=True)
class Assignment:
    """What a worker process is told when it starts.

    Attributes:
        memory: Of the shared arrays.
        sizes: Environments in all, numbers in an observation and in an action.
        makers: The worker's environments, by their row.
        stride: Distance between the seeds of two successive episodes of an environment.
    """

    memory: Any
    sizes: tuple[int, int, int]
    makers: dict[int, Maker]
    stride: int

    def host(self) -> EnvHost:
        """Make the environments."""
        return EnvHost(self.arrays, self.makers, self.stride)

    @property
    def arrays(self) -> StepArrays:
        """What the environments take and give."""
        return StepArrays.over(self.memory, *self.sizes)


def shared_memory(num_bytes: int) -> Any:
    """A buffer that worker processes share."""
    return CONTEXT.RawArray(ctypes.c_uint8, num_bytes)


class WorkerProcess:
    """Some environments in another process, with the methods of :class:`eva_rl.envs.host.EnvHost`.

    ``begin`` sends a call and ``finish`` waits for its end, so that many workers work at once.

    Args:
        assignment: What it hosts.
        names: The environments' names by row, for messages.
    """

    def __init__(self, assignment: Assignment, names: dict[int, str]) -> None:
        self._names, self._arrays, self._begun, self._answered = names, assignment.arrays, 0, 0
        self._connection, theirs = CONTEXT.Pipe()
        _open_connections.add(self._connection)
        self.process = CONTEXT.Process(target=_serve, args=(theirs, assignment, os.getpid()), daemon=True)
        with warnings.catch_warnings():  # the worker uses no lock that another thread may hold
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process.start()
        theirs.close()
        self._begun += 1  # the making of the environments is answered, too

    def begin(self, method: str, *args: Any, **kwargs: Any) -> int:
        """Let the worker call a method of its host; returns the number of the call."""
        try:
            self._connection.send((method, args, kwargs))
        except OSError as error:
            raise self._died() from error
        self._begun += 1
        return self._begun

    def finish(self, number: int) -> Any:
        """Wait until a call and those before it are over; returns what the last of them returned.

        Raises:
            EnvironmentFailedError: An environment failed, did not return for :data:`eva_rl.envs.deadline.LIMIT`, or the
                process died.
            UserError: An environment could not be made.
        """
        result = None
        while self._answered < number:
            result = self._answer()
        return result

    def _answer(self) -> Any:
        try:
            self._wait()
            kind, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        self._answered += 1
        if kind == "error":
            raise value
        return value

    def _wait(self) -> None:
        """Wait for an answer, as long as the environments move on; the time of a suspended process does not count."""
        state, silent, pause = self._state(), 0, deadline.LIMIT / deadline.LOOKS
        while not self._connection.poll(pause):
            before, state = state, self._state()
            silent = 0 if state != before else silent + 1
            if silent == deadline.LOOKS:
                raise self._ended()
            log.warning("The worker process of %s has not answered for %.0f s.", self._name, silent * pause)

    def _state(self) -> tuple[bytes, ...]:
        """Changes whenever an environment of this worker begins or ends a call."""
        rows, arrays = list(self._names), self._arrays
        return tuple(array[rows].tobytes() for array in (arrays.busy, arrays.steps, arrays.seeds))

    def _ended(self) -> EnvironmentFailedError:
        """End the process; says which environment did not return from which step."""
        self.process.kill()
        arrays, row = self._arrays, next((row for row in self._names if self._arrays.busy[row]), None)
        more = f"has not returned for {deadline.LIMIT:.0f} s (env.timeout=); its worker process was ended"
        if row is None:
            return EnvironmentFailedError(self._name, "while it was made", f"its constructor {more}")
        step = int(arrays.steps[row])
        where = f"in env step {step}" if step else "at the start"
        cause = f"{'step()' if step else 'reset()'} {more}"
        return EnvironmentFailedError(self._names[row], f"{where} of the episode seeded {arrays.seeds[row]}", cause)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the host and wait."""
        return self.finish(self.begin(method, *args, **kwargs))

    def close(self) -> None:
        """Close the environments and end the process."""
        self._connection.close()  # the worker closes its environments and ends when it reads the end
        self.process.join(CLOSING)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    @property
    def _name(self) -> str:
        return ", ".join(dict.fromkeys(self._names.values()))

    def _died(self) -> EnvironmentFailedError:
        self.process.join(1)
        status = self.process.exitcode
        how = f"by signal {signal.Signals(-status).name}" if status and status < 0 else f"with exit status {status}"
        cause = f"worker process {self.process.pid} ended {how}; with workers=0 the environments run in this process"
        return EnvironmentFailedError(self._name, "in a worker process", cause)


def _serve(connection: Connection, assignment: Assignment, parent: int) -> None:
    """The worker's main function: host environments until the other end closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    deadline.watched_elsewhere()  # by the parent, which ends this process
    for other in list(_open_connections):
        with contextlib.suppress(OSError):
            other.close()
    host: Any = None
    with contextlib.suppress(EOFError, OSError):
        host = _attempt(connection, assignment.host)
        while _waits(connection, parent):
            method, args, kwargs = connection.recv()
            _attempt(connection, lambda: getattr(host, method)(*args, **kwargs))  # noqa: B023 - called at once
    with contextlib.suppress(Exception):
        if host is not None:
            host.close()  # simulators, sockets and recorders of environments that own some
    os._exit(0)  # what the parent has registered to happen at its exit is not for the worker


def _waits(connection: Connection, parent: int) -> bool:
    """Wait for a message; False where the parent has died, also where another process holds its end open."""
    while not connection.poll(PARENT_CHECK):
        if os.getppid() != parent:
            return False
    return True


def _attempt(connection: Connection, call: Callable[[], Any]) -> Any:
    """Answer with what a call returns or raises."""
    try:
        result = call()
    except Exception as error:  # everything goes to the parent, which raises it
        known = isinstance(error, UserError)
        connection.send(("error", error if known else RuntimeError(f"{type(error).__name__}: {error}")))
        return None
    connection.send(("done", None if isinstance(result, EnvHost) else result))
    return result
