"""What goes wrong while training, and what is kept of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from eva_rl.batch import WindowBatch
from eva_rl.errors import UserError
from eva_rl.files import write_file

FAILED_BATCH = "failed_batch.safetensors"


class NotFiniteError(UserError):
    """A loss, a gradient, a reward or an observation is infinite or not a number.

    Args:
        what: Which.
        step: Gradient step or env step.
        batch: What it was computed from, where there is a batch.
    """

    def __init__(self, what: str, step: int, batch: WindowBatch | None = None) -> None:
        super().__init__(
            f"{what} is not finite at step {step}. The parameters and the last checkpoint are as they were before. "
            "Lower algo.learning_rate, or look for outliers in the data."
        )
        self.batch = batch


@contextmanager
def failures_kept(run_dir: Path) -> Iterator[None]:
    """Save the batch of a :class:`NotFiniteError`, and say what happened and what to do.

    Raises:
        UserError: A NotFiniteError was raised inside, or a worker process of an environment died.
    """
    try:
        yield
    except NotFiniteError as error:
        kept = _keep(run_dir / FAILED_BATCH, error.batch)
        raise UserError(f"Stopped: {error}{kept}") from error
    except (EOFError, BrokenPipeError, ConnectionResetError) as error:
        raise UserError(
            "A worker process of the environments died. Type the same command again to continue from the last "
            "checkpoint; with algo.workers=0 the environments run in this process and show their own error."
        ) from error


def _keep(path: Path, batch: WindowBatch | None) -> str:
    if batch is None:
        return ""
    tensors: dict[str, Tensor | None] = {f.name: getattr(batch, f.name) for f in fields(batch)}
    found = {name: x.detach().cpu().contiguous() for name, x in tensors.items() if x is not None}
    write_file(path, lambda aside: save_file(found, aside))
    return f" Its batch is kept in {path}."
