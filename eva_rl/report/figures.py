"""Figures of a report."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eva_rl.report import stats
from eva_rl.report.comparison import STATISTICS, Analysis
from eva_rl.report.curves import AXES, Curve

COLOURS = ("#3b82c4", "#d9662b", "#2a9d78", "#c75fa0", "#b08a1e", "#7a68c9", "#5b8f2f", "#c44e52", "#4aa3b5", "#8c6d5a")
MARKERS = "osD^vPX*<>"
INK = "#0a0b0c"
"""Drawn where the page's own text colour is to stand."""
STYLE: Any = {
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
    "grid.alpha": 0.18,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "font.size": 10,
    "legend.frameon": False,
    "axes.titlesize": "medium",
    "text.parse_math": False,  # a name may hold dollar signs
    "svg.hashsalt": "eva-rl",  # the same figure is the same file
}
MOST_PAIRS = 20
LEGEND_LETTERS = 100
"""That fit side by side in a legend below a figure, with six for a line and the room around."""
FEW_LINES, LINE_HEIGHT = 3, 0.18
"""Lines of a legend for which a figure has room, and the height of each further one, in inches."""
TICK_LETTERS = 36
"""In a line of a method's name beside a figure."""
WIDTH = 7.0
"""Inches. A page shows figures from the width of a phone to that of its text: letters stay legible at both."""


def style() -> AbstractContextManager[Any]:
    """What all figures are made under."""
    return mpl.rc_context(STYLE)


def aggregate_figure(analysis: Analysis) -> Figure:
    """Each aggregate of each method, with its interval."""
    labels = list(analysis.aggregates)[::-1]
    figure = Figure(figsize=(WIDTH, 1.2 + 0.42 * len(labels)), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(STATISTICS), sharey=True), STATISTICS, strict=True):
        for place, label in enumerate(labels):
            _interval(axes, analysis.aggregates[label][name], place, _colour(analysis, label))
        axes.set(title=name, ylim=(-0.6, len(labels) - 0.4), xlabel=analysis.group.title)
        axes.set_yticks(range(len(labels)), [fill(label, TICK_LETTERS) for label in labels])
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=4)
        _whole_axis(axes, analysis, wide=False)
    return figure


def _whole_axis(axes: Axes, analysis: Analysis, *, wide: bool = True) -> None:
    """Show rates from 0 to 1, so that small differences look small."""
    if analysis.group.bounded:
        axes.set_xlim(-0.02, 1.02)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1] if wide else [0, 0.5, 1])


def first_pairs(analysis: Analysis) -> str:
    """What to say where not all pairs are drawn."""
    pairs = len(analysis.comparisons)
    return f", the first {MOST_PAIRS} of {pairs} pairs" if pairs > MOST_PAIRS else ""


def improvement_figure(analysis: Analysis) -> Figure:
    """Probability of improvement of each pair."""
    comparisons = analysis.comparisons[:MOST_PAIRS][::-1]
    figure = Figure(figsize=(WIDTH, 1.2 + 0.36 * len(comparisons)), layout="constrained")
    axes = figure.subplots()
    for place, comparison in enumerate(comparisons):
        _interval(axes, comparison.improvement, place, _colour(analysis, comparison.first))
    axes.axvline(0.5, color=INK, lw=1, ls="--", alpha=0.6)
    axes.set_yticks(range(len(comparisons)), [fill(f"{c.first} > {c.second}", TICK_LETTERS) for c in comparisons])
    axes.set(
        xlim=(-0.02, 1.02), ylim=(-0.6, len(comparisons) - 0.4), xlabel="probability that a run of the first is better"
    )
    axes.grid(axis="y", visible=False)
    return figure


def profile_figure(analysis: Analysis) -> Figure:
    """Share of runs that score above each threshold."""
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    axes = figure.subplots()
    for label, estimate in analysis.profiles.items():
        _band(axes, analysis.thresholds, estimate, _colour(analysis, label), label)
    axes.set(xlabel=f"{analysis.group.title} above", ylabel="share of runs", ylim=(-0.02, 1.02))
    _legend(axes)
    return figure


