"""How a figure of the documentation is saved: without a background, in a grey that reads on white and on black."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

INK = "#7a7a7a"
"""4.3 : 1 against white, 4.4 : 1 against GitHub's dark page, 3.8 : 1 against the site's."""


def save(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write a PNG for light and dark pages; letters, axes and frames lose the colours they had."""
    for text in figure.findobj(Text):
        text.set_color(INK)
    for axes in figure.axes:
        _grey(axes)
    figure.savefig(path, dpi=dpi, transparent=True)


def _grey(axes: Axes) -> None:
    axes.tick_params(which="both", colors=INK)
    for spine in axes.spines.values():
        spine.set_edgecolor(INK)
    legend = axes.get_legend()
    if legend is not None:
        legend.get_frame().set(facecolor="none", edgecolor="none")
