"""Commands that kill themselves at a numbered moment: a file operation in their folder, an action, a gradient step."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from eva_rl.agents import DecisionTransformerPolicy

Main = Callable[[Sequence[str]], int]

FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
STEPPED, ACTED = "moment.stepped", "moment.acted"
"""Audit events of our own: after a gradient step, before an action."""
PHASES: Mapping[str, str] = {
    "save_checkpoint": "checkpoint",
    "load_latest_checkpoint": "checkpoint",
    "evaluate_policy": "evaluation",
    "attach": "eva",
    "report_start": "eva",
    "_load_data": "data",
    "open_run": "start",
    "open_record": "record",
    "distill": "distillation",
    "train": "train",
    "write_results": "save",
    "keep": "keep",
    "keep_study": "start",
    "report": "report",
}
"""The innermost of these functions that is under way names the phase."""


@dataclass(frozen=True)
class Command:
    """What is run, and killed.

    Attributes:
        main: Of a command.
        argv: Its overrides; ``{out}`` stands for the folder that it writes.
    """

    main: Main
    argv: Sequence[str]

    def moments(self, out: Path) -> list[str]:
        """Run to the end; the phase of each moment that there is to die at."""
        found = out.with_suffix(".moments")
        assert self._fork(out, None, found) == 0, out.with_suffix(".log").read_text()
        phases: list[str] = json.loads(found.read_text())
        return phases

    def killed(self, out: Path, moment: int) -> None:
        """Run until a moment."""
        assert self._fork(out, moment, None) == -signal.SIGKILL, out.with_suffix(".log").read_text()

    def finished(self, out: Path) -> None:
        """Run to the end, undisturbed."""
        assert self._fork(out, None, None) == 0, out.with_suffix(".log").read_text()

    def _fork(self, out: Path, moment: int | None, found: Path | None) -> int | None:
        process = multiprocessing.get_context("fork").Process(target=self._run, args=(out, moment, found))
        process.start()
        process.join(120)
        process.kill()
        return process.exitcode

    def _run(self, out: Path, moment: int | None, found: Path | None) -> None:
        log = out.with_suffix(".log").open("ab", buffering=0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        moments = Moments(out, moment)
        if moment is not None or found is not None:
            moments.watch()
        status = self.main([word.format(out=out) for word in self.argv])
        if found is not None:
            found.write_text(json.dumps(moments.phases))
        sys.stdout.flush()
        os._exit(status)


class Moments:
    """Counts the moments of this process, and ends it at one of them.

    Args:
        folder: File operations outside of it are not counted.
        last: At which to die; None for never.
    """

    def __init__(self, folder: Path, last: int | None) -> None:
        self._folder, self._last, self.phases = str(folder), last, list[str]()

    def watch(self) -> None:
        """Begin; there is no end, for audit hooks cannot be taken away."""
        act = DecisionTransformerPolicy.act

        def acting(*args: Any, **kwargs: Any) -> Any:
            sys.audit(ACTED)
            return act(*args, **kwargs)

        DecisionTransformerPolicy.act = acting  # type: ignore[method-assign]
        register_optimizer_step_post_hook(lambda *_: sys.audit(STEPPED))
        sys.addaudithook(self._heard)

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        ours = event in {STEPPED, ACTED}
        if not ours and not (event in FILE_EVENTS and args and self._folder in str(args[0])):
            return
        if threading.current_thread() is not threading.main_thread():  # TensorBoard writes when it likes
            return
        self.phases.append(_phase(sys._getframe()))
        if len(self.phases) - 1 == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


def _phase(frame: FrameType | None) -> str:
    while frame is not None:
        if frame.f_code.co_name in PHASES and "eva_rl" in str(frame.f_globals.get("__name__")):
            return PHASES[frame.f_code.co_name]
        frame = frame.f_back
    return "other"
