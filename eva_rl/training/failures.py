"""What ends training early, and what is saved then: numbers that are not finite, dead workers, Ctrl-C and SIGTERM."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeAlias

from eva_rl.errors import ActionNotFiniteError, EnvironmentFailedError, TerminatedError, UserError
from eva_rl.files import write_file, write_json

if TYPE_CHECKING:
    from eva_rl.batch import NStepBatch, WindowBatch

log = logging.getLogger(__name__)

FAILED_BATCH = "failed_batch.safetensors"
NOT_FINITE_FILE = "not_finite.json"
"""What a run leaves that ended because its numbers or actions were not finite, with the reason, until it goes on."""
Batch: TypeAlias = "WindowBatch | NStepBatch"


class NotFiniteError(UserError):
    """A loss, a gradient, a reward or an observation is infinite or not a number.

    Args:
        what: Which.
        step: Gradient step or env step.
        batch: What it was computed from, where there is a batch.
    """

    def __init__(self, what: str, step: int, batch: Batch | None = None) -> None:
        super().__init__(
            f"{what} is not finite at step {step}. The parameters and the last checkpoint are as they were before. "
            "Lower algo.learning_rate, or look for outliers in the data."
        )
        self.batch = batch


@contextmanager
def failures_kept(run_dir: Path) -> Iterator[None]:
    """Note a :class:`NotFiniteError` and save its batch, and explain what happened and what to do.

    Raises:
        ActionNotFiniteError: It was raised inside; it is noted, too.
        UserError: A NotFiniteError was raised inside, or a worker process of an environment died.
    """
    (run_dir / NOT_FINITE_FILE).unlink(missing_ok=True)
    try:
        yield
    except NotFiniteError as error:
        write_json(run_dir / NOT_FINITE_FILE, {"reason": str(error)})
        kept = _keep(run_dir / FAILED_BATCH, error.batch)
        raise UserError(f"Stopped: {error}{kept}") from error
    except ActionNotFiniteError as error:
        write_json(run_dir / NOT_FINITE_FILE, {"reason": str(error)})
        raise
    except (EOFError, BrokenPipeError, ConnectionResetError) as error:
        raise UserError(
            f"A worker process of the environments died. Type the same command with run_dir={run_dir} to continue from "
            "the last checkpoint; with algo.workers=0 the environments run in this process and show their own error."
        ) from error


def _keep(path: Path, batch: Batch | None) -> str:
    if batch is None:
        return ""
    found = {name: x.detach().cpu().contiguous() for name, x in batch.tensors().items()}
    from safetensors.torch import save_file  # brings torch, which those who only catch signals do without

    write_file(path, lambda aside: save_file(found, aside))
    return f" Its batch is kept in {path}."


SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def sigterm_like_ctrl_c() -> Iterator[None]:
    """Raise TerminatedError, a KeyboardInterrupt, on SIGTERM; forked children keep what SIGTERM does by default."""
    owner = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        raise TerminatedError

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
        interruption: What the signal raises.
    """

    def __init__(self) -> None:
        self.requested = False
        self.interruption: type[KeyboardInterrupt] = KeyboardInterrupt

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: the first waits, a second one interrupts at once."""
        self.interruption = TerminatedError if number == signal.SIGTERM else KeyboardInterrupt
        if self.requested:
            raise self.interruption
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
        raise deferred.interruption


@contextmanager
def interrupts_saved(save: Callable[[], None]) -> Iterator[None]:
    """Save where Ctrl-C or SIGTERM ends the block."""
    try:
        yield
    except KeyboardInterrupt:
        save()
        raise


@contextmanager
def saved_on_failure(save: Callable[[], None] | None) -> Iterator[None]:
    """Save what was learned before an environment failed, and say so in the error.

    Args:
        save: Does it; None where nothing is saved.

    Raises:
        EnvironmentFailedError: It was raised inside.
    """
    try:
        yield
    except ActionNotFiniteError:  # the policy itself has diverged: the last checkpoint is better
        raise
    except EnvironmentFailedError as failure:
        if save is None:
            raise
        save()
        raise failure.saved() from failure


def warn_untrained(steps: int, name: str) -> None:
    """Say so where a run ends before the policy's first gradient step."""
    if not steps:
        log.warning(
            "algo=%s ended before the policy's first gradient step: it is as it was. Raise algo.env_steps, or lower "
            "what has to be played or learned before (algo.learning_starts, algo.critic_warmup, algo.num_envs).",
            name,
        )
