"""Ctrl-C and SIGTERM: both end a run where it can be resumed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def sigterm_like_ctrl_c() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM inside the block; forked children keep what SIGTERM does by default."""
    owner = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class DeferredInterrupt:
    """Whether an interruption waits for the end of a block.

    Attributes:
        requested: A signal came inside the block.
    """

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: the first waits, a second one interrupts at once."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def interrupts_deferred() -> Iterator[DeferredInterrupt]:
    """Let Ctrl-C, and SIGTERM where it is handled, wait until the block ends, and raise KeyboardInterrupt then."""
    deferred = DeferredInterrupt()
    handled = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN, None)]
    if threading.current_thread() is not threading.main_thread():
        handled = []
    before = {number: signal.signal(number, deferred) for number in handled}
    try:
        yield deferred
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if deferred.requested:
        raise KeyboardInterrupt
