"""Console output of the commands."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

Log = Callable[[Mapping[str, float], int], None]
SHOWN = {
    "train/loss": "loss {:.4f}",
    "time/updates_per_second": "{:.1f} updates/s",
    "time/fps": "{:.0f} env steps/s",
    "rollout/ep_rew_mean": "return {:.0f}",
    "rollout/success_rate": "rollouts {:.2f}",
    "eval/success_rate": "success {:.2f}",
    "validation/success_rate": "success {:.2f}",
}
OF_ENV_STEPS = ("time/env_steps", "time/total_timesteps")
"""Env steps taken to learn from, validation's not among them: ours, and Stable-Baselines3's."""
LINE_SECONDS = 30.0
"""Between two lines where the output is no terminal."""

console = Console(stderr=True, highlight=False, emoji=False)


def say(text: str, *, markup: bool = False) -> None:
    """Print sentences: a terminal gets whole words, and paths that can be copied; a log gets one line a paragraph.

    Args:
        text: What to say.
        markup: Whether square brackets are Rich's markup, as in ``[bold red]Error:[/]``; what is in it is escaped then.
    """
    if console.is_terminal:
        wrapper = textwrap.TextWrapper(console.width, break_long_words=False, break_on_hyphens=False)
        text = "\n".join(map(wrapper.fill, text.split("\n")))
    console.print(text, markup=markup, soft_wrap=True)


class Bar(Protocol):
    """What shows how far a phase is."""

    def show(self, completed: int, shown: str = "") -> None:
        """So many are done; ``shown`` says what is known of them."""


class TrainingProgress:
    """How far training is, fed by the metrics that are logged anyway.

    Args:
        bar: What shows it.
        counts: Metrics one of which says how many steps are done; none takes the step that metrics belong to.
    """

    def __init__(self, bar: Bar, counts: Sequence[str] = ()) -> None:
        self._bar, self._counts, self._done = bar, counts, 0
        self._shown: dict[str, str] = {}

    def also(self, log: Log) -> Log:
        """A log function that moves the bar, too."""

        def log_and_show(metrics: Mapping[str, float], step: int) -> None:
            log(metrics, step)
            self._shown |= {key: form.format(metrics[key]) for key, form in SHOWN.items() if key in metrics}
            self._done = next((int(metrics[key]) for key in self._counts if key in metrics), self._done)
            self._bar.show(self._done if self._counts else step, "  ".join(self._shown.values()))

        return log_and_show

    def at(self, step: int) -> None:
        """Say how far it is, also where a run that continues had nothing left to log."""
        self._bar.show(step, "  ".join(self._shown.values()))


@contextmanager
def training_progress(steps: int, unit: str = "gradient steps", begun: int = 0) -> Iterator[TrainingProgress]:
    """Show how many of ``steps`` are done, ``begun`` of them before; of env steps those of training alone."""
    with progress(f"Training ({unit})", steps, begun) as bar:
        yield TrainingProgress(bar, OF_ENV_STEPS if unit == "env steps" else ())


@contextmanager
def counting_progress(description: str, total: int) -> Iterator[Callable[[object], None]]:
    """Show how often what is yielded was called."""
    done = count(1)
    with progress(description, total) as bar:
        yield lambda _: bar.show(next(done))


@contextmanager
def progress(description: str, total: int, begun: int = 0) -> Iterator[Bar]:
    """Show how far a phase is: a bar in a terminal, lines in a log: first, last, one each half minute."""
    if not console.is_terminal:
        lines = LineProgress(description.strip(), total, begun)
        yield lines
        lines.end()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TextColumn("{task.fields[shown]}"), TimeRemainingColumn(), console=console) as shown:
        yield TerminalBar(shown, shown.add_task(description, total=total, completed=begun, shown=""))


@dataclass(frozen=True)
class TerminalBar:
    """A bar of rich's."""

    progress: Progress
    task: TaskID

    def show(self, completed: int, shown: str = "") -> None:
        """Move it."""
        self.progress.update(self.task, completed=completed, shown=shown)


class LineProgress:
    """Lines for a log file.

    Args:
        description: The phase.
        total: Of what it counts.
        begun: What was done before.
        clock: Seconds.
    """

    def __init__(
        self, description: str, total: int, begun: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.description, self.total, self._clock = description, total, clock
        self._began = self._spoke = clock()
        self._last = (begun, "")
        console.print(f"{description}: {begun} of {total}", soft_wrap=True, markup=False)

    def show(self, completed: int, shown: str = "") -> None:
        """Say it, half a minute after the last line."""
        self._last = (completed, shown)
        if self._clock() - self._spoke >= LINE_SECONDS:
            self._say()

    def end(self) -> None:
        """Say how it ended, and how long it took."""
        self._say()

    def _say(self) -> None:
        completed, shown = self._last
        self._spoke = self._clock()
        line = f"{self.description}: {completed} of {self.total}, {self._spoke - self._began:.0f} s  {shown}".rstrip()
        console.print(line, soft_wrap=True, markup=False)
