"""Figures of a run: EVA's directions, results, actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120
"""Pixels an inch of what is drawn."""


def _figure(width: float, height: float) -> Figure:
    """An empty figure, in inches; matplotlib is imported where something is drawn."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def spectrum_figure(spectra: Mapping[str, Sequence[float]]) -> Figure:
    """Cumulative explained variance against the number of components, one line a layer.

    Args:
        spectra: Explained-variance ratios of each layer, largest first.
    """
    figure = _figure(6, 4)
    axes = figure.subplots()
    kinds = sorted({name.rpartition(".")[2] for name in spectra})
    for name, ratios in spectra.items():
        colour = kinds.index(name.rpartition(".")[2])
        total = np.cumsum(ratios)
        axes.plot(np.arange(1, len(total) + 1), total, color=f"C{colour}", alpha=0.7, lw=1.2)
    for index, kind in enumerate(kinds):
        axes.plot([], [], color=f"C{index}", label=kind)
    axes.set(xlabel="components", ylabel="explained variance", ylim=(0, 1.02), title="Activations on the new task")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small", ncols=2, loc="lower right")
    return figure


def overview_figure(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The whole run in one figure: success (or the return) on validation and held-out episodes, and the loss.

    Args:
        rows: Of ``metrics.jsonl``.

    Returns:
        None where nothing was evaluated.
    """
    success = any("eval/success_rate" in row for row in rows)
    key = "success_rate" if success else "mean_reward"
    series = {
        "held out, before and after": _points(rows, f"eval/{key}"),
        "validation, while training": _points(rows, f"validation/{key}"),
    }
    losses = _points(rows, "train/loss") or _points(rows, "bc/train/loss")
    if not series["held out, before and after"]:
        return None
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2)
    for (label, points), style in zip(series.items(), ("D", "o-"), strict=True):
        if points:
            left.plot(*zip(*points, strict=True), style, label=label, clip_on=False)
    steps = "env steps" if any("rollout/ep_rew_mean" in row for row in rows) else "gradient steps"
    left.set(xlabel=steps, title="Success rate" if success else "Return of an episode")
    if success:
        left.set_ylim(-0.03, 1.03)
    if losses:
        right.plot(*zip(*losses, strict=True), color="C2")
        positive = any(loss > 0 for _, loss in losses)
        right.set(xlabel=steps, title="Training loss", yscale="log" if positive else "linear")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.margins(x=0.04)
    left.legend(frameon=False, loc="lower right")
    return figure


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def rank_figure(ranks: Mapping[str, int]) -> Figure:
    """Rank of every target layer: blocks down, kinds of projection across.

    Args:
        ranks: Rank by layer name, for instance ``blocks.0.attention.q_proj``.
    """
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in ranks))
    blocks = list(dict.fromkeys(_block(name) for name in ranks))
    grid = np.full((len(blocks), len(kinds)), np.nan)
    for name, rank in ranks.items():
        grid[blocks.index(_block(name)), kinds.index(name.rpartition(".")[2])] = rank
    figure = _figure(1.5 + 0.9 * len(kinds), 1.2 + 0.5 * len(blocks))
    axes = figure.subplots()
    picture = axes.imshow(grid, cmap="Blues", vmin=0, aspect="auto")
    for (row, column), rank in np.ndenumerate(grid):
        if not np.isnan(rank):
            dark = rank > 0.6 * np.nanmax(grid)
            axes.text(column, row, f"{rank:.0f}", ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
    axes.set_yticks(range(len(blocks)), blocks)
    axes.set_title("Rank")
    figure.colorbar(picture, ax=axes)
    return figure


def _block(name: str) -> str:
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else "other"


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """A figure as (height, width, 3) pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]


def action_figure(before: NDArray[np.floating[Any]], after: NDArray[np.floating[Any]]) -> Figure:
    """How each number of the actions is distributed, before and after.

    Args:
        before: (N, act).
        after: (M, act).
    """
    numbers = before.shape[1]
    columns = min(2, numbers)
    rows = -(-numbers // columns)
    figure = _figure(2.8 * columns, 2 * rows)
    for index in range(numbers):
        axes = figure.add_subplot(rows, columns, index + 1)
        both = np.concatenate([before[:, index], after[:, index]])
        bins = np.histogram_bin_edges(both.astype(np.float64), 40)  # a width of its own where all are equal
        for values, label in ((before, "before"), (after, "after")):
            axes.hist(
                values[:, index], bins=list(bins), density=True, histtype="stepfilled", alpha=0.55, label=label
            )  # one outline: 40 bars each take seven times as long to draw
        axes.set_title(f"action {index}", fontsize="medium")
        axes.set_yticks([])
    figure.axes[0].legend(frameon=False, fontsize="small")
    return figure
