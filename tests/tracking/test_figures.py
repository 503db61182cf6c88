"""What a run's figures show, also of values that do not vary."""

from __future__ import annotations

import numpy as np
import pytest

from eva_rl.tracking.figures import action_figure, overview_figure, pixels, spectrum_figure


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 100.0, 1e-30])
def test_an_action_at_its_bound_is_drawn(value: float) -> None:
    """A gripper that stays closed: bins narrower than float32 divided by zero, and nothing was drawn."""
    actions = np.full((9, 1), value, np.float32)
    figure = action_figure(actions, actions[:5])
    pixels(figure)
    for patch in figure.axes[0].patches:
        x, heights = patch.get_xy().T  # type: ignore[attr-defined]
        assert np.isfinite(heights).all()
        assert x.min() <= value <= x.max()
        assert heights.max() > 0


def test_both_histograms_have_the_bins_of_all_values() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.uniform(-1, 0, (500, 3)), rng.uniform(0, 1, (50, 3))
    figure = action_figure(before, after)
    assert [axes.get_title() for axes in figure.axes] == ["action 0", "action 1", "action 2"]
    for index, axes in enumerate(figure.axes):
        edges = np.histogram_bin_edges(np.concatenate([before[:, index], after[:, index]]), 40)
        densities = {p.get_label(): p.get_xy()[:, 1].max() for p in axes.patches}  # type: ignore[attr-defined]
        expected = [np.histogram(v[:, index], edges, density=True)[0].max() for v in (before, after)]
        assert [densities["before"], densities["after"]] == pytest.approx(expected)


def test_variance_adds_up_and_kinds_share_a_colour() -> None:
    axes = spectrum_figure({"a.q": [0.5, 0.25, 0.25], "b.q": [1.0], "head": []}).axes[0]
    lines = [line for line in axes.lines if line.get_alpha()]
    assert [list(line.get_ydata()) for line in lines] == [[0.5, 0.75, 1.0], [1.0], []]
    assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color()
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["head", "q"]


def test_an_overview_of_returns_against_env_steps() -> None:
    rows = [
        {"step": 0, "eval/mean_reward": -5.0},
        {"step": 40, "rollout/ep_rew_mean": 1.0, "bc/train/loss": None, "train/loss": None},
        {"step": 80, "eval/mean_reward": 9.0, "bc/train/loss": 0.5},
    ]
    figure = overview_figure(rows)
    assert figure is not None
    left, right = figure.axes
    assert (left.get_title(), left.get_xlabel()) == ("Return of an episode", "env steps")
    np.testing.assert_array_equal(left.lines[0].get_xydata(), [[0, -5], [80, 9]])
    np.testing.assert_array_equal(right.lines[0].get_xydata(), [[80, 0.5]])
