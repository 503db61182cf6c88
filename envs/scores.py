"""Reference returns, and scores between them: 0 is a random policy, 100 an expert.

The constants are D4RL's (Fu et al. 2020, arXiv 2004.07219; https://github.com/Farama-Foundation/D4RL), where the same
holds for all versions and qualities of an environment. D4RL's function returns the fraction; papers print it times 100,
and so does this one. Notes of care: the constants come from Gym's v2 environments, so that Gymnasium's v4 and v5 give
nearly, not exactly, the same scale; Minari's ``mujoco/*`` sets are not D4RL's; pen's are for a horizon of 100.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import ArrayLike, NDArray

REFERENCES: dict[str, tuple[float, float]] = {
    "bullet-halfcheetah": (-1275.766996, 2381.6725),
    "bullet-hopper": (20.058972, 1441.8059623),
    "bullet-ant": (373.705955, 2650.495),
    "bullet-walker2d": (16.523877, 1623.6476303),
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "antmaze": (0.0, 1.0),
    "ant": (-325.6, 3879.7),
    "pen": (96.262799, 3076.8331017826877),
    "hammer": (-274.856578, 12794.134825156867),
    "door": (-56.512833, 2880.5693087298737),
    "relocate": (-6.425911, 4233.877797728884),
    "kitchen": (0.0, 4.0),
    "maze2d-umaze-dense": (68.537689, 193.66285642381482),
    "maze2d-medium-dense": (44.264742, 297.4552547777125),
    "maze2d-large-dense": (30.569041, 303.4857382709002),
    "maze2d-open-dense": (11.17817, 27.166538620695782),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "maze2d-open": (0.01, 20.66),
    "minigrid-fourrooms": (0.01442, 2.89685),
    "carla-lane": (-0.8503839912, 1023.5784385),
    "carla-town": (-114.8157950, 2440.1772022),
    "flow-ring": (-165.22, 24.42),
    "flow-merge": (118.67993, 330.03179),
}
"""Lowest and highest reference return of each of D4RL's environments; longer names stand before their beginnings."""

_HANDS = {"pen", "hammer", "door", "relocate"}
"""Adroit's tasks; Meta-World has a hammer and doors of its own."""
_SPELLINGS = (
    (r"^d4rl[/:]|^minari:|^mujoco/", ""),
    (r"^adroithand", ""),
    (r"^frankakitchen", "kitchen"),
    (r"[/_]", "-"),
    (r"^ant-maze", "antmaze"),
    (r"^bullet-walker(?!2d)", "bullet-walker2d"),
)


def reference_scores(name: str) -> tuple[float, float] | None:
    """Lowest and highest reference return of an environment or a data set.

    Args:
        name: Of an environment (``Hopper-v5``, ``mujoco/hopper``, ``AntMaze_UMaze-v4``) or of a data set
            (``hopper-medium-v2``, ``D4RL/pen/human-v2``).

    Returns:
        Both, or None where there are no reference returns.
    """
    plain = name.lower()
    for pattern, spelling in _SPELLINGS:
        plain = re.sub(pattern, spelling, plain)
    for known, scores in REFERENCES.items():
        ending = r"-(human|cloned|expert|v[01]\b)" if known in _HANDS else r"(-|$)"
        if re.match(re.escape(known) + ending, plain):
            return scores
    return None


def normalized_score(name: str, returns: ArrayLike) -> NDArray[np.float64] | None:
    """Returns as scores from 0 (random) to 100 (expert); better and worse policies lie outside.

    Args:
        name: Of an environment or a data set, as :func:`reference_scores` takes it.
        returns: A return or an array of them.

    Returns:
        Scores of the same shape (a numpy scalar for a number), or None where there are no reference returns.
    """
    references = reference_scores(name)
    return None if references is None else score_between(references, returns)


def score_between(references: tuple[float, float], returns: ArrayLike) -> NDArray[np.float64]:
    """Scores of returns between two reference returns, times 100."""
    low, high = references
    scores: NDArray[np.float64] = 100 * (np.asarray(returns, np.float64) - low) / (high - low)
    return scores
