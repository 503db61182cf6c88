"""Windows of consecutive env steps, gathered without a loop over samples."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eva_rl.batch import InputScaling, WindowBatch
from eva_rl.data.trajectories import Trajectories
from eva_rl.errors import UserError


class WindowSampler:
    """Draws windows of at most T consecutive env steps of one episode, as a policy sees them.

    A window is named by its last row. Windows that reach back beyond the start of their episode are padded on the
    left, so that context lengths from 1 to T occur. Draws depend on nothing
    but ``(seed, step)``: a resumed run sees the batches that the uninterrupted one would have seen.

    Args:
        trajectories: Where to draw from; memory-mapped arrays are read row by row.
        context_length: T, env steps in a window.
        scaling: How raw numbers become what the network sees.
        seed: Seed of all draws.
        weights: (N,), relative probability of each row to be the last of a window; None draws uniformly.
        returns_to_go: (N,), what windows show as such; None shows the returns that were obtained.

    Raises:
        UserError: The weights do not fit.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        context_length: int,
        scaling: InputScaling,
        *,
        seed: int = 0,
        weights: NDArray[np.float64] | None = None,
        returns_to_go: NDArray[np.float32] | None = None,
    ) -> None:
        self.trajectories = trajectories
        self._returns_to_go = returns_to_go
        self.context_length = context_length
        self._scaling = scaling.to("cpu")  # windows are gathered there, whatever the policy lives on
        self._seed = seed
        self._starts = np.repeat(trajectories.offsets[:-1], trajectories.lengths)
        self._cumulative = None if weights is None else _cumulative(weights, trajectories.num_steps)

    def sample(self, batch_size: int, step: int, device: torch.device | str = "cpu") -> WindowBatch:
        """Draw the windows of gradient step ``step``."""
        return self.windows(self.rows(batch_size, step), device)

    def rows(self, batch_size: int, step: int) -> NDArray[np.int64]:
        """The last rows (B,) of the windows of gradient step ``step``."""
        rng = np.random.default_rng((self._seed, step))
        if self._cumulative is None:
            return rng.integers(self.trajectories.num_steps, size=batch_size)
        draws = rng.random(batch_size) * self._cumulative[-1]
        rows: NDArray[np.int64] = np.searchsorted(self._cumulative, draws, side="right")
        return rows

    def windows(self, last_rows: NDArray[np.int64], device: torch.device | str = "cpu") -> WindowBatch:
        """Gather the windows that end in the given rows.

        Args:
            last_rows: (B,), row of the last env step of each window.
            device: Where the batch goes.
        """
        data, starts = self.trajectories, self._starts[last_rows]
        windows = gather_windows(data, last_rows, starts, self.context_length, self._scaling, self._returns_to_go)
        return windows.to(device)


class StepColumns(Protocol):
    """Env steps of successive episodes, one a row."""

    @property
    def observations(self) -> NDArray[np.float32]:
        """(N, obs)."""

    @property
    def actions(self) -> NDArray[np.float32]:
        """(N, act)."""

    @property
    def rewards(self) -> NDArray[np.float32]:
        """(N,)."""

    @property
    def returns_to_go(self) -> NDArray[np.float32]:
        """(N,)."""

    @property
    def target_actions(self) -> NDArray[np.float32] | None:
        """(N, act), or None where they are the actions."""


def gather_windows(
    data: StepColumns,
    last_rows: NDArray[np.int64],
    starts: NDArray[np.int64],
    context_length: int,
    scaling: InputScaling,
    returns_to_go: NDArray[np.float32] | None = None,
) -> WindowBatch:
    """The windows that end in the given rows, padded on the left.

    Args:
        data: Where the steps lie.
        last_rows: (B,), row of the last env step of each window.
        starts: (B,), row of the first env step of the episode of each window.
        context_length: T.
        scaling: How raw numbers become what the network sees.
        returns_to_go: (N,), in place of those of ``data``; None takes these.
    """
    rows, real = window_rows(last_rows, starts, context_length)
    mask = torch.from_numpy(real)
    keep = mask.unsqueeze(-1)
    shown = data.returns_to_go if returns_to_go is None else returns_to_go
    targets = None
    if data.target_actions is not None:
        targets = scaling.actions(_gather(data.target_actions, rows)) * keep
    return WindowBatch(
        observations=scaling.observations(_gather(data.observations, rows)) * keep,
        actions=scaling.actions(_gather(data.actions, rows)) * keep,
        returns_to_go=_gather(shown, rows).unsqueeze(-1) / scaling.return_scale * keep,
        timesteps=torch.from_numpy(rows - starts[:, None]) * mask,
        attention_mask=None if real.all() else mask,
        rewards=_gather(data.rewards, rows).unsqueeze(-1) / scaling.return_scale * keep,
        target_actions=targets,
    )


def window_rows(
    rows: NDArray[np.int64], starts: NDArray[np.int64], context_length: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Rows of the windows (B, T) that end in ``rows``, and which of them lie in the episode."""
    span = rows[:, None] + np.arange(1 - context_length, 1)
    real = span >= starts[:, None]
    return np.where(real, span, rows[:, None]), real


def _gather(array: NDArray[np.float32], rows: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(array[rows])


def _cumulative(weights: NDArray[np.float64], num_steps: int) -> NDArray[np.float64]:
    if weights.shape != (num_steps,) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise UserError(
            f"Window weights of shape {weights.shape}: expected ({num_steps},), finite, none negative, not all zero."
        )
    return np.cumsum(weights, dtype=np.float64)


def discounted_returns(rewards: NDArray[np.float32], discount: float) -> list[float]:
    """Discounted sum of the rewards from each env step on."""
    sums, total = [], 0.0
    for reward in reversed(rewards.tolist()):
        total = reward + discount * total
        sums.append(total)
    return sums[::-1]
