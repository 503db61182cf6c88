"""Which episodes are used, and how often each is drawn."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from eva_rl.data.trajectories import Episode, Trajectories
from eva_rl.errors import UnknownNameError, UserError

WEIGHTINGS = ("uniform", "episode", "length", "return")


TARGET_QUANTILE = 0.9
"""Quantile of the demonstrations' returns that a policy is asked for."""
SCALED_RETURN = 5.0
"""Largest return-to-go that a network sees; the Decision Transformer's own scales give 3.6 (Hopper) to 12."""
DRAW = 2_311
"""Tells the generator of :func:`select_episodes` from others of the same seed."""
PART_ROWS = 1 << 16
"""Rows of observations that are looked at at a time."""
GRACE = 10
"""Env steps from the first success on that are sampled with full weight."""


def select_episodes(
    trajectories: Trajectories,
    *,
    top: float = 1.0,
    first: int = 0,
    min_return: float | None = None,
    max_return: float | None = None,
    sample: int = 0,
    seed: int = 0,
) -> Trajectories:
    """The first episodes, of these the ones with a return within bounds, of these the best fraction, and a sample.

    Args:
        trajectories: Where from; returned as they are where nothing is left out.
        top: Fraction with the highest returns.
        first: Number of first episodes, 0 for all.
        min_return: Lowest return; None for any.
        max_return: Highest return; None for any.
        sample: Number of episodes drawn at random from what is left, without replacement; 0 for all.
        seed: Of the draw.

    Raises:
        UserError: No episode is left, fewer than the sample asks for, or the fraction is out of range.
    """
    if not 0 < top <= 1:
        raise UserError(f"top={top}: expected a fraction above 0 and at most 1.")
    kept = np.arange(trajectories.num_episodes)[: first or None]
    low, high = -math.inf if min_return is None else min_return, math.inf if max_return is None else max_return
    returns = trajectories.returns
    kept = kept[(returns[kept] >= low) & (returns[kept] <= high)]
    if not len(kept):
        raise UserError(
            f"{trajectories.source}: no episode has a return from {low:g} to {high:g}; they have {returns.min():g} to "
            f"{returns.max():g}. Widen the range."
        )
    if top < 1:
        chosen = trajectories.returns[kept]  # of equal returns the earlier episode wins
        count = max(1, math.ceil(top * len(kept) - 1e-9))
        kept = np.sort(kept[np.argsort(-chosen, kind="stable")[:count]])
    if sample > len(kept):
        raise UserError(f"{trajectories.source}: {len(kept)} episodes to draw from, fewer than data.sample={sample}.")
    if sample:
        kept = np.sort(np.random.default_rng((seed, DRAW)).choice(kept, sample, replace=False))
    return trajectories if len(kept) == trajectories.num_episodes else trajectories.select(kept)


def window_weights(trajectories: Trajectories, by: str) -> NDArray[np.float64] | None:
    """Relative probability of each env step to be the last of a window.

    Args:
        trajectories: Where windows are drawn from.
        by: ``uniform``: each env step alike, so that episodes are drawn in proportion to their length (as Chen et al.
            2021, arXiv 2106.01345). ``episode``: each episode alike. ``length``: env steps in proportion to the length
            of their episode, which prefers episodes that lasted. ``return``: episodes in proportion to their return
            above the worst, which gets a hundredth of the best one's.

    Returns:
        (N,), or None where all are equal.

    Raises:
        UnknownNameError: No such weighting.
    """
    if by not in WEIGHTINGS:
        raise UnknownNameError("weighting", by, WEIGHTINGS)
    if by == "uniform":
        return None
    lengths = trajectories.lengths.astype(np.float64)
    per_step = {"episode": 1 / lengths, "length": lengths}.get(by)
    if per_step is None:
        returns = trajectories.returns
        spread = returns.max() - returns.min()
        differ = spread > 1e-5 * np.abs(returns).max()  # by more than float32 rewards round
        above = (returns - returns.min()) / spread if differ else np.ones_like(returns)
        per_step = np.maximum(above, 0.01) / lengths
    return np.repeat(per_step, trajectories.lengths)


def observation_statistics(data: Trajectories) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of observations, (obs,) each, part by part: numpy's own would copy all of them."""
    rows, total, squares = data.observations, np.zeros(data.observation_dim), np.zeros(data.observation_dim)
    parts = [slice(begin, begin + PART_ROWS) for begin in range(0, data.num_steps, PART_ROWS)]
    for part in parts:
        total += rows[part].sum(0, dtype=np.float64)
    mean = total / data.num_steps
    for part in parts:
        squares += np.square(rows[part] - mean).sum(0)
    return mean, np.sqrt(squares / data.num_steps)


def target_return(data: Trajectories) -> float:
    """The return to ask for: a high quantile of what was demonstrated."""
    return float(np.quantile(data.returns, TARGET_QUANTILE))


def asked_returns_to_go(data: Trajectories, target: float) -> NDArray[np.float32]:
    """Returns-to-go (N,) as a policy sees them that is asked for ``target`` and acts as the demonstrations do."""
    missing = np.repeat(target - data.returns, data.lengths)
    return (data.returns_to_go + missing).astype(np.float32)


def return_scale(data: Trajectories) -> float:
    """What returns are divided by, so that the largest return-to-go becomes :data:`SCALED_RETURN`; 1 for no rewards."""
    largest = float(np.abs(data.returns_to_go).max())
    return float(f"{largest / SCALED_RETURN:.3g}") or 1.0


def sampling_weights(
    data: Trajectories, after_success: float, weight_by: str = "uniform"
) -> NDArray[np.float64] | None:
    """Weight of each env step as the last of a window.

    What follows a success is mostly holding still; it gets less weight, so that updates go where success is decided.

    Args:
        data: Successes must be known, or all weights are equal.
        after_success: Weight of env steps more than :data:`GRACE` after the first success.
        weight_by: What windows are drawn by otherwise; see :func:`eva_rl.data.window_weights`.

    Returns:
        (N,), or None where all are equal.
    """
    drawn = window_weights(data, weight_by)
    if data.successes is None or after_success == 1:
        return drawn
    weights = np.ones(data.num_steps)
    for begin, end in zip(data.offsets[:-1], data.offsets[1:], strict=True):
        solved = np.flatnonzero(data.successes[begin:end])
        if len(solved):
            weights[begin + solved[0] + GRACE : end] = after_success
    return weights if drawn is None else weights * drawn


def until_success(episode: Episode) -> Episode:
    """The episode up to its first success, which ends it for good; all of it where there is none."""
    if episode.successes is None or not episode.successes.any():
        return episode
    length = int(np.argmax(episode.successes)) + 1
    terminations = np.zeros(length, bool)
    terminations[-1] = True
    return replace(
        episode,
        observations=episode.observations[: length + 1],
        actions=episode.actions[:length],
        rewards=episode.rewards[:length],
        terminations=terminations,
        truncations=np.zeros(length, bool),
        successes=episode.successes[:length],
        target_actions=None if episode.target_actions is None else episode.target_actions[:length],
    )
