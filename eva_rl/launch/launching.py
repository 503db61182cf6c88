"""Many runs until all have ended: what fails is tried again, one line of progress, failures with their logs."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eva_rl.cli.console import console, say
from eva_rl.errors import TerminatedError
from eva_rl.launch.jobs import POLL_SECONDS, Job, Launcher, LaunchOptions, Running, stop_all
from eva_rl.launch.launchers import make_launcher

NAMES_SHOWN = 2


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
def _stopping(state: State) -> Iterator[None]:
    try:
        yield
    finally:
        stop_all([running for running, _ in state.running.values()])


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


def launch(
    jobs: Sequence[Job],
    done: int,
    options: LaunchOptions,
    folder: Path,
    ended: Callable[[Job], None] | None = None,
) -> list[Job]:
    """Run jobs to their end, behind one line of progress.

    Args:
        jobs: Those to run.
        done: Runs that were finished before.
        options: How.
        folder: For what a launcher itself writes.
        ended: Called with each run that has ended well.

    Returns:
        Those that failed.

    Raises:
        UserError: The launcher cannot start.
    """
    if not jobs:
        return []
    launcher = make_launcher(options, folder)
    before = signal.signal(signal.SIGTERM, _terminate)  # ends the runs as Ctrl-C does
    columns = (TextColumn("Runs"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"))
    try:
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
            bar = progress.add_task("", total=done + len(jobs), completed=done, shown="")

            told: set[Job] = set()

            def tell(state: State) -> None:
                for job in state.finished:
                    if ended is not None and job not in told:
                        ended(job)
                told.update(state.finished)
                completed = done + len(state.finished) + len(state.failed)
                progress.update(bar, completed=completed, shown=in_words(state))

            return run_all(jobs, launcher, options.retries, tell).failed
    finally:
        signal.signal(signal.SIGTERM, before)
        launcher.close()


def _terminate(number: int, frame: FrameType | None) -> None:
    raise TerminatedError


def in_words(state: State) -> str:
    """What runs and what failed."""
    names = [job.name for job in state.running]
    more = f" +{len(names) - NAMES_SHOWN}" if len(names) > NAMES_SHOWN else ""
    failed = f"  [red]{len(state.failed)} failed[/]" if state.failed else ""
    return escape(", ".join(names[:NAMES_SHOWN]) + more) + failed


def list_failed(failed: Sequence[Job]) -> None:
    """Say which runs failed, why, and where their logs are."""
    for job in failed:
        say(f"[bold red]Failed:[/] {escape(f'{job.name}: {last_words(job.log)}')}", markup=True)
        say(f"        {job.log}")


def last_words(log: Path) -> str:
    """The last line of a log that says something."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
