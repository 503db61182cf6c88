"""What figures show: colours, legends, axes, files."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from matplotlib.axes import Axes
from PIL import Image

from eva_rl.report.figures import (
    COLOURS,
    aggregate_figure,
    colour_and_marker,
    improvement_figure,
    inline_svg,
    picture,
    profile_figure,
    style,
    task_figure,
)
from tests.report.making_groups import analysis_of

SCORES = {"a": {"t": [0.5, 0.6, 0.7], "u": [0.1, 0.2, 0.3]}, "_b": {"t": [0.4, 0.4, 0.4]}}


@pytest.fixture(autouse=True)
def _styled() -> Iterator[None]:
    with style():
        yield


def points(axes: Axes) -> list[tuple[float, float]]:
    """Values drawn as single markers."""
    lines = [line for line in axes.lines if len(line.get_xdata()) == 1]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in lines]


def test_a_hundred_methods_look_different() -> None:
    """The eleventh once looked like the first."""
    looks = [colour_and_marker(index) for index in range(100)]
    assert len(set(looks)) == 100
    assert len({colour for colour, _ in looks[: len(COLOURS)]}) == len(COLOURS)


def test_aggregates_are_at_their_values() -> None:
    analysis = analysis_of({"a": SCORES["a"], "_b": SCORES["a"]})
    figure = aggregate_figure(analysis)
    assert [axes.get_title() for axes in figure.axes] == ["IQM", "mean", "median"]
    assert points(figure.axes[1]) == [(pytest.approx(0.4), 0), (pytest.approx(0.4), 1)]
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == list(analysis.aggregates)[::-1]


def test_tasks_of_one_method_alone_are_drawn_for_it() -> None:
    figure = task_figure(analysis_of(SCORES))
    assert sorted(x for x, _ in points(figure.axes[0])) == pytest.approx([0.2, 0.4, 0.6])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["u", "t"]
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {"a", " _b", "before fine-tuning"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scores", [[0.5], [0.0, 0.0, 0.0], [-900.0, -900.0], [1e12, -1e12, 3.0]])
def test_scores_without_spread_or_interval_are_drawn(scores: list[float]) -> None:
    key = "success_rate" if max(scores) <= 1 and min(scores) >= 0 else "mean_reward"
    analysis = analysis_of({"a": {"t": scores}, "b": {"t": scores}}, key)
    for figure in (improvement_figure(analysis), profile_figure(analysis)):
        content = picture(figure, "png")
        assert Image.open(io.BytesIO(content)).width == 1050
    assert points(improvement_figure(analysis).axes[0]) == [(0.5, 0)]


def test_the_same_figure_is_the_same_file() -> None:
    """Names within an SVG file were drawn by chance."""
    analysis = analysis_of(SCORES)
    one, two = (picture(profile_figure(analysis_of({"a": SCORES["a"]})), "svg") for _ in range(2))
    assert one == two
    inside = [inline_svg(task_figure(analysis), name, "title") for name in ("x", "x", "y")]
    assert inside[0] == inside[1] != inside[2]


def test_a_legend_of_long_names_lies_within_the_picture() -> None:
    """Names and colours lay outside of it, or over the axes."""
    long = "eva (algo=bc_then_self_imitation, algo.dropout=0.5, data.returns_to_go=asked, adapter.rank=16), {}"
    analysis = analysis_of({long.format(index): {"t": [0.1 * index, 0.5, 0.6]} for index in range(8)})
    figure = profile_figure(analysis)
    picture(figure, "png")
    (legend,), (axes,) = figure.legends, figure.axes
    whole, room = legend.get_window_extent(), axes.get_window_extent()
    assert whole.x0 >= 0
    assert whole.x1 <= figure.bbox.x1
    assert whole.y0 >= 0
    assert whole.y1 <= room.y0, "below the axes"
    assert room.height > 0.2 * figure.bbox.height
