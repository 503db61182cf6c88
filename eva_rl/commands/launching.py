"""Many runs behind one line of progress, and those that failed with their logs."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eva_rl.commands.command import console
from eva_rl.commands.launchers import Job, LaunchOptions, State, make_launcher, run_all

NAMES_SHOWN = 2


def launch(jobs: Sequence[Job], done: int, options: LaunchOptions, folder: Path) -> list[Job]:
    """Run jobs to their end, behind one line of progress.

    Args:
        jobs: Those to run.
        done: Runs that were finished before.
        options: How.
        folder: For what a launcher itself writes.

    Returns:
        Those that failed.

    Raises:
        UserError: The launcher cannot start.
    """
    if not jobs:
        return []
    launcher = make_launcher(options, folder)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that kill ends the runs as Ctrl-C does
    columns = (TextColumn("Runs"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"))
    try:
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
            bar = progress.add_task("", total=done + len(jobs), completed=done, shown="")

            def tell(state: State) -> None:
                ended = done + len(state.finished) + len(state.failed)
                progress.update(bar, completed=ended, shown=in_words(state))

            return run_all(jobs, launcher, options.retries, tell).failed
    finally:
        signal.signal(signal.SIGTERM, before)
        launcher.close()


def in_words(state: State) -> str:
    """What runs and what failed."""
    names = [job.name for job in state.running]
    more = f" +{len(names) - NAMES_SHOWN}" if len(names) > NAMES_SHOWN else ""
    failed = f"  [red]{len(state.failed)} failed[/]" if state.failed else ""
    return escape(", ".join(names[:NAMES_SHOWN]) + more) + failed


def list_failed(failed: Sequence[Job]) -> None:
    """Say which runs failed, why, and where their logs are."""
    for job in failed:
        console.print(f"[bold red]Failed:[/] {escape(f'{job.name}: {last_words(job.log)}')}", soft_wrap=True)
        console.print(f"        {escape(str(job.log))}", soft_wrap=True)


def last_words(log: Path) -> str:
    """The last line of a log that says something."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
