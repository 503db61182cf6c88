"""Progress bars of the commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

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


console = Console(stderr=True, highlight=False)


class TrainingProgress:
    """A bar over gradient steps, fed by the metrics that are logged anyway."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._shown: dict[str, str] = {}

    def also(self, log: Log) -> Log:
        """A log function that moves the bar, too."""

        def log_and_show(metrics: Mapping[str, float], step: int) -> None:
            log(metrics, step)
            self._shown |= {key: form.format(metrics[key]) for key, form in SHOWN.items() if key in metrics}
            self._progress.update(self._task, completed=step, shown="  ".join(self._shown.values()))

        return log_and_show


@contextmanager
def training_progress(steps: int, unit: str = "gradient steps") -> Iterator[TrainingProgress]:
    """Show a bar over ``steps`` of the record."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"Training ({unit})", total=steps, shown="")
        yield TrainingProgress(progress, task)


@contextmanager
def counting_progress(description: str, total: int) -> Iterator[Callable[[object], None]]:
    """Show a bar that moves by one at each call of what is yielded."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        task = progress.add_task(description, total=total)
        yield lambda _: progress.advance(task)
