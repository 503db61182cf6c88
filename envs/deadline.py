"""A limit for calls of an environment in this process: what never returns is interrupted, with one message.

A thread looks every few seconds whether the main thread is still in the same call. When :data:`LIMIT` is over it sends
a signal, whose handler raises in the main thread: Python code, and whatever gives way to signals, ends there. What does
not end within :data:`GRACE` is a call of compiled code that cannot be interrupted; then the process ends with the same
message, and the checkpoints that were written before are what is left. A call that holds Python's lock for ever stops
this thread, too: such a process has to be killed from outside.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import cache
from types import FrameType, TracebackType
from typing import Any

from eva_rl.envs.names import TIMEOUT
from eva_rl.errors import EnvironmentFailedError

LIMIT = TIMEOUT
"""Seconds that one call of an environment may take, in this process or in a worker; see :func:`limit_calls`."""
GRACE = 10.0
"""Seconds in which an interrupted call has to end."""
LOOKS = 10
"""Looks in one limit, at least. They are what is counted: the time in which a process is suspended is none."""
PAUSE = 1.0
"""Seconds between two looks of the thread, at most."""
SIGNAL: Any = getattr(signal, "SIGURG", None)
"""Hardly anybody's, and ignored by default; Go's runtime uses it to the same end, for the same reasons."""
_owned_elsewhere: set[int] = set()
"""Processes whose environments somebody else watches."""


def limit_calls(seconds: float) -> None:
    """Let each call of an environment take so long from here on, in this process and in its worker processes."""
    global LIMIT  # noqa: PLW0603 - of the whole process, as torch's number of threads is
    LIMIT = seconds


class Overdue(BaseException):
    """Raised inside a call that has taken too long; no ``except Exception`` of an environment stops it."""


class Deadline:
    """A block that is one call of an environment.

    Args:
        failed: Makes the error of a cause.
        call: What is called, for the message: ``step()``.

    Raises:
        EnvironmentFailedError: The block has not ended for :data:`LIMIT`.
    """

    __slots__ = ("_call", "_failed", "_outer", "_watch", "expired")

    def __init__(self, failed: Callable[[str], EnvironmentFailedError], call: str) -> None:
        self._failed, self._call, self.expired = failed, call, False
        self._watch: _Watch | None = None

    def error(self, more: str = "") -> EnvironmentFailedError:
        """What is raised when the limit is over."""
        return self._failed(f"{self._call} has not returned for {LIMIT:.0f} s (env.timeout=){more}")

    def __enter__(self) -> None:
        process = os.getpid()
        if SIGNAL is None or process in _owned_elsewhere or threading.get_ident() != threading.main_thread().ident:
            return  # only the main thread can be interrupted by a signal
        self._watch = _watch_of(process)
        self._outer, self._watch.deadline = self._watch.deadline, self

    def __exit__(self, kind: type[BaseException] | None, _: object, trace: TracebackType | None) -> None:
        if self._watch is None:
            return
        try:
            with self._watch.lock:  # from here on no signal is sent for this call
                self._watch.deadline = self._outer
        except Overdue:
            kind = Overdue
        if kind is Overdue:
            raise self.error() from None


class _Watch:
    """The thread, and the call that it looks at.

    Its handler stays in place, for to set one takes as long as a small env step; signals of others pass through.
    """

    def __init__(self) -> None:
        self.deadline: Deadline | None = None
        self.lock = threading.Lock()
        self._others = signal.signal(SIGNAL, self._handle)
        threading.Thread(target=self._look, name="environments' deadline", daemon=True).start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.deadline is not None and self.deadline.expired:
            raise Overdue
        if callable(self._others):
            self._others(number, frame)

    def _look(self) -> None:
        pause, seen, waited = threading.Event(), self.deadline, 0.0
        while True:
            interval = min(PAUSE, LIMIT / LOOKS)
            pause.wait(interval)
            if self.deadline is None or self.deadline is not seen:
                seen, waited = self.deadline, 0.0
                continue
            waited += interval
            if waited >= LIMIT and not seen.expired:
                self._interrupt(seen)
            elif waited >= LIMIT + GRACE:
                _end(seen)

    def _interrupt(self, late: Deadline) -> None:
        with self.lock:
            late.expired = True
            if self.deadline is late and signal.getsignal(SIGNAL) == self._handle:
                signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)


@cache
def _watch_of(process: int) -> _Watch:
    """One for each process: threads do not survive a fork."""
    return _Watch()


def watched_elsewhere() -> None:
    """Leave the environments of this process to another one, which ends it."""
    _owned_elsewhere.add(os.getpid())


def _end(late: Deadline) -> None:
    """End the process, whose main thread does not come back."""
    more = (
        " and could not be interrupted, so that the process was ended. The checkpoints are those that were written "
        "before; a run continues from its last by the same command with its run_dir="
    )
    sys.stderr.write(f"Error: {late.error(more)}\n")
    sys.stderr.flush()
    os._exit(2)
