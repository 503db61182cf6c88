"""Commands in a fork of this process: one that is killed or limited needs not import everything once more."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from eva_rl.training import checkpoint


def start(command: Callable[[], int], log: Path) -> BaseProcess:
    """Begin a command, whose output goes to a file; its result becomes the exit status."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(command, log))
    process.start()
    return process


def status(command: Callable[[], int], log: Path) -> int | None:
    """Exit status of a command, -N where signal N ended it."""
    process = start(command, log)
    process.join(300)
    process.kill()
    return process.exitcode


def killed_at_checkpoint(command: Callable[[], int], step: int, log: Path) -> bool:
    """Begin a command that dies once its checkpoint of a step is written; whether it did."""
    save = checkpoint.save_checkpoint

    def dying(folder: Path, state: Any, *rest: Any) -> None:
        save(folder, state, *rest)
        if state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def doomed() -> int:
        checkpoint.save_checkpoint = dying  # in the fork alone
        return command()

    return status(doomed, log) == -signal.SIGKILL


def _run(command: Callable[[], int], log: Path) -> None:
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    os._exit(command())
