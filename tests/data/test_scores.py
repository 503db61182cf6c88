"""Normalised scores, against values that papers and Minari print."""

from __future__ import annotations

import numpy as np
import pytest

from eva_rl.envs import normalized_score, reference_scores


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("hopper-medium-v2", -20.272305, 3234.3),
        ("Hopper-v5", -20.272305, 3234.3),
        ("mujoco/hopper", -20.272305, 3234.3),
        ("hopper_medium-v2", -20.272305, 3234.3),
        ("HalfCheetah-v4", -280.178953, 12135.0),
        ("Walker2d-v5", 1.629008, 4592.3),
        ("Ant-v5", -325.6, 3879.7),
        ("Ant_maze_u-maze_noisy", 0, 1),
        ("antmaze-umaze-v2", 0, 1),
        ("D4RL/antmaze/umaze-v1", 0, 1),
        ("D4RL/door/human-v2", -56.512833, 2880.5693087298737),
        ("AdroitHandPen-v1", 96.262799, 3076.8331017826877),
        ("D4RL/kitchen/mixed-v2", 0, 4),
        ("FrankaKitchen-v1", 0, 4),
        ("maze2d-umaze-v1", 23.85, 161.86),
        ("maze2d-umaze-dense-v1", 68.537689, 193.66285642381482),
        ("bullet-hopper-medium-v0", 20.058972, 1441.8059623),
    ],
)
def test_references(name: str, low: float, high: float) -> None:
    assert reference_scores(name) == (low, high)
    np.testing.assert_allclose(normalized_score(name, [low, high, (low + high) / 2]), [0, 100, 50], atol=1e-9)


@pytest.mark.parametrize(
    "name", ["", "metaworld/push-v3", "Pendulum-v1", "door-open-v3", "hammer-v3", "Humanoid-v5", "antlion-v0"]
)
def test_no_references(name: str) -> None:
    assert reference_scores(name) is None
    assert normalized_score(name, 1.0) is None


def test_scores_of_the_literature() -> None:
    # A return of 2,133 on Hopper is 66.2 in the tables of papers; a random policy's -20.3 is 0.
    assert normalized_score("hopper-medium-v2", 2133.0) == pytest.approx(66.16, abs=0.01)