def task_figure(analysis: Analysis) -> Figure:
    """The mean of each method on each task, with its interval."""
    tasks, labels = list(analysis.tasks)[::-1], list(analysis.aggregates) or [m.label for m in analysis.group.methods]
    figure = Figure(figsize=(WIDTH, 1.4 + (0.25 + 0.16 * len(labels)) * len(tasks)), layout="constrained")
    axes = figure.subplots()
    offsets = np.linspace(0.3, -0.3, len(labels)) if len(labels) > 1 else np.zeros(1)
    for place, task in enumerate(tasks):
        for label, offset in zip(labels, offsets, strict=True):
            if label in analysis.tasks[task]:
                _interval(axes, analysis.tasks[task][label], place + offset, _colour(analysis, label), markersize=5)
        axes.plot([analysis.before[task]] * 2, [place - 0.35, place + 0.35], color=INK, lw=1, alpha=0.6)
    for label in labels:
        axes.plot([], [], **_marker_style(_colour(analysis, label)), label=legend_label(label))
    axes.plot([], [], color=INK, lw=1, alpha=0.6, label="before fine-tuning")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set(ylim=(-0.6, len(tasks) - 0.4), xlabel=analysis.group.title)
    _whole_axis(axes, analysis)
    axes.grid(axis="y", visible=False)
    _legend(axes)
    return figure


def curve_figure(analysis: Analysis, curves: Mapping[str, Sequence[Curve]]) -> Figure:
    """Learning curves, one picture an axis."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    for index, (axes, axis) in enumerate(zip(_row(figure, len(curves)), curves, strict=True)):
        for curve in curves[axis]:
            _band(axes, curve.places, curve.estimate, _colour(analysis, curve.label), curve.label, marked=True)
        axes.locator_params(axis="x", nbins=5)
        axes.set(xlabel=AXES[axis], ylabel=f"IQM of {analysis.group.title}" if index == 0 else "")
        if analysis.group.bounded:
            axes.set_ylim(-0.02, 1.02)
    _legend(figure.axes[0])
    return figure


def _row(figure: Figure, number: int) -> list[Axes]:
    return list(np.atleast_1d(np.asarray(figure.subplots(1, number, sharey=True))))


def _colour(analysis: Analysis, label: str) -> int:
    """Index of a method, which decides its colour and marker in all figures."""
    return [method.label for method in analysis.group.methods].index(label)


def colour_and_marker(index: int) -> tuple[str, str]:
    """What a method is drawn in; a hundred methods differ in one of them."""
    return COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


def _marker_style(index: int) -> dict[str, Any]:
    colour, marker = colour_and_marker(index)
    return {"color": colour, "marker": marker, "ls": ""}


def legend_label(label: str) -> str:
    """A label that matplotlib shows: one that begins with an underscore it would leave out."""
    return f" {label}" if label.startswith("_") else label


def _interval(axes: Axes, estimate: stats.Estimate, place: float, index: int, markersize: float = 7) -> None:
    style = _marker_style(index)
    axes.plot([float(estimate.low), float(estimate.high)], [place, place], color=style["color"], lw=3, alpha=0.45)
    axes.plot(float(estimate.value), place, markersize=markersize, **style)


def _band(axes: Axes, places: Any, estimate: stats.Estimate, index: int, label: str, *, marked: bool = False) -> None:
    style = _marker_style(index)
    marker = {"marker": style["marker"], "markersize": 4} if marked else {}
    axes.plot(places, estimate.value, color=style["color"], lw=1.8, label=legend_label(label), **marker)
    axes.fill_between(places, estimate.low, estimate.high, color=style["color"], alpha=0.15, lw=0)


def _legend(axes: Axes) -> None:
    """All labels below the axes, long ones in several lines; the figure grows by what that takes beyond a few."""
    handles, names = axes.get_legend_handles_labels()
    labels = [fill(name, LEGEND_LETTERS // 2) for name in names]
    columns, figure = legend_columns(labels), axes.get_figure(root=True)
    assert figure is not None
    heights = [1 + label.count("\n") for label in labels]
    lines = sum(max(heights[first : first + columns]) for first in range(0, len(heights), columns))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + LINE_HEIGHT * max(0, lines - FEW_LINES))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small")


def legend_columns(labels: Sequence[str]) -> int:
    """How many columns of a legend fit below a figure."""
    longest = max((len(line) for label in labels for line in label.split("\n")), default=0)
    return max(1, min(len(labels), 5, LEGEND_LETTERS // (longest + 6)))


def picture(figure: Figure, kind: str) -> bytes:
    """A figure as a PNG or SVG file, on white."""
    return _file(figure, format=kind, dpi=150, facecolor="white", metadata={"Date": None} if kind == "svg" else None)


def _file(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, **options)
    figure.set_layout_engine("none")  # everything has its place, which takes longer to find than to draw
    return buffer.getvalue()


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """A figure as part of a page: in the page's own text colour, as wide as there is room, with names of its own."""
    with mpl.rc_context({"svg.hashsalt": name}):
        text = _file(figure, format="svg", transparent=True, metadata={"Date": None}).decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )
    text = re.sub(
        r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.S
    )  # its rule would hold for the whole page
    names = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text.replace(INK, "currentColor"))
    return names.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
